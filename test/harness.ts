// Runs one problem on one backend and compares what came back with a reference and its error
// budget.
import assert from 'node:assert';
import {
  type AttentionOptions,
  type AttentionResult,
  attentionForwardSync,
  backendInfo,
  setNumThreads,
  Tensor,
  type TensorLike,
} from '../lib/index';
import { type NamedCase, namedTensors, swapAxes } from './cases';
import { decodeHalves, encodeHalves } from './half';
import {
  type Bounded,
  type ReferenceOptions,
  type ReferenceResult,
  type ReferenceTensor,
  reference,
  type Storage,
} from './reference';

export type Layout = 'bhsd' | 'bshd';

/** One way to compute: a backend by its full name and the number of threads it may use. */
export interface Runner {
  readonly backend: string;
  readonly threads: number;
  readonly name: string;
}

/** The only backend to test, where the variable names one; it has to be there. */
const CHOSEN = process.env.SDPA_TEST_BACKENDS;

/** Every backend that this machine can run, best first, the JavaScript one last. */
export const BACKENDS: readonly string[] = backendInfo()
  .tried.filter((t) => t.ok && (CHOSEN === undefined || t.backend === CHOSEN))
  .map((t) => t.backend);
if (BACKENDS.length === 0) throw new Error(`${CHOSEN} cannot run here`);

export const NATIVE_BACKENDS = BACKENDS.filter((name) => name !== 'js');

const AVX2 = ['avx', 'avx2', 'fma', 'f16c'];
const AVX512 = [...AVX2, 'avx512f', 'avx512dq', 'avx512bw', 'avx512vl'];

/**
 * The backends of an x86-64 binary, best first, with the processor features each asks for (as
 * /proc/cpuinfo spells them) and what the system has to do for it.
 */
export const X64_BACKENDS: readonly { name: string; needs: string[]; system: string[] }[] = [
  {
    name: 'cpu:amx',
    needs: [...AVX512, 'avx512_bf16', 'amx_tile', 'amx_bf16'],
    system: ['os_avx', 'os_avx512', 'os_amx', 'amx_permission'],
  },
  { name: 'cpu:avx512', needs: AVX512, system: ['os_avx', 'os_avx512'] },
  { name: 'cpu:avx2', needs: AVX2, system: ['os_avx'] },
  { name: 'cpu:portable', needs: [], system: [] },
];

/** A backend that no binary for this processor has. */
export const FOREIGN_BACKEND = process.arch === 'arm64' ? 'cpu:avx2' : 'cpu:neon';

/** Every backend, the native ones with each of these thread counts. */
export const RUNNERS: readonly Runner[] = BACKENDS.flatMap((backend) =>
  (isThreaded(backend) ? [1, 2, 5] : [1]).map((threads) => runner(backend, threads)),
);

function isThreaded(backend: string): boolean {
  return backend.startsWith('cpu:');
}

export function runner(backend: string, threads = 1): Runner {
  return { backend, threads, name: isThreaded(backend) ? `${backend} x${threads}` : backend };
}

/** A problem in [batch, heads, length, dim]; the values are representable in `type`. */
export interface Call {
  readonly query: ReferenceTensor;
  readonly key: ReferenceTensor;
  readonly value: ReferenceTensor;
  readonly gradOutput?: ReferenceTensor;
  readonly options: ReferenceOptions;
  readonly type?: Storage;
  readonly maskType?: Storage;
  readonly layout?: Layout;
}

export const EVERY_OUTPUT = ['lse', 'scores', 'weights', 'droppedWeights'] as const;

/** What a run gave, as numbers in [batch, heads, length, dim]. */
export interface Outcome {
  readonly backend: string;
  readonly output: Float64Array;
  readonly lse: Float32Array;
  readonly scores: Float32Array;
  readonly weights: Float32Array;
  readonly droppedWeights: Float32Array;
  readonly gradQuery?: Float64Array;
  readonly gradKey?: Float64Array;
  readonly gradValue?: Float64Array;
  readonly gradAttnMask?: Float64Array;
}

/**
 * Rounds the values of a call to the types it will be stored in, so that the reference sees them.
 */
