// The forms of a call that are made of plain calls, and have their bits: samples of dropout, packed
// batches, keys in a cache. (Plain calls are held against the reference in check.ts.)
import assert from 'node:assert';
import {
  type AttendOptions,
  type AttentionOptions,
  attentionForwardSync,
  KVCache,
  KVCachePool,
  type MomentsOptions,
  type Tensor,
} from '../../lib/index';
import { swapAxes, uniform } from '../cases';
import { type Call, expectSame, forward, numbers, publicOptions, stored } from '../harness';
import type { ReferenceOptions, ReferenceTensor } from '../reference';

export const FORMS = ['plain', 'samples', 'packed', 'cache'] as const;
export type Form = (typeof FORMS)[number];

type Backend = AttentionOptions['backend'];

/** Runs a call in a form, with lengths and the like from `seed`; throws where a bit differs. */
export function checkForm(form: Form, backend: string, call: Call, seed: number): void {
  const next = uniform(seed);
  const below = (n: number) => Math.floor(next() * n);
  if (form === 'samples') checkSamples(backend, call, 2 + below(4));
  if (form === 'packed') checkPacked(backend, call, below);
  if (form === 'cache') checkCache(backend, call, below);
}

/** Sample s is the call with offset + s; mean and variance are those of the samples. */
function checkSamples(backend: string, call: Call, samples: number): void {
  const { seed, offset = 0, dropoutPlacement } = call.options;
  const singles = Array.from({ length: samples }, (_, s) => {
    const moved = BigInt.asUintN(64, BigInt(offset) + BigInt(s));
    return forward(backend, call, seed === undefined ? {} : { offset: moved });
  });
  const { output, lse } = forward(backend, call, { samples });
  const label = `${backend}, ${samples} samples`;
  for (const [s, single] of singles.entries()) {
    const ownLse = dropoutPlacement === 'scores';
    expectSame(`${label}: output ${s}`, part(output, s, samples), numbers(single.output));
    const rows = ownLse ? part(lse, s, samples) : numbers(lse);
    expectSame(`${label}: lse ${s}`, rows, numbers(single.lse));
  }
  expectMoments(
    label,
    backend,
    call,
    singles.map((single) => numbers(single.output)),
  );
}

function part(tensor: Tensor, index: number, parts: number): Float64Array {
  const all = numbers(tensor);
  const size = all.length / parts;
  return all.subarray(index * size, (index + 1) * size);
}

/** One rounding to float32 beside the float64 of the running sums. */
function expectMoments(label: string, backend: string, call: Call, outputs: Float64Array[]): void {
  const samples = outputs.length;
  const [query, key, value] = tensors(call);
  const options = { ...publicOptions(call), samples, moments: true, backend } as MomentsOptions;
  const { mean, variance } = attentionForwardSync(query, key, value, options);
  const within = (name: string, i: number, actual: number, wanted: number, error: number) => {
    if (Object.is(actual, wanted) || !Number.isFinite(wanted)) return;
    if (Math.abs(wanted) > 2 ** 126) return; // of huge numbers, squares overflow float32
    const bound = error + 2 ** -24 * Math.abs(wanted) + 2 ** -150;
    const message = `${label}: ${name}[${i}] = ${actual}, not ${wanted}`;
    assert.ok(Math.abs(actual - wanted) <= bound, message);
  };
  for (let i = 0; i < outputs[0].length; i++) {
    const values = outputs.map((output) => output[i]);
    const average = values.reduce((sum, x) => sum + x, 0) / samples;
    const spread = values.reduce((sum, x) => sum + (x - average) ** 2, 0) / (samples - 1);
    const size = Math.max(...values.map(Math.abs));
    const unit = 2 ** -50 * samples;
    within('mean', i, mean.data[i] as number, average, unit * size);
    within('variance', i, variance.data[i] as number, spread, unit * (spread + unit * size * size));
  }
}

function tensors(call: Call) {
  return [call.query, call.key, call.value].map((t) => stored(t, call.type, call.layout));
}

