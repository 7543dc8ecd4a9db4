// What the tests of the CUDA backend share. They run on the emulated plugin: native/cuda/
// emulated_runtime.cpp has the variables that make it fail.
import { expect } from 'vitest';
import { backendInfo, Tensor } from '../../lib/index';

export const DIMS = [1, 2, 9, 8] as const;

/** Numbers without a pattern, another one for each phase. */
export function wave(phase: number, dims: readonly number[] = DIMS): Tensor {
  const length = dims.reduce((a, b) => a * b);
  const data = Float32Array.from({ length }, (_, i) => Math.sin(12.9898 * i + phase));
  return new Tensor('float32', data, dims);
}

/** Query, key, value and the gradient of an output. */
export function waves(dims?: readonly number[]): [Tensor, Tensor, Tensor, Tensor] {
  return [wave(0, dims), wave(1, dims), wave(2, dims), wave(3, dims)];
}

/** Bytes that tensors and calls hold on a GPU. */
export function usedBytes(device = 0): number {
  return backendInfo().gpus[device].usedBytes;
}

export const code = (name: string) => expect.objectContaining({ code: `ERR_SDPA_${name}` });

/** Runs `work` while the emulated runtime's next calls go to a fault, as "7:999". */
export async function withFault<T>(fault: string, work: () => T | Promise<T>): Promise<T> {
  process.env.SDPA_EMULATED_FAULT = fault;
  try {
    return await work();
  } finally {
    delete process.env.SDPA_EMULATED_FAULT;
  }
}
