// Whether a call on arrays in host memory is worth a GPU: the only estimate behind 'auto'.

import type { Problem } from './problem-header';

/**
 * Rates of one common machine, in operations and bytes a second. Those of CPUs are measured
 * (bench/results), for one thread. Those of GPUs are NOT MEASURED YET: they are careful guesses for
 * a GPU on PCIe 4, to be replaced by what `npm run bench:gpu` shows.
 */
const RATES = {
  cpuOperations: {
    'cpu:amx': 250e9,
    'cpu:avx512': 140e9,
    'cpu:avx2': 90e9,
    'cpu:neon': 40e9,
    'cpu:portable': 5e9,
  } as Readonly<Record<string, number>>,
  /** By precision: highest, high, medium */
  gpuFloat32Operations: [15e12, 30e12, 60e12],
  gpuHalfOperations: 60e12,
  /** Through pinned memory */
  copiedBytes: 8e9,
  /** Launches, allocations and the way through another thread */
  gpuStartSeconds: 200e-6,
} as const;

const FLOAT32_BYTES = 4;
const HALF_BYTES = 2;

/** Whether it may pay to ask if there is a GPU: not for calls that a CPU ends sooner. */
export function mayPreferGpu(p: Problem, cpu: string, threads: number): boolean {
  return cpuSeconds(p, cpu, threads) > RATES.gpuStartSeconds;
}

/** Whether a GPU gives the result sooner, the copies there and back counted. */
export function prefersGpu(p: Problem, cpu: string, threads: number): boolean {
  const rate = p.type === 0 ? RATES.gpuFloat32Operations[p.precision] : RATES.gpuHalfOperations;
  const gpuSeconds =
    RATES.gpuStartSeconds + operations(p) / rate + copiedBytes(p) / RATES.copiedBytes;
  return gpuSeconds < cpuSeconds(p, cpu, threads);
}

function cpuSeconds(p: Problem, cpu: string, threads: number): number {
  return operations(p) / ((RATES.cpuOperations[cpu] ?? 1e9) * threads);
}

/** Of the forward pass, two for each multiply-add. */
function operations(p: Problem): number {
  const pairs = p.batch * p.queryHeads * p.queryLength * p.keyLength;
  return 2 * pairs * (p.headDim + p.valueDim) * Math.max(p.samples, 1);
}

function copiedBytes(p: Problem): number {
  const queryRows = p.batch * p.queryHeads * p.queryLength;
  const keyRows = p.batch * p.kvHeads * p.keyLength;
  const outputs = queryRows * p.valueDim * Math.max(p.samples, 1);
  const elements = queryRows * p.headDim + keyRows * (p.headDim + p.valueDim) + outputs;
  const mask = p.maskType === 0 ? 0 : p.maskBatch * p.maskHeads * p.maskQueries * p.maskKeys;
  return (elements + mask) * (p.type === 0 ? FLOAT32_BYTES : HALF_BYTES);
}