/** The first `length` rows of batch entry `b` of [batch, heads, length, dim]. */
function entry({ data, dims }: ReferenceTensor, b: number, length: number): ReferenceTensor {
  const [, heads, rows, width] = dims;
  const own = new Float64Array(heads * length * width);
  for (let h = 0; h < heads; h++) {
    const from = (b * heads + h) * rows * width;
    for (let i = 0; i < length * width; i++) own[h * length * width + i] = data[from + i];
  }
  return { data: own, dims: [1, heads, length, width] };
}

/** The call of batch entry `b` alone, with these lengths; without what sequences do not have. */
function callOf(call: Call, b: number, queries: number, keys: number): Call {
  const options = sequenceOptions(call.options);
  const { kvLengths, causalOffset } = options;
  return {
    query: entry(call.query, b, queries),
    key: entry(call.key, b, keys),
    value: entry(call.value, b, keys),
    gradOutput: entry(call.gradOutput!, b, queries),
    type: call.type,
    options: {
      ...options,
      batchOffset: (options.batchOffset ?? 0) + b,
      ...(kvLengths && { kvLengths: [Math.min(kvLengths[b], keys)] }),
      ...(Array.isArray(causalOffset) && { causalOffset: causalOffset[b] as number }),
    },
  };
}

function sequenceOptions({ attnMask: _, keepMask, ...options }: ReferenceOptions) {
  return keepMask ? { ...options, dropoutP: 0 } : options;
}

/** Rows of one head after the other, as one array. */
function joined(parts: readonly ReferenceTensor[]): ReferenceTensor {
  const turned = parts.map((t) => swapAxes(t)); // [1, length, heads, width]
  const [, , heads, width] = turned[0].dims;
  const length = turned.reduce((sum, { dims }) => sum + dims[1], 0);
  const data = new Float64Array(length * heads * width);
  let at = 0;
  for (const part of turned) {
    data.set(part.data, at);
    at += part.data.length;
  }
  return { data, dims: [length, heads, width] };
}

/** Running totals from 0. */
function totals(lengths: readonly number[]): Int32Array {
  const starts = new Int32Array(lengths.length + 1);
  lengths.forEach((length, b) => {
    starts[b + 1] = starts[b] + length;
  });
  return starts;
}

/** Sequences one after the other, each with lengths of its own: what each is alone. */
function checkPacked(backend: string, call: Call, below: (n: number) => number): void {
  const [batch, heads, queryLength] = call.query.dims;
  const keyLength = call.key.dims[2];
  // One at least is not empty.
  const lengths = Array.from({ length: batch }, (_, b) =>
    b === 0
      ? [1 + below(queryLength), 1 + below(keyLength)]
      : [below(queryLength + 1), below(keyLength + 1)],
  );
  const calls = lengths.map(([queries, keys], b) => callOf(call, b, queries, keys));
  const packed = (name: 'query' | 'key' | 'value' | 'gradOutput') =>
    stored(joined(calls.map((own) => own[name]!)), call.type);
  const cuSeqlens = {
    query: totals(lengths.map(([queries]) => queries)),
    key: totals(lengths.map(([, keys]) => keys)),
  };
  const options = sequenceOptions(call.options);
  const kvLengths =
    options.kvLengths && lengths.map(([, keys], b) => Math.min(options.kvLengths![b], keys));
  const result = attentionForwardSync(packed('query'), packed('key'), packed('value'), {
    ...publicOptions({
      ...call,
      layout: undefined,
      options: { ...options, ...(kvLengths && { kvLengths }) },
    }),
    ...{ cuSeqlens, backend: backend as Backend, enableGqa: true },
  });
  assert.equal(result.backend, backend);
  const gradients = result.backwardSync(packed('gradOutput'));
  const total = cuSeqlens.query[batch];
  for (const [b, own] of calls.entries()) {
    const [queries, keys] = lengths[b];
    const rows = (tensor: Tensor, starts: Int32Array) => {
      const [, planes, width] = tensor.dims;
      const data = numbers(tensor).slice(
        starts[b] * planes * width,
        starts[b + 1] * planes * width,
      );
      return swapAxes({ data, dims: [1, starts[b + 1] - starts[b], planes, width] }).data;
    };
    const lse = Array.from({ length: heads }, (_, h) =>
      Array.from(
        numbers(result.lse).slice(
          h * total + cuSeqlens.query[b],
          h * total + cuSeqlens.query[b + 1],
        ),
      ),
    ).flat();
    const label = `${backend}, packed sequence ${b} of ${queries} x ${keys}`;
    if (queries * keys === 0) {
      expectSame(`${label}: lse`, lse, new Float64Array(heads * queries).fill(-Infinity));
      continue;
    }
    const alone = forward(backend, own);
    const aloneGradients = alone.backwardSync(stored(own.gradOutput!, own.type));
    expectSame(`${label}: lse`, lse, numbers(alone.lse));
    expectSame(`${label}: output`, rows(result.output, cuSeqlens.query), numbers(alone.output));
    for (const [name, starts] of [
      ['gradQuery', cuSeqlens.query],
      ['gradKey', cuSeqlens.key],
      ['gradValue', cuSeqlens.key],
    ] as const) {
      expectSame(`${label}: ${name}`, rows(gradients[name], starts), numbers(aloneGradients[name]));
    }
  }
}

