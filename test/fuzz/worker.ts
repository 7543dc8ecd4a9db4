// Checks random problems, or the one it is given, in a process of its own: run by main.ts, which
// survives a crash of this one. Before each problem, its line is written to a file.
import { openSync, writeSync } from 'node:fs';
import fc from 'fast-check';
import { backendInfo } from '../../lib/index';
import { BACKENDS } from '../harness';
import { check, type FuzzCase, fuzzCases } from './check';

/** What main.ts asks for, as JSON on the command line. */
export interface Assignment {
  readonly seed: number;
  readonly seconds: number;
  readonly count: number;
  readonly backends: readonly string[] | null;
  /** One problem in place of random ones. */
  readonly replay: FuzzCase | null;
  /** The backend that has to be chosen here. */
  readonly selected: string | null;
  /** Where the problem at hand is written. */
  readonly noteFile: string;
}

/** What it prints as its last line, as JSON. */
export interface Verdict {
  readonly problems: number;
  readonly failure: { readonly message: string; readonly problem: FuzzCase } | null;
}

/** Problems between two looks at the clock. */
const BATCH = 10;
const SHRINK_MS = 60_000;

async function main(): Promise<Verdict> {
  const assignment: Assignment = JSON.parse(process.argv[2]);
  const { seed, seconds, count, replay, selected, noteFile } = assignment;
  const backends = assignment.backends ?? BACKENDS;
  if (selected !== null && backendInfo().selected !== selected) {
    throw new Error(`${backendInfo().selected} was selected, not ${selected}`);
  }
  const note = openSync(noteFile, 'w');
  let problems = 0;
  const checkOne = async (problem: FuzzCase) => {
    problems++;
    // Padded with spaces: what an earlier, longer line left must not follow it.
    writeSync(note, JSON.stringify(problem).padEnd(4096), 0);
    await check(problem, backends);
  };
  if (replay) {
    try {
      await checkOne(replay);
    } catch (error) {
      return { problems, failure: { message: messageOf(error), problem: replay } };
    }
    return { problems, failure: null };
  }
  const end = Date.now() + seconds * 1000;
  for (let batch = 0; Date.now() < end && problems < count; batch++) {
    const result = await fc.check(fc.asyncProperty(fuzzCases, checkOne), {
      seed: seed + batch,
      numRuns: Math.min(BATCH, count - problems),
      interruptAfterTimeLimit: SHRINK_MS,
      markInterruptAsFailure: false,
    });
    if (result.failed) {
      const problem = result.counterexample![0];
      return { problems, failure: { message: messageOf(result.errorInstance), problem } };
    }
  }
  return { problems, failure: null };
}

function messageOf(error: unknown): string {
  return error instanceof Error
    ? error.name === 'AssertionError'
      ? error.message
      : `${error.stack}`
    : `${error}`;
}

main().then((verdict) => console.log(JSON.stringify(verdict)));
