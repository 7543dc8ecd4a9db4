// The result files: a line of JSON for the experiment, and one for each run, appended as it ends.
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { arch, cpus, platform } from 'node:os';
import path from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { backendInfo } from 'node-sdpa';
import { UsageError } from '../text';
import { EVALUATED_EVERY, type Job, RUN, TEXT } from './plan';

export const RUNS_FILE = 'runs.jsonl';
export const NOISE_FILE = 'noise.json';

/** What all runs of a file have in common. */
export interface Header {
  readonly run: Omit<typeof RUN, 'steps'> & { readonly steps: number };
  readonly text: typeof TEXT;
  readonly evaluatedEvery: number;
  /** The machine that began the file */
  readonly machine: Machine;
}

export interface Machine {
  readonly cpu: string;
  readonly cores: number;
  readonly platform: string;
  readonly node: string;
  readonly package: string;
  /** What computed attention */
  readonly backend: string | null;
  readonly date: string;
}

/** Losses without dropout, in nats a character. */
export interface Point {
  readonly step: number;
  readonly training: number;
  readonly validation: number;
}

export interface Row extends Job {
  readonly curve: readonly Point[];
  readonly backend: string | null;
  readonly seconds: number;
}

export function describeMachine(): Machine {
  const { version, selected } = backendInfo();
  return {
    cpu: cpus()[0]?.model ?? 'unknown CPU',
    cores: cpus().length,
    platform: `${platform()} ${arch()}`,
    node: process.versions.node,
    package: version,
    backend: selected,
    date: new Date().toISOString().slice(0, 10),
  };
}

export function nameJob({ placement, p, seed }: Job): string {
  return `${placement}${placement === 'none' ? '' : ` ${p}`}, seed ${seed}`;
}

/**
 * Gets a folder's file ready to append to, and gives the rows that are there. A last line that was
 * cut off, by a loss of power say, is taken away: its run is done again.
 * @throws UsageError where the file is of an experiment with other settings
 */
export function openResults(folder: string, steps: number): Row[] {
  const file = path.join(folder, RUNS_FILE);
  const header: Header = {
    run: { ...RUN, steps },
    text: TEXT,
    evaluatedEvery: EVALUATED_EVERY,
    machine: describeMachine(),
  };
  if (!existsSync(file)) {
    mkdirSync(folder, { recursive: true });
    writeFileSync(`${file}.tmp`, `${JSON.stringify(header)}\n`);
    renameSync(`${file}.tmp`, file);
    return [];
  }
  const bytes = readFileSync(file);
  truncateSync(file, bytes.lastIndexOf('\n') + 1);
  const found = readResults(folder);
  for (const name of ['run', 'text', 'evaluatedEvery'] as const) {
    if (isDeepStrictEqual(found.header[name], JSON.parse(JSON.stringify(header[name])))) continue;
    throw new UsageError(`${file}: these runs have another "${name}"; --out takes another folder`);
  }
  return found.rows;
}

/** Appends a run and waits until it is on the disk. */
export function appendRow(folder: string, row: Row): void {
  appendFileSync(path.join(folder, RUNS_FILE), `${JSON.stringify(row)}\n`, { flush: true });
}

export function readResults(folder: string): { header: Header; rows: Row[] } {
  const file = path.join(folder, RUNS_FILE);
  const [header, ...rows] = readFileSync(file, 'utf8').trimEnd().split('\n');
  return { header: JSON.parse(header), rows: rows.map((line) => JSON.parse(line)) };
}
