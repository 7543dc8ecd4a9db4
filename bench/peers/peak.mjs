// This machine's limits: what one core multiplies and adds at most with each instruction set.
import { mkdirSync } from 'node:fs';
import { arch } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { root, run } from '../../tools/build-native.mjs';

const SOURCE = fileURLToPath(new URL('../peak.cpp', import.meta.url));
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
  const program = path.join(root, 'out', 'peak');
  mkdirSync(path.dirname(program), { recursive: true });
  /** @type {Record<string, number>} */
  const peaks = {};
  for (const [name, flags] of Object.entries(arch() === 'x64' ? X64 : OTHERS)) {
    const compiler = process.env.CXX ?? 'c++';
    const built = run(compiler, ['-std=c++17', '-O3', ...flags, SOURCE, '-o', program]);
    // A core without the instruction set ends the program.
    const result = built.ok ? run(program, []) : built;
    if (result.ok) peaks[name] = Number(result.output);
  }
  return peaks;
}
