// One random problem on every backend: results against the float64 reference, each within its
// error budget; dropped elements bit for bit; and the same bits from another number of threads.
import assert from 'node:assert';
import fc from 'fast-check';
import {
  type AttentionOptions,
  type AttentionOutputName,
  attentionForward,
  attentionForwardSync,
  dropoutMask,
  setNumThreads,
} from '../../lib/index';
import { type Problem, problems, toCall } from '../arbitrary';
import {
  BACKENDS,
  type Call,
  expectBounded,
  expected,
  expectSame,
  logical,
  numbers,
  publicOptions,
  runner,
  stored,
} from '../harness';
import { type Bounded, keepDecisions, type ReferenceResult } from '../reference';
import { checkForm, FORMS, type Form } from './forms';

/** How the operation is called; what it gives must not depend on `threads` and `isAsync`. */
export interface Manner {
  readonly threads: number;
  readonly isAsync: boolean;
  /** Whether each backend computes twice, with other threads. */
  readonly repeats: boolean;
  /** Which matrices are asked for; kernels take other ways where none is. */
  readonly outputs: readonly AttentionOutputName[];
  /** What else the call is made as, on each backend. */
  readonly form: Form;
}

/** A problem and how it is called: plain JSON. */
export interface FuzzCase {
  readonly problem: Problem;
  readonly manner: Manner;
}

export const fuzzCases: fc.Arbitrary<FuzzCase> = fc.record({
  problem: problems,
  manner: fc.record({
    threads: fc.integer({ min: 1, max: 8 }),
    isAsync: fc.boolean(),
    repeats: fc.constantFrom(false, false, true),
    outputs: fc.oneof(
      fc.constant([]),
      fc.subarray<AttentionOutputName>(['scores', 'weights', 'droppedWeights']),
    ),
    form: fc.constantFrom<Form>('plain', 'plain', ...FORMS),
  }),
});

/** Results by name, in [batch, heads, length, dim]. */
export type Results = Record<string, ArrayLike<number>>;

/** Runs a call on exactly the named backend. */
export type Compute = (backend: string, call: Call, manner: Manner) => Promise<Results>;

/** Throws an AssertionError that says what is wrong, if something is. */
export async function check(
  { problem, manner }: FuzzCase,
  backends: readonly string[] = BACKENDS,
  compute: Compute = computeHere,
): Promise<void> {
  const call = toCall(problem);
  const exact = memoized(() => answers(withPrecision(call, undefined), manner));
  // Only AMX is less exact at a lower precision.
  const coarse = call.options.precision
    ? memoized(() => answers(withPrecision(call, call.options.precision), manner))
    : exact;
  if (call.options.dropoutP && !call.options.keepMask) checkMask(problem, exact().keep!);
  for (const backend of backends) {
    const where = `${runner(backend, manner.threads).name}${manner.isAsync ? ', async' : ''}`;
    const got = await compute(backend, call, manner);
    const want = backend === 'cpu:amx' ? coarse() : exact();
    assert.deepEqual(Object.keys(got).sort(), Object.keys(want.bounded).sort(), where);
    for (const [name, bounded] of Object.entries(want.bounded)) {
      expectBounded(`${where}: ${name}`, got[name], settled(bounded));
    }
    expectDropped(where, call, want, got);
    checkForm(manner.form, backend, call, problem.dataSeed);
    if (backend === 'js' || !manner.repeats) continue;
    const other = { ...manner, threads: (manner.threads % 8) + 1, isAsync: !manner.isAsync };
    const again = await compute(backend, call, other);
    for (const name of Object.keys(got)) {
      expectSame(`${where}, then ${other.threads} threads: ${name}`, again[name], got[name]);
    }
  }
}

/** What the reference says of a call. */
function answers(call: Call, { outputs }: Manner) {
  const forward = expected(call);
  const { gradAttnMask, ...gradients } = forward.backward(call.gradOutput!.data);
  const wanted = Object.fromEntries(outputs.map((name) => [name, forward[name]]));
  const bounded = {
    ...{ ...wanted, output: forward.output, lse: forward.lse, ...gradients },
    ...(gradAttnMask && { gradAttnMask }),
  };
  return { bounded, forward, keep: forward.keep };
}

