// The process of one library: does what each line on its standard input asks, one by one.
//
//   node child.mjs MODULE      a module beside this one that exports version and prepare
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { takeTurn } from '../timing.mjs';
import { readFloats } from './arrays.mjs';

/** @typedef {import('../cases.mjs').Case} Case */
/** @typedef {import('./check.mjs').Arrays} Arrays */
/** @typedef {import('./subjects.mjs').Subject} Subject */
/**
 * What a library's module prepares for a subject and a case.
 * @typedef {object} Run
 * @property {() => any} call what is timed; may be asynchronous
 * @property {(result: any) => Float32Array[]} read as [batch, heads, length, headDim]
 * @property {() => void | Promise<void>} [open] before each turn
 * @property {() => void | Promise<void>} [close] gives up what open holds
 * @property {boolean} [isLarge] close after each turn
 * @property {() => string} [prove] the form that really computes
 */
/** @typedef {{problem: Case, subject: Subject, folder: string}} Job */

console.log = console.error; // standard output is for the replies
/** @type {{version: string, prepare: (p: Case, arrays: Arrays, s: Subject) => Run}} */
const library = await import(new URL(`${process.argv[2]}.mjs`, import.meta.url).href);
/** @type {Map<string, Run & {times: number[]}>} */
const runs = new Map();
/** @type {{folder: string, arrays: Arrays | null}} of the case at hand */
let inputs = { folder: '', arrays: null };

const actions = { describe, check, turn, release, measureMemory };
for await (const line of createInterface({ input: process.stdin })) {
  const { action, ...request } = JSON.parse(line);
  /** @type {object} */
  let reply;
  try {
    reply = await actions[/** @type {keyof typeof actions} */ (action)](request);
  } catch (error) {
    reply = { error: /** @type {Error} */ (error).message };
  }
  process.stdout.write(`${JSON.stringify(reply)}\n`);
}

function describe() {
  return { version: library.version };
}

/** Prepares a subject and writes what it computes into files. @param {Job & {id: string}} job */
async function check({ id, problem, subject, folder }) {
  const run = library.prepare(problem, readInputs(folder), subject);
  await run.open?.();
  const outputs = run.read(await run.call());
  for (const [i, output] of outputs.entries()) {
    writeFileSync(path.join(folder, `output-${i}`), output);
  }
  const form = run.prove?.() ?? subject.form;
  if (run.isLarge) await run.close?.();
  runs.set(id, { ...run, times: [] });
  return { outputs: outputs.length, form };
}

/** Times calls for a while. @param {{id: string}} request */
async function turn({ id }) {
  const run = /** @type {Run & {times: number[]}} */ (runs.get(id));
  const count = run.times.length;
  await run.open?.();
  if (run.isLarge) await warmUp(run);
  await takeTurn(run);
  if (run.isLarge) await run.close?.();
  return { times: run.times.slice(count) };
}

/** What was just opened takes its memory in the first two calls. @param {Run} run */
async function warmUp(run) {
  await run.call();
  await run.call();
}

/** The case is over. */
async function release() {
  for (const run of runs.values()) await run.close?.();
  runs.clear();
  inputs = { folder: '', arrays: null };
  return {};
}

/** The memory that one call takes besides inputs and outputs, at its peak. @param {Job} job */
async function measureMemory({ problem, subject, folder }) {
  const run = library.prepare(problem, readInputs(folder), subject);
  await run.open?.();
  globalThis.gc?.();
  writeFileSync('/proc/self/clear_refs', '5'); // the peak starts anew
  const before = statusBytes('VmRSS');
  const result = await run.call();
  const peak = statusBytes('VmHWM');
  const outputBytes = run.read(result).reduce((sum, output) => sum + output.byteLength, 0);
  return { extraBytes: peak - before - outputBytes };
}

/** A number of bytes from /proc/self/status. @param {string} name */
function statusBytes(name) {
  const text = readFileSync('/proc/self/status', 'utf8');
  return 1024 * Number(text.match(new RegExp(`${name}:\\s*(\\d+) kB`))?.[1]);
}

/** @param {string} folder */
function readInputs(folder) {
  if (inputs.folder !== folder || inputs.arrays === null) {
    const read = (/** @type {string} */ name) => {
      const file = path.join(folder, name);
      return existsSync(file) ? readFloats(file) : new Float32Array(0);
    };
    const arrays = {
      ...{ query: read('query'), key: read('key') },
      ...{ value: read('value'), gradOutput: read('gradOutput') },
    };
    inputs = { folder, arrays };
  }
  return /** @type {Arrays} */ (inputs.arrays);
}