export function representable(call: Call): Call {
  const { type = 'float32', maskType = 'float32' } = call;
  const { attnMask } = call.options;
  const options = { ...call.options };
  if (attnMask && !(attnMask.data instanceof Uint8Array)) {
    options.attnMask = roundTensor(maskType, attnMask);
  }
  return {
    ...call,
    options,
    query: roundTensor(type, call.query),
    key: roundTensor(type, call.key),
    value: roundTensor(type, call.value),
    ...(call.gradOutput && { gradOutput: roundTensor(type, call.gradOutput) }),
  };
}

function roundTensor(type: Storage, tensor: ReferenceTensor): ReferenceTensor {
  const { data, dims } = tensor;
  if (type === 'float32') return { dims, data: new Float64Array(new Float32Array(data)) };
  return { dims, data: decodeHalves(type, encodeHalves(type, data)) };
}

/** A named case as a call. */
export function namedCall(named: NamedCase): Call {
  return representable({ ...namedTensors(named), options: named.options });
}

/** GPUs have a backward pass for head dims up to this. */
const LARGEST_GPU_BACKWARD = 256;

/** A call as far as a backend can compute it: without the backward pass where it has none. */
export function withinReach(backend: string, call: Call): Call {
  const widest = Math.max(call.query.dims[3], call.value.dims[3]);
  if (!backend.startsWith('cuda') || widest <= LARGEST_GPU_BACKWARD) return call;
  const { gradOutput, ...forwardOnly } = call;
  return forwardOnly;
}

/** The reference's answer to a call. */
export function expected(call: Call): ReferenceResult {
  const { query, key, value, options, type, maskType } = call;
  return reference(query, key, value, options, type, maskType);
}

/** Forward, and backward where the call has a gradient, on exactly the backend of `runner`. */
export function run(runner: Runner, call: Call): Outcome {
  return withThreads(runner.threads, () => {
    const result = forward(runner.backend, call, { outputs: [...EVERY_OUTPUT] });
    const { layout = 'bhsd' } = call;
    const outcome = {
      backend: result.backend,
      output: logical(result.output, layout),
      lse: float32(result.lse!),
      scores: float32(result.scores!),
      weights: float32(result.weights!),
      droppedWeights: float32(result.droppedWeights!),
    };
    if (!call.gradOutput) return outcome;
    const gradOutput = stored(call.gradOutput, call.type, layout);
    const gradients = result.backwardSync(gradOutput);
    for (const [name, tensor] of [
      ['query', gradients.gradQuery],
      ['key', gradients.gradKey],
      ['value', gradients.gradValue],
    ] as const) {
      const { dims } = layout === 'bshd' ? swapAxes(call[name]) : call[name];
      assert.deepEqual([tensor.type, ...tensor.dims], [call.type ?? 'float32', ...dims], name);
    }
    return {
      ...outcome,
      gradQuery: logical(gradients.gradQuery, layout),
      gradKey: logical(gradients.gradKey, layout),
      gradValue: logical(gradients.gradValue, layout),
      ...(gradients.gradAttnMask && { gradAttnMask: numbers(gradients.gradAttnMask) }),
    };
  });
}

/** attentionForwardSync on a named backend, with proof that this backend ran. */
export function forward(
  backend: string,
  call: Call,
  extra: Partial<AttentionOptions> = {},
): AttentionResult {
  const { layout = 'bhsd', type = 'float32' } = call;
  const result = attentionForwardSync(
    stored(call.query, type, layout),
    stored(call.key, type, layout),
    stored(call.value, type, layout),
    { ...publicOptions(call), ...extra, backend: backend as AttentionOptions['backend'] },
  );
  assert.equal(result.backend, backend);
  return result;
}

/** The options of a call as a user of the package writes them. */
export function publicOptions(call: Call): AttentionOptions {
  const { attnMask, keepMask, kvLengths, ...rest } = call.options;
  const dropout = (rest.dropoutP ?? 0) > 0 && rest.training === undefined;
  return {
    ...(rest as AttentionOptions),
    ...(call.query.dims[1] !== call.key.dims[1] && { enableGqa: true }),
    ...(call.layout && { layout: call.layout }),
    ...(dropout && { training: true }),
    ...(attnMask && { attnMask: storedMask(attnMask, call.maskType) }),
    ...(kvLengths && { kvLengths: Int32Array.from(kvLengths) }),
    ...(keepMask && { keepMask: { data: Uint8Array.from(keepMask.data), dims: keepMask.dims } }),
  };
}