/** Keys appended in pieces, then all queries: what each sequence is in one piece. */
function checkCache(backend: string, call: Call, below: (n: number) => number): void {
  const [batch, heads, queryLength] = call.query.dims;
  const [, kvHeads, keyLength, headDim] = call.key.dims;
  const valueDim = call.value.dims[3];
  const { type = 'float32' } = call;
  const blockLength = 64 * (1 + below(2));
  const blocks = batch * (Math.ceil(keyLength / blockLength) + 1);
  const pool = new KVCachePool({ blocks, blockLength, kvHeads, headDim, valueDim, type });
  const cache = new KVCache({ batch, pool });
  const lengths = Array.from({ length: batch }, () => below(keyLength + 1));
  const calls = lengths.map((keys, b) => callOf(call, b, queryLength, keys));
  for (const [b, own] of calls.entries()) {
    for (let from = 0; from < lengths[b]; ) {
      const to = Math.min(lengths[b], from + 1 + below(90));
      const piece = (t: ReferenceTensor) => stored(rowsBetween(t, from, to), type);
      cache.append(piece(own.key), piece(own.value), { sequences: [b] });
      from = to;
    }
  }
  const {
    kvLengths: _,
    isCausal = false,
    causalOffset = 0,
    ...rest
  } = sequenceOptions(call.options);
  const dropout = (rest.dropoutP ?? 0) > 0 ? { training: true } : {};
  const options = {
    ...rest,
    ...dropout,
    isCausal,
    causalOffset,
    backend,
    layout: call.layout ?? 'bhsd',
  };
  const { output, lse } = cache.attendSync(
    stored(call.query, type, call.layout),
    options as unknown as AttendOptions,
  );
  const all =
    call.layout === 'bshd'
      ? swapAxes({ data: numbers(output), dims: output.dims }).data
      : numbers(output);
  const rows = heads * queryLength;
  for (const [b, own] of calls.entries()) {
    const got = all.subarray(b * rows * valueDim, (b + 1) * rows * valueDim);
    const gotLse = numbers(lse).subarray(b * rows, (b + 1) * rows);
    const label = `${backend}, cached sequence ${b} of ${lengths[b]}`;
    if (lengths[b] === 0) {
      expectSame(`${label}: lse`, gotLse, new Float64Array(rows).fill(-Infinity));
      expectSame(`${label}: output`, got, new Float64Array(rows * valueDim));
      continue;
    }
    const { kvLengths: __, ...ownOptions } = own.options;
    const alone = forward(backend, { ...own, options: ownOptions });
    expectSame(`${label}: output`, got, numbers(alone.output));
    expectSame(`${label}: lse`, gotLse, numbers(alone.lse));
  }
  cache.dispose();
  pool.dispose();
}

/** Positions `from` to `to` of [1, heads, length, dim]. */
function rowsBetween(t: ReferenceTensor, from: number, to: number): ReferenceTensor {
  const { data, dims } = swapAxes(t);
  const [, , heads, width] = dims;
  const own = (data as Float64Array).slice(from * heads * width, to * heads * width);
  return swapAxes({ data: own, dims: [1, to - from, heads, width] });
}