/**
 * What a gradient with infinite terms comes to depends on how they are put together, which is open;
 * that it stays with the rows that see them is not.
 */
function settled({ values, error, touched }: Bounded): Bounded {
  return touched
    ? { values, error: error.map((e, i) => (touched[i] ? Infinity : e)) }
    : { values, error };
}

function memoized<T>(make: () => T): () => T {
  let made: { value: T } | undefined;
  return () => {
    made ??= { value: make() };
    return made.value;
  };
}

function withPrecision(call: Call, precision: Call['options']['precision']): Call {
  return { ...call, options: { ...call.options, precision } };
}

/** What dropoutMask shows is what the specification says. */
function checkMask(problem: Problem, keep: Uint8Array): void {
  const { batch, kvHeads, group, queryLength, keyLength, valueDim } = problem.shape;
  const { dropoutP: p, dropoutPlacement: placement, ...rest } = problem.dropout!;
  const { batchOffset, headOffset, queryOffset, keyOffset } = toCall(problem).options;
  const spec = {
    ...{ p, placement, broadcast: rest.dropoutBroadcast },
    ...{ seed: BigInt(rest.seed), offset: BigInt(rest.offset) },
    ...{ batchOffset, headOffset, queryOffset },
    ...(placement !== 'context' && { keyOffset }),
  };
  const columns = placement === 'context' ? valueDim : keyLength;
  const dims = [batch, kvHeads * group, queryLength, columns] as const;
  const mask = dropoutMask(dims, spec);
  expectSame('dropoutMask', mask, keepDecisions(dims, spec));
  expectSame('dropoutMask, by options', mask, keep);
}

/** Below this, a weight or a channel may have been rounded to 0. */
const VANISHING = 1e-25;

/** A dropped element is exactly 0, and one that is kept is not. */
function expectDropped(
  where: string,
  call: Call,
  { keep, forward }: { keep: Uint8Array | null; forward: ReferenceResult },
  got: Results,
): void {
  const isContext = call.options.dropoutPlacement === 'context';
  const name = isContext ? 'output' : 'droppedWeights';
  const actual = got[name];
  if (!keep || !actual) return;
  const { values, error } = forward[name];
  for (let i = 0; i < keep.length; i++) {
    if (error[i] === Infinity) continue;
    if (!keep[i]) {
      assert.ok(actual[i] === 0, `${where}: ${name}[${i}] = ${actual[i]}, but it is dropped`);
    } else if (!isContext && values[i] > VANISHING && error[i] < values[i] / 2) {
      assert.ok(actual[i] !== 0, `${where}: ${name}[${i}] = 0, but it is kept`);
    }
  }
}

const encodedCalls = new WeakMap<Call, ReturnType<typeof stored>[]>();

/** Query, key, value and the gradient of the output, as the package takes them. */
function encoded(call: Call) {
  const found = encodedCalls.get(call);
  if (found) return found;
  const tensors = [call.query, call.key, call.value, call.gradOutput!];
  const made = tensors.map((t) => stored(t, call.type, call.layout));
  encodedCalls.set(call, made);
  return made;
}

/** Forward and backward by the public functions. */
export const computeHere: Compute = async (backend, call, { threads, isAsync, outputs }) => {
  const { layout } = call;
  const [query, key, value, upstream] = encoded(call);
  const options: AttentionOptions = {
    ...publicOptions(call),
    outputs: [...outputs],
    backend: backend as AttentionOptions['backend'],
  };
  setNumThreads(threads);
  const result = isAsync
    ? await attentionForward(query, key, value, options)
    : attentionForwardSync(query, key, value, options);
  assert.equal(result.backend, backend);
  const gradients = isAsync ? await result.backward(upstream) : result.backwardSync(upstream);
  const results: Results = {
    output: logical(result.output, layout),
    lse: numbers(result.lse),
    gradQuery: logical(gradients.gradQuery, layout),
    gradKey: logical(gradients.gradKey, layout),
    gradValue: logical(gradients.gradValue, layout),
  };
  if (gradients.gradAttnMask) results.gradAttnMask = numbers(gradients.gradAttnMask);
  for (const name of outputs) results[name] = numbers(result[name]!);
  return results;
};
