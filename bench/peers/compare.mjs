// Checks and times one case on several subjects, turn by turn and in a new order each round.
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { createTensors, TOLERANCE } from '../measure.mjs';
import { summarize } from '../timing.mjs';
import { readFloats } from './arrays.mjs';
import { createCheck } from './check.mjs';
import { Library } from './library.mjs';
import { commandOf, nameSubject } from './subjects.mjs';

/** @typedef {import('../cases.mjs').Case} Case */
/** @typedef {import('./subjects.mjs').Subject} Subject */
/** @typedef {Map<string, Library>} Libraries by nameProcess */
/** @typedef {{rounds: number, leastRounds: number, seconds: number}} Effort */
/** @typedef {Omit<ReturnType<typeof summarize>, 'backend'>} Numbers */
/** @typedef {Numbers & Subject} Result */
/** @typedef {Subject & {case: string, extraMiB: number}} Memory */
/** @typedef {{error: number, times: number[], spentMs: number}} State */
/** @typedef {{id: string, subject: Subject} & State} Run */

/**
 * A process for each setting of each library that is here.
 * @param {import('./subjects.mjs').Kind[]} kinds
 */
export async function startLibraries(kinds) {
  /** @type {Libraries} */
  const libraries = new Map();
  /** @type {Record<string, string>} */
  const versions = {};
  for (const kind of kinds) {
    const name = nameProcess(kind);
    if (libraries.has(name)) continue;
    const command = commandOf(kind.library);
    if (command === null) {
      console.log(`${kind.library} is left out: it is not on this machine.`);
      continue;
    }
    const library = new Library(command);
    try {
      versions[kind.library] = (await library.ask('describe')).version;
      libraries.set(name, library);
    } catch (error) {
      console.log(`${name} is left out: ${/** @type {Error} */ (error).message}.`);
    }
  }
  return { libraries, versions };
}

/** Each setting of a library has a process. @param {{library: string, setting: string}} subject */
export function nameProcess({ library, setting }) {
  return `${library} ${setting}`;
}

/**
 * Writes the inputs of a case where all processes can read them, for as long as work takes.
 * @template T
 * @param {Case} problem
 * @param {(folder: string, arrays: import('./check.mjs').Arrays) => Promise<T>} work
 */
export async function withInputs(problem, work) {
  const folder = mkdtempSync(path.join(tmpdir(), 'node-sdpa-'));
  try {
    const { query, key, value, gradOutput } = createTensors(problem);
    const [q, k, v, g] = [query, key, value, gradOutput].map(({ data }) =>
      Float32Array.from(/** @type {Float32Array} */ (data)),
    );
    const arrays = { query: q, key: k, value: v, gradOutput: g };
    for (const [name, data] of Object.entries(arrays)) {
      writeFileSync(path.join(folder, name), data);
    }
    return await work(folder, arrays);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/**
 * @param {Case} problem
 * @param {Subject[]} subjects
 * @param {Libraries} libraries
 * @param {Effort} effort
 * @returns {Promise<{results: Result[], failures: string[]}>}
 */
export function compare(problem, subjects, libraries, effort) {
  return withInputs(problem, async (folder, arrays) => {
    const errorOf = createCheck(problem, arrays);
    const runs = new Set(subjects.map(createRun));
    /** @type {string[]} */
    const failures = [];
    /** Without a run that fails, the others go on. @param {Run} run @param {Promise<void>} work */
    const attempt = async (run, work) => {
      try {
        await work;
      } catch (error) {
        runs.delete(run);
        const who = `${nameSubject(run.subject)}, threads: ${run.subject.threads}`;
        failures.push(`${problem.name}, ${who}: ${/** @type {Error} */ (error).message}`);
      }
    };
    for (const run of runs) {
      await attempt(run, check(problem, run, libraryOf(libraries, run.subject), folder, errorOf));
    }
    for (let round = 0; round < effort.rounds; round++) {
      for (const run of shuffle([...runs])) {
        if (round >= effort.leastRounds && run.spentMs > 1000 * effort.seconds) continue;
        await attempt(run, takeTurn(run, libraryOf(libraries, run.subject)));
      }
    }
    for (const library of libraries.values()) await library.ask('release');
    const results = [...runs].map(({ subject, times, error }) => {
      const run = { backend: subject.form, threads: subject.threads, times, error };
      const { backend: _, case: name, ...numbers } = summarize(problem, run);
      return { case: name, ...subject, ...numbers };
    });
    return { results, failures };
  });
}

/** @param {Subject} subject @param {number} i @returns {Run} */
function createRun(subject, i) {
  return { subject, id: String(i), error: Number.NaN, times: [], spentMs: 0 };
}

/**
 * Has a subject prepare and compute the case; throws where the result is not as exact as it should.
 * @param {Case} problem
 * @param {Run} run
 * @param {Library} library
 * @param {string} folder
 * @param {(outputs: Float32Array[]) => number} errorOf
 */
async function check(problem, run, library, folder, errorOf) {
  const { id, subject } = run;
  const reply = await library.ask('check', { id, problem, subject, folder });
  if (reply.form !== subject.form) throw new Error(`${reply.form} computed instead`);
  const files = Array.from({ length: reply.outputs }, (_, i) => path.join(folder, `output-${i}`));
  run.error = errorOf(files.map(readFloats));
  if (!(run.error <= TOLERANCE[subject.precision])) throw new Error(`relative error ${run.error}`);
}

/** @param {Run} run @param {Library} library */
async function takeTurn(run, library) {
  const start = performance.now();
  const { times } = await library.ask('turn', { id: run.id });
  run.times.push(...times);
  run.spentMs += performance.now() - start;
}

/**
 * The memory that one call of a subject takes besides inputs and outputs, in a process of its own.
 * @param {Case} problem
 * @param {Subject} subject
 * @param {string} folder of the inputs
 * @returns {Promise<Memory>}
 */
export async function measureMemory(problem, subject, folder) {
  const library = new Library(/** @type {string[]} */ (commandOf(subject.library)));
  const { extraBytes } = await library.ask('measureMemory', { problem, subject, folder });
  library.stop();
  return { case: problem.name, ...subject, extraMiB: extraBytes / 2 ** 20 };
}

/** @param {Libraries} libraries @param {Subject} subject */
function libraryOf(libraries, subject) {
  return /** @type {Library} */ (libraries.get(nameProcess(subject)));
}

/** @template T @param {T[]} items */
function shuffle(items) {
  const shuffled = [...items];
  for (let i = shuffled.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [shuffled[i], shuffled[j]] = [shuffled[j], shuffled[i]];
  }
  return shuffled;
}