function storedMask(mask: ReferenceTensor, type?: Storage): TensorLike {
  if (mask.data instanceof Uint8Array) return { data: mask.data, dims: mask.dims };
  return stored(mask, type, 'bhsd');
}

/** A tensor as the package takes it: encoded, and with its axes in the order of `layout`. */
export function stored(t: ReferenceTensor, type: Storage = 'float32', layout: Layout = 'bhsd') {
  const { data, dims } = layout === 'bshd' ? swapAxes(t) : t;
  if (type === 'float32') return { data: new Float32Array(data), dims };
  return { data: encodeHalves(type, data), dims, type };
}

/** The numbers of a tensor of the package, back in [batch, heads, length, dim]. */
export function logical(tensor: Tensor, layout: Layout = 'bhsd'): Float64Array {
  const data = numbers(tensor);
  return layout === 'bshd' ? swapAxes({ data, dims: tensor.dims }).data : data;
}

/** The numbers of a tensor in their stored order. */
export function numbers(tensor: Tensor): Float64Array {
  assert.ok(tensor instanceof Tensor);
  const { type, data } = tensor;
  if (type === 'float16' || type === 'bfloat16') {
    return decodeHalves(type, data as Uint16Array);
  }
  return new Float64Array(data as Float32Array);
}

function float32(tensor: Tensor): Float32Array {
  assert.ok(tensor.data instanceof Float32Array);
  return tensor.data;
}

/** Runs `work` with a number of threads and puts the old number back. */
export function withThreads<T>(threads: number, work: () => T): T {
  const before = backendInfo().threads;
  setNumThreads(threads);
  try {
    return work();
  } finally {
    setNumThreads(before);
  }
}

/**
 * Every element within its own budget, which is none where float32 overflows on the way; NaN and
 * infinities must be where they are expected.
 */
export function expectBounded(label: string, actual: ArrayLike<number>, expected: Bounded): void {
  const { values, error } = expected;
  assert.equal(actual.length, values.length, `${label}: length`);
  for (let i = 0; i < values.length; i++) {
    if (Object.is(actual[i], values[i]) || Math.abs(actual[i] - values[i]) <= error[i]) continue;
    if (error[i] === Infinity) continue;
    assert.fail(`${label}[${i}] = ${actual[i]}, expected ${values[i]} within ${error[i]}`);
  }
}

/** Every result of a run against the reference. */
export function expectOutcome(call: Call, outcome: Outcome, want = expected(call)): void {
  for (const name of ['output', ...EVERY_OUTPUT] as const) {
    expectBounded(name, outcome[name], want[name]);
  }
  if (!call.gradOutput) return;
  const gradients = want.backward(call.gradOutput.data);
  for (const name of ['gradQuery', 'gradKey', 'gradValue'] as const) {
    expectBounded(name, outcome[name]!, gradients[name]);
  }
  if (gradients.gradAttnMask) {
    expectBounded('gradAttnMask', outcome.gradAttnMask!, gradients.gradAttnMask);
  } else {
    assert.equal(outcome.gradAttnMask, undefined);
  }
}

/** Bit for bit: NaN equals NaN, and -0 differs from 0. */
export function expectSame(label: string, actual: ArrayLike<number>, wanted: ArrayLike<number>) {
  assert.equal(actual.length, wanted.length, `${label}: length`);
  for (let i = 0; i < wanted.length; i++) {
    if (Object.is(actual[i], wanted[i])) continue;
    assert.fail(`${label}[${i}] = ${actual[i]}, not the same as ${wanted[i]}`);
  }
}

/** Every array of two runs, bit for bit. */
export function expectSameOutcome(actual: Outcome, wanted: Outcome): void {
  const names = Object.keys(wanted).filter((name) => name !== 'backend') as (keyof Outcome)[];
  assert.deepEqual(Object.keys(actual), Object.keys(wanted));
  for (const name of names) {
    expectSame(name, actual[name] as Float64Array, wanted[name] as Float64Array);
  }
}
