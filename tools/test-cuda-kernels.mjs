// Runs test/native/cuda_kernels.cpp: the CUDA kernels, played by the CPU under AddressSanitizer, on
// random problems. Every fault planted in the emulation has to make it fail.
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { buildWithCmake, root, run } from './build-native.mjs';

const RUNS = { clean: '150', faulty: '12' };
const FAULTS = ['fragment', 'shuffle', 'exponential', 'copy', 'barrier'];
const SEED = process.env.SDPA_TEST_SEED ?? '20260801';

const report = path.join(root, 'out/cuda-kernels.json');
rmSync(report, { force: true });
const folder = path.join(root, 'build-cuda-kernels');
const sanitizers = 'SDPA_SANITIZE=address,undefined';
const build = buildWithCmake(folder, [sanitizers], { target: 'cuda_kernels' });
if (!build.ok) {
  console.error(build.output);
  process.exit(1);
}

let failed = 0;
const clean = play([RUNS.clean], {});
judge('random problems and special values', clean.ok, clean.output);
for (const fault of FAULTS) {
  const { ok, output } = play([RUNS.faulty, '1'], { SDPA_CUDA_FAULT: fault });
  judge(`planted fault: ${fault} (has to fail)`, !ok, output);
}

const total = 1 + FAULTS.length;
mkdirSync(path.dirname(report), { recursive: true });
const counts = { numPassedTests: total - failed, numFailedTests: failed, numFailedTestSuites: 0 };
writeFileSync(report, JSON.stringify(counts)); // what tools/ci-report.mjs reads of vitest's reports
console.log(`${total - failed} passed, ${failed} failed`);
process.exit(failed === 0 ? 0 : 1);

/** @param {string[]} args RUNS, and FIRST past 0 to leave out special values @param {Record<string, string>} env */
function play(args, env) {
  const program = path.join(folder, 'build/cuda_kernels');
  return run(program, [SEED, ...args], { env: { ...process.env, ...env } });
}

/** @param {string} name @param {boolean} passed @param {string} output */
function judge(name, passed, output) {
  console.log(`${passed ? 'passed' : 'FAILED'}: ${name}\n  ${output.trim().split('\n').at(-1)}`);
  if (passed) return;
  failed++;
  console.log(output.slice(0, 20_000));
}
