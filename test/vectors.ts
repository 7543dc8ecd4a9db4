// Reads the stored test vectors (vectors/README.md) into typed arrays.
import { existsSync, readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { decodeHalf } from './half';

export interface VectorTensor {
  dtype: string;
  shape: number[];
  /** The elements as stored: float16 as bit patterns. */
  raw: Float32Array | Uint16Array | Uint8Array | Int32Array;
  /** The elements as numbers. */
  data: Float32Array | Uint8Array | Int32Array;
}

export interface Attributes {
  scale: number | null;
  is_causal: number;
  softcap: number;
  dropout?: { placement: 'weights' | 'context' | 'scores'; p: number } | null;
  q_num_heads?: number | null;
  kv_num_heads?: number | null;
  qk_matmul_output_mode?: number;
}

export interface VectorCase {
  name: string;
  source: string;
  attrs: Attributes;
  tol: { atol: number; rtol: number; exact?: string[] };
  inputs: Record<string, VectorTensor>;
  outputs: Record<string, VectorTensor>;
}

interface Descriptor {
  dtype: string;
  shape: number[];
  file: string;
  offset: number;
}

type StoredCase = Omit<VectorCase, 'inputs' | 'outputs'> & {
  inputs: Record<string, Descriptor>;
  outputs: Record<string, Descriptor>;
};

export interface PhiloxVector {
  rounds: number;
  counter: [number, number, number, number];
  key: [number, number];
  result: [number, number, number, number];
}

const OWN = join(__dirname, 'vectors');

/** The folder of the published ONNX cases, which are not part of this repository. */
export const PUBLISHED = process.env.SDPA_CONFORMANCE
  ? resolve(process.env.SDPA_CONFORMANCE)
  : resolve(__dirname, '../../shared/conformance');

export function torchCases(): VectorCase[] {
  return loadSuite(join(OWN, 'torch'));
}

export function generatedOnnxCases(): VectorCase[] {
  return loadSuite(join(OWN, 'onnx'));
}

/** The cases of the ONNX project itself, or null where their folder does not exist. */
export function publishedOnnxCases(): VectorCase[] | null {
  const folder = join(PUBLISHED, 'onnx');
  if (!existsSync(join(folder, 'cases.json'))) return null;
  return loadSuite(folder).filter((c) => c.source.startsWith('onnx/onnx'));
}

export function philoxVectors(): Record<
  'vectors' | 'vectors_7_rounds' | 'derived',
  PhiloxVector[]
> & {
  stream_checkpoint: { rounds: number; key: [number, number]; index: number; value: number };
} {
  return JSON.parse(readFileSync(join(OWN, 'philox/philox4x32_10.json'), 'utf8'));
}

function loadSuite(folder: string): VectorCase[] {
  const stored: StoredCase[] = JSON.parse(readFileSync(join(folder, 'cases.json'), 'utf8'));
  return stored.map((c) => ({
    ...c,
    inputs: loadTensors(folder, c.inputs),
    outputs: loadTensors(folder, c.outputs),
  }));
}

function loadTensors(folder: string, described: Record<string, Descriptor>) {
  const entries = Object.entries(described);
  return Object.fromEntries(entries.map(([name, d]) => [name, loadTensor(folder, d)]));
}

function loadTensor(folder: string, { dtype, shape, file, offset }: Descriptor): VectorTensor {
  const length = shape.reduce((product, n) => product * n, 1);
  const bytes = readFileSync(join(folder, file));
  const view = <T>(size: number, make: (buffer: ArrayBuffer) => T): T => {
    if (offset + length * size > bytes.length) throw new Error(`${file}: too short`);
    return make(new Uint8Array(bytes.subarray(offset, offset + length * size)).buffer);
  };
  switch (dtype) {
    case 'float32': {
      const data = view(4, (buffer) => new Float32Array(buffer));
      return { dtype, shape, raw: data, data };
    }
    case 'float16': {
      const raw = view(2, (buffer) => new Uint16Array(buffer));
      return { dtype, shape, raw, data: Float32Array.from(raw, (h) => decodeHalf('float16', h)) };
    }
    case 'int32': {
      const data = view(4, (buffer) => new Int32Array(buffer));
      return { dtype, shape, raw: data, data };
    }
    case 'int64': {
      const data = Int32Array.from(
        view(8, (buffer) => new BigInt64Array(buffer)),
        Number,
      );
      return { dtype, shape, raw: data, data };
    }
    case 'bool':
    case 'uint8': {
      const data = view(1, (buffer) => new Uint8Array(buffer));
      return { dtype, shape, raw: data, data };
    }
    default:
      throw new Error(`unknown dtype ${dtype}`);
  }
}
