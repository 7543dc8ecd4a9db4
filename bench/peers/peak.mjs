// This machine's limits: what one core multiplies and adds at most with each instruction set, and
// how fast memory is read.
import { mkdirSync } from 'node:fs';
import { arch } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { root, run } from '../../tools/build-native.mjs';
import { countKeyBytes } from '../cases.mjs';

const source = (/** @type {string} */ name) =>
  fileURLToPath(new URL(`../${name}`, import.meta.url));
const X64 = {
  'AVX2 float32': ['-mavx2', '-mfma'],
  'AVX-512 float32': ['-mavx512f', '-mprefer-vector-width=512'],
  'AMX bfloat16': ['-mamx-tile', '-mamx-bf16'],
};
const OTHERS = { [`${arch()} float32`]: [] };

/**
 * GFLOP/s by instruction set; empty where there is no compiler.
 * @returns {Record<string, number>}
 */
export function measurePeaks() {
  /** @type {Record<string, number>} */
  const peaks = {};
  for (const [name, flags] of Object.entries(arch() === 'x64' ? X64 : OTHERS)) {
    // A core without the instruction set ends the program.
    const result = runProgram('peak', flags, []);
    if (result.ok) peaks[name] = Number(result.output);
  }
  return peaks;
}

/**
 * How fast the keys and values of a decoding step can be read, and no more, in GB/s.
 * @param {import('../cases.mjs').Case} problem
 * @param {number} threads
 * @returns {number | null} null where there is no compiler
 */
export function measureRead(problem, threads) {
  const flags = arch() === 'x64' ? [['-mavx512f', '-mprefer-vector-width=512'], ['-mavx2']] : [[]];
  for (const flag of flags) {
    const result = runProgram('read', flag, [String(countKeyBytes(problem)), String(threads)]);
    if (result.ok) return Number(result.output);
  }
  return null;
}

/** @param {string} name @param {string[]} flags @param {string[]} programArguments */
function runProgram(name, flags, programArguments) {
  const program = path.join(root, 'out', name);
  mkdirSync(path.dirname(program), { recursive: true });
  const compiler = process.env.CXX ?? 'c++';
  const options = ['-std=c++17', '-O3', '-pthread', ...flags];
  const built = run(compiler, [...options, source(`${name}.cpp`), '-o', program]);
  return built.ok ? run(program, programArguments) : built;
}
