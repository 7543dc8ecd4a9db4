// Every error path of the public functions: class, code, the argument's name, what was expected and
// what came; synchronous calls throw it, asynchronous ones reject with it, and `out` stays as it
// was.
import { describe, expect, test } from 'vitest';
import {
  type AttentionOptions,
  attentionForward,
  attentionForwardSync,
  dropoutMask,
  Generator,
  KVCache,
  KVCachePool,
  manualSeed,
  mergeAttention,
  scaledDotProductAttention,
  scaledDotProductAttentionSync,
  Tensor,
} from '../lib/index';
import { BACKENDS, FOREIGN_BACKEND } from './harness';

const TYPE = 'ERR_SDPA_INVALID_ARG_TYPE';
const VALUE = 'ERR_SDPA_INVALID_ARG_VALUE';
const SHAPE = 'ERR_SDPA_SHAPE_MISMATCH';
const UNSUPPORTED = 'ERR_SDPA_UNSUPPORTED';
const UNAVAILABLE = 'ERR_SDPA_BACKEND_UNAVAILABLE';
const DISPOSED = 'ERR_SDPA_DISPOSED';

const CLASSES: Record<string, string> = {
  [TYPE]: 'TypeError',
  [VALUE]: 'RangeError',
  [SHAPE]: 'RangeError',
  [UNSUPPORTED]: 'RangeError',
  [UNAVAILABLE]: 'Error',
  [DISPOSED]: 'Error',
  ERR_SDPA_OUT_OF_MEMORY: 'Error',
};

function floats(...dims: number[]) {
  const size = dims.reduce((product, n) => product * n, 1);
  return { data: Float32Array.from({ length: size }, (_, i) => (i % 13) / 13), dims };
}

function bools(...dims: number[]) {
  const size = dims.reduce((product, n) => product * n, 1);
  return { data: new Uint8Array(size).fill(1), dims };
}

/** A tensor's data under another shape. */
function shaped(tensor: { data: Float32Array }, dims: unknown) {
  return { data: tensor.data, dims };
}

/** A tensor's shape with other data. */
function holding(tensor: { dims: number[] }, data: unknown, type?: string) {
  return { data, dims: tensor.dims, ...(type && { type }) };
}

/**
 * The good call: 2 sequences, 4 query heads, 2 key/value heads, 3 queries, 5 keys, dims 8 and 6.
 */
const query = floats(2, 4, 3, 8);
const key = floats(2, 2, 5, 8);
const value = floats(2, 2, 5, 6);
const dropout = { dropoutP: 0.5, training: true };
const GOOD = { enableGqa: true } as const;

const resizable = new (ArrayBuffer as unknown as new (n: number, o: object) => ArrayBuffer)(768, {
  maxByteLength: 4096,
});
const growable = new (
  SharedArrayBuffer as unknown as new (
    n: number,
    o: object,
  ) => SharedArrayBuffer
)(768, { maxByteLength: 4096 });

const { proxy: revoked, revoke } = Proxy.revocable([], {});
revoke();

function detachedArray(length: number) {
  const data = new Float32Array(length);
  structuredClone(data.buffer, { transfer: [data.buffer] });
  return data;
}

function disposedTensor() {
  const tensor = new Tensor('float32', query.data, query.dims);
  tensor.dispose();
  return tensor;
}

/** What replaces the arguments of the good call. */
interface Given {
  query?: unknown;
  key?: unknown;
  value?: unknown;
  options?: unknown;
}

/** A name, what replaces the good arguments, the code, and the message: … stands for any text. */
type Case = [string, Given, string, string];

const ABSURD = {
  query: shaped(query, [2 ** 30, 4, 2 ** 30, 8]),
  key: shaped(key, [2 ** 30, 2, 5, 8]),
  value: shaped(value, [2 ** 30, 2, 5, 6]),
};
const LONG = {
  key: shaped(key, [2, 2, 2 ** 31 - 1, 8]),
  value: shaped(value, [2, 2, 2 ** 31 - 1, 6]),
};

const TENSORS: Case[] = [
  ['query undefined', { query: undefined }, TYPE, 'query … expected … got undefined'],
  ['query null', { query: null }, TYPE, 'query … got null'],
  ['query a typed array', { query: query.data }, TYPE, 'query'],
  ['key a number', { key: 3 }, TYPE, 'key … got 3'],
  ['value a string', { value: 'abc' }, TYPE, 'value … got "abc"'],
  ['value a long string', { value: 'abc'.repeat(99) }, TYPE, 'value … ...'],
  ['query a symbol', { query: Symbol('q') }, TYPE, 'query … got a symbol'],
  ['query a function', { query: () => query }, TYPE, 'query … got a function'],
  ['query a bigint', { query: 5n }, TYPE, 'query … got 5n'],
  ['query an array', { query: [1, 2, 3, 4, 5, 6, 7, 8, 9] }, TYPE, 'query'],
  ['data a revoked proxy', { query: holding(query, revoked) }, TYPE, 'query.data … an object'],
  ['data an object without a name', { query: holding(query, {}) }, TYPE, 'query.data … an object'],
  [
    'value of another type',
    { value: holding(value, new Uint16Array(120), 'bfloat16') },
    TYPE,
    'value … bfloat16',
  ],
  ['data an array', { query: holding(query, [1]) }, TYPE, 'query.data … Float32Array'],
  ['data missing', { key: { dims: key.dims } }, TYPE, 'key.data … got undefined'],
  [
    'data a Float64Array',
    { value: holding(value, new Float64Array(120)) },
    TYPE,
    'value.data … got Float64Array(120)',
  ],
  ['data an Int8Array', { query: holding(query, new Int8Array(192)) }, TYPE, 'query.data'],
  [
    'data a DataView',
    { query: holding(query, new DataView(new ArrayBuffer(8))) },
    TYPE,
    'query.data',
  ],
  ['dims missing', { query: { data: query.data } }, TYPE, 'query.dims … got undefined'],
  ['dims a string', { query: shaped(query, '2,4,3,8') }, TYPE, 'query.dims'],
  ['a size of 0', { query: shaped(query, [2, 4, 0, 8]) }, VALUE, 'query.dims[2] … got 0'],
  ['a negative size', { key: shaped(key, [2, -2, 5, 8]) }, VALUE, 'key.dims[1] … got -2'],
  ['a fraction', { key: shaped(key, [2, 2, 5.5, 8]) }, VALUE, 'key.dims[2] … got 5.5'],
  ['NaN', { value: shaped(value, [2, 2, Number.NaN, 6]) }, VALUE, 'value.dims[2] … NaN'],
  ['2^31 keys', { key: shaped(key, [2, 2, 2 ** 31, 8]) }, VALUE, 'key.dims[2] … 2147483647'],
  ['a size as text', { query: shaped(query, [2, 4, '3', 8]) }, TYPE, 'query.dims[2] … got "3"'],
  ['a rank of 3', { query: floats(4, 3, 8) }, SHAPE, 'query … [4, 3, 8]'],
  [
    'a rank of 3 in the other layout',
    { query: floats(3, 4, 8), options: { layout: 'bshd' } },
    SHAPE,
    'query … [batch, length, heads, dim] … [3, 4, 8]',
  ],
  [
    'another head dim in the other layout',
    { query: floats(2, 3, 4, 7), options: { layout: 'bshd' } },
    SHAPE,
    'key: expected [2, Lk, Hkv, 7] … got [2, 2, 5, 8]',
  ],
  ['a rank of 5', { value: floats(1, 2, 2, 5, 6) }, SHAPE, 'value … [1, 2, 2, 5, 6]'],
  ['a scalar', { key: floats() }, SHAPE, 'key … []'],
  [
    'too few elements',
    { query: holding(query, new Float32Array(100)) },
    SHAPE,
    'query.data … 192 … 100',
  ],
  [
    'too many elements',
    { value: holding(value, new Float32Array(121)) },
    SHAPE,
    'value.data … 120 … 121',
  ],
  ['sizes whose product is absurd', ABSURD, VALUE, 'query … 2^53 - 1 elements'],
  ['2^31 - 1 keys in a small array', LONG, SHAPE, 'key.data … 68719476704 … 160'],
  [
    'another batch',
    { key: floats(3, 2, 5, 8) },
    SHAPE,
    'key: expected [2, … to match query [2, 4, 3, 8] … got [3, 2, 5, 8]',
  ],
  [
    'another head dim',
    { key: floats(2, 2, 5, 7) },
    SHAPE,
    'key: expected [2, … , 8] … got [2, 2, 5, 7]',
  ],
  [
    'heads that do not divide',
    { key: floats(2, 3, 5, 8), value: floats(2, 3, 5, 6) },
    SHAPE,
    'key … 4 … 3',
  ],
  [
    'more key than query heads',
    { key: floats(2, 8, 5, 8), value: floats(2, 8, 5, 6) },
    SHAPE,
    'key',
  ],
  [
    'values of another length',
    { value: floats(2, 2, 4, 6) },
    SHAPE,
    'value: expected [2, 2, 5, … got [2, 2, 4, 6]',
  ],
  [
    'values of other heads',
    { value: floats(2, 1, 5, 6) },
    SHAPE,
    'value: expected [2, 2, 5, … got [2, 1, 5, 6]',
  ],
  [
    'a head dim of 513',
    { query: floats(1, 1, 1, 513), key: floats(1, 1, 1, 513), value: floats(1, 1, 1, 1) },
    UNSUPPORTED,
    '512 … 513',
  ],
  [
    'a value dim of 513',
    { query: floats(1, 1, 1, 1), key: floats(1, 1, 1, 1), value: floats(1, 1, 1, 513) },
    UNSUPPORTED,
    '512 … 513',
  ],
  [
    'a Uint16Array without a type',
    { query: holding(query, new Uint16Array(192)) },
    TYPE,
    'query.type … "float16" or "bfloat16"',
  ],
  ['booleans', { query: bools(2, 4, 3, 8) }, TYPE, 'query … bool'],
  [
    'types that differ',
    { key: holding(key, new Uint16Array(160), 'float16') },
    TYPE,
    'key … float32 … float16',
  ],
  ['an unknown type', { query: { ...query, type: 'float64' } }, VALUE, 'query.type … float64'],
  [
    'a type that its data is not of',
    { query: { ...query, type: 'float16' } },
    TYPE,
    'query.data … Uint16Array',
  ],
  [
    'a resizable buffer',
    { query: holding(query, new Float32Array(resizable)) },
    TYPE,
    'query.data … resizable',
  ],
  [
    'a growable buffer',
    { query: holding(query, new Float32Array(growable)) },
    TYPE,
    'query.data … growable',
  ],
  ['a detached buffer', { key: holding(key, detachedArray(160)) }, TYPE, 'key.data … detached'],
  ['a disposed tensor', { query: disposedTensor() }, DISPOSED, 'dispose'],
];

const option = (options: unknown) => ({ options });

const OPTIONS: Case[] = [
  ['options null', option(null), TYPE, 'options … got null'],
  ['options a number', option(3), TYPE, 'options … got 3'],
  ['options an array', option([]), TYPE, 'options'],
  ['options a class instance', option(new Map()), TYPE, 'options … Map'],
  [
    'a misspelled option',
    option({ isCausual: true }),
    TYPE,
    '"isCausual" … did you mean "isCausal"',
  ],
  [
    'an option in snake case',
    option({ dropout_p: 0.1 }),
    TYPE,
    '"dropout_p" … did you mean "dropoutP"',
  ],
  ['an unknown option', option({ alibiSlopes: [] }), TYPE, '"alibiSlopes"'],
  ['isCausal a number', option({ isCausal: 1 }), TYPE, 'isCausal … a boolean … got 1'],
  ['causalOffset a fraction', option({ causalOffset: 0.5 }), VALUE, 'causalOffset … got 0.5'],
  ['causalOffset NaN', option({ causalOffset: Number.NaN }), VALUE, 'causalOffset … got NaN'],
  ['causalOffset 2^32', option({ causalOffset: 2 ** 32 }), VALUE, 'causalOffset'],
  [
    'causalOffset another word',
    option({ causalOffset: 'top-left' }),
    VALUE,
    'causalOffset … "bottom-right"',
  ],
  ['causalOffset an object', option({ causalOffset: {} }), TYPE, 'causalOffset'],
  [
    'causalOffset for another batch',
    option({ causalOffset: [1, 2, 3] }),
    SHAPE,
    'causalOffset … 2 … 3',
  ],
  [
    'causalOffset with a text',
    option({ causalOffset: [1, '2'] }),
    TYPE,
    'causalOffset[1] … got "2"',
  ],
  [
    'causalOffset with a fraction',
    option({ causalOffset: [1.5, 2] }),
    VALUE,
    'causalOffset[0] … got 1.5',
  ],
  ['windowSize a number', option({ windowSize: 3 }), TYPE, 'windowSize … got 3'],
  ['windowSize of one', option({ windowSize: [3] }), VALUE, 'windowSize … 3'],
  ['windowSize with -2', option({ windowSize: [-2, 3] }), VALUE, 'windowSize[0] … got -2'],
  ['windowSize with NaN', option({ windowSize: [1, Number.NaN] }), VALUE, 'windowSize[1] … NaN'],
  ['windowSize with a text', option({ windowSize: [1, 'a'] }), TYPE, 'windowSize[1] … "a"'],
  ['kvLengths an array', option({ kvLengths: [5, 5] }), TYPE, 'kvLengths … Int32Array'],
  ['kvLengths for another batch', option({ kvLengths: Int32Array.of(5) }), SHAPE, 'kvLengths … 2'],
  [
    'kvLengths beyond the keys',
    option({ kvLengths: Int32Array.of(5, 6) }),
    VALUE,
    'kvLengths[1] … 5 … got 6',
  ],
  [
    'kvLengths negative',
    option({ kvLengths: Int32Array.of(-1, 5) }),
    VALUE,
    'kvLengths[0] … got -1',
  ],
  ['scale NaN', option({ scale: Number.NaN }), VALUE, 'scale … got NaN'],
  ['scale infinite', option({ scale: Infinity }), VALUE, 'scale … got Infinity'],
  ['scale a text', option({ scale: '0.1' }), TYPE, 'scale … got "0.1"'],
  ['softcap negative', option({ softcap: -1 }), VALUE, 'softcap … got -1'],
  ['softcap too small for float32', option({ softcap: 1e-50 }), VALUE, 'softcap … got 1e-50'],
  ['softcap NaN', option({ softcap: Number.NaN }), VALUE, 'softcap … got NaN'],
  ['softcap a boolean', option({ softcap: true }), TYPE, 'softcap … got true'],
  ['enableGqa false with fewer key heads', option({ enableGqa: false }), SHAPE, 'enableGqa'],
  ['enableGqa a text', option({ enableGqa: 'yes' }), TYPE, 'enableGqa'],
  ['layout another word', option({ layout: 'bhds' }), VALUE, 'layout … "bhsd" … got "bhds"'],
  ['layout a number', option({ layout: 1 }), TYPE, 'layout … got 1'],
  ['layout bshd with shapes of bhsd', option({ layout: 'bshd' }), SHAPE, 'key'],
  [
    'precision another word',
    option({ precision: 'higher' }),
    VALUE,
    'precision … "highest" … got "higher"',
  ],
  ['backend another word', option({ backend: 'gpu' }), VALUE, 'backend … got "gpu"'],
  ['backend a number', option({ backend: 1 }), TYPE, 'backend … got 1'],
  ['backend without a build', option({ backend: 'cuda' }), UNAVAILABLE, 'cuda'],
  [
    'backend of another processor',
    option({ backend: FOREIGN_BACKEND }),
    UNAVAILABLE,
    FOREIGN_BACKEND,
  ],
  ['signal an object', option({ signal: {} }), TYPE, 'signal … AbortSignal'],
];

const halves = {
  query: holding(query, new Uint16Array(192), 'float16'),
  key: holding(key, new Uint16Array(160), 'float16'),
  value: holding(value, new Uint16Array(120), 'float16'),
};

const MASKS: Case[] = [
  ['attnMask a number', option({ attnMask: 1 }), TYPE, 'attnMask … got 1'],
  ['attnMask a typed array', option({ attnMask: new Uint8Array(15) }), TYPE, 'attnMask'],
  [
    'attnMask of numbers of 64 bits',
    option({ attnMask: { data: new Float64Array(15), dims: [3, 5] } }),
    TYPE,
    'attnMask.data',
  ],
  [
    'attnMask of another length',
    option({ attnMask: bools(3, 4) }),
    SHAPE,
    'attnMask … [2, 4, 3, 5] … [3, 4]',
  ],
  [
    'attnMask of other heads',
    option({ attnMask: floats(2, 2, 3, 5) }),
    SHAPE,
    'attnMask … [2, 2, 3, 5]',
  ],
  ['attnMask of rank 5', option({ attnMask: bools(1, 1, 1, 3, 5) }), SHAPE, 'attnMask'],
  [
    'attnMask with too few elements',
    option({ attnMask: { data: new Uint8Array(7), dims: [3, 5] } }),
    SHAPE,
    'attnMask.data … 15 … 7',
  ],
  [
    'attnMask of a third type',
    option({ attnMask: { data: new Uint16Array(15), dims: [3, 5], type: 'float16' } }),
    TYPE,
    'attnMask … float16',
  ],
  [
    'attnMask of another 16-bit type',
    {
      ...halves,
      options: { attnMask: holding({ dims: [3, 5] }, new Uint16Array(15), 'bfloat16') },
    },
    TYPE,
    'attnMask … float16 … bfloat16',
  ],
  [
    'attnMask detached',
    option({ attnMask: { data: detachedArray(15), dims: [3, 5] } }),
    TYPE,
    'attnMask.data … detached',
  ],
  [
    'keepMask without dropout',
    option({ keepMask: bools(2, 4, 3, 5) }),
    VALUE,
    'keepMask … dropoutP',
  ],
  [
    'keepMask of floats',
    option({ ...dropout, keepMask: floats(2, 4, 3, 5) }),
    TYPE,
    'keepMask … Uint8Array',
  ],
  [
    'keepMask that broadcasts',
    option({ ...dropout, keepMask: bools(1, 1, 3, 5) }),
    SHAPE,
    'keepMask … [2, 4, 3, 5] … [1, 1, 3, 5]',
  ],
  [
    'keepMask of scores for context',
    option({ ...dropout, dropoutPlacement: 'context', keepMask: bools(2, 4, 3, 5) }),
    SHAPE,
    'keepMask … [2, 4, 3, 6]',
  ],
  [
    'keepMask and a seed',
    option({ ...dropout, keepMask: bools(2, 4, 3, 5), seed: 1 }),
    VALUE,
    'seed … keepMask',
  ],
  [
    'keepMask and an offset',
    option({ ...dropout, keepMask: bools(2, 4, 3, 5), offset: 1 }),
    VALUE,
    'offset … keepMask',
  ],
  [
    'keepMask and a generator',
    option({ ...dropout, keepMask: bools(2, 4, 3, 5), generator: new Generator() }),
    VALUE,
    'generator … keepMask',
  ],
  [
    'keepMask and a broadcast',
    option({ ...dropout, keepMask: bools(2, 4, 3, 5), dropoutBroadcast: ['head'] }),
    VALUE,
    'dropoutBroadcast … keepMask',
  ],
];

const DROPOUT: Case[] = [
  ['dropoutP without training', option({ dropoutP: 0.1 }), TYPE, 'training … dropoutP'],
  ['dropoutP NaN', option({ dropoutP: Number.NaN, training: true }), VALUE, 'dropoutP … got NaN'],
  [
    'dropoutP NaN, not training',
    option({ dropoutP: Number.NaN, training: false }),
    VALUE,
    'dropoutP … got NaN',
  ],
  ['dropoutP negative', option({ dropoutP: -0.1, training: true }), VALUE, 'dropoutP … got -0.1'],
  ['dropoutP above 1', option({ dropoutP: 1.1, training: true }), VALUE, 'dropoutP … got 1.1'],
  ['dropoutP a text', option({ dropoutP: '0.1', training: true }), TYPE, 'dropoutP … got "0.1"'],
  [
    'training a number',
    option({ dropoutP: 0.1, training: 1 }),
    TYPE,
    'training … a boolean … got 1',
  ],
  [
    'dropoutPlacement another word',
    option({ ...dropout, dropoutPlacement: 'score' }),
    VALUE,
    'dropoutPlacement … did you mean "scores"',
  ],
  [
    'dropoutPlacement a number',
    option({ ...dropout, dropoutPlacement: 1 }),
    TYPE,
    'dropoutPlacement',
  ],
  [
    'dropoutBroadcast a word',
    option({ ...dropout, dropoutBroadcast: 'head' }),
    TYPE,
    'dropoutBroadcast … array',
  ],
  [
    'dropoutBroadcast with another word',
    option({ ...dropout, dropoutBroadcast: ['heads'] }),
    VALUE,
    'dropoutBroadcast[0] … did you mean "head"',
  ],
  [
    'dropoutBroadcast over keys',
    option({ ...dropout, dropoutBroadcast: ['head', 'key'] }),
    VALUE,
    'dropoutBroadcast[1] … got "key"',
  ],
  ['seed negative', option({ ...dropout, seed: -1 }), VALUE, 'seed … got -1'],
  ['seed a fraction', option({ ...dropout, seed: 1.5 }), VALUE, 'seed … got 1.5'],
  ['seed beyond safe integers', option({ ...dropout, seed: 2 ** 53 }), VALUE, 'seed'],
  [
    'seed of 65 bits',
    option({ ...dropout, seed: 2n ** 64n }),
    VALUE,
    'seed … 18446744073709551616n',
  ],
  ['seed NaN', option({ ...dropout, seed: Number.NaN }), VALUE, 'seed … got NaN'],
  ['seed a text', option({ ...dropout, seed: '1' }), TYPE, 'seed … got "1"'],
  ['offset negative', option({ ...dropout, seed: 1, offset: -1n }), VALUE, 'offset … got -1n'],
  ['offset without a seed', option({ ...dropout, offset: 3 }), VALUE, 'offset … seed'],
  ['offset a boolean', option({ ...dropout, seed: 1, offset: true }), TYPE, 'offset … got true'],
  ['generator an object', option({ ...dropout, generator: {} }), TYPE, 'generator … a Generator'],
  [
    'generator and seed',
    option({ ...dropout, generator: new Generator(), seed: 1 }),
    VALUE,
    'seed … generator',
  ],
  [
    'generator and offset',
    option({ ...dropout, generator: new Generator(), offset: 1 }),
    VALUE,
    'offset … generator',
  ],
  ['batchOffset negative', option({ batchOffset: -1 }), VALUE, 'batchOffset … got -1'],
  ['headOffset a fraction', option({ headOffset: 0.5 }), VALUE, 'headOffset … got 0.5'],
  ['queryOffset a text', option({ queryOffset: '1' }), TYPE, 'queryOffset … got "1"'],
  ['keyOffset beyond 32 bits', option({ keyOffset: 2 ** 32 }), VALUE, 'keyOffset'],
  [
    'keyOffset whose last key is beyond 32 bits',
    option({ keyOffset: 2 ** 32 - 4 }),
    VALUE,
    'keyOffset',
  ],
];

const overlapping = new Tensor('float32', query.data, query.dims);
const OUT: Case[] = [
  ['out an object', option({ out: { ...floats(2, 4, 3, 6) } }), TYPE, 'out … a Tensor'],
  [
    'out of another shape',
    option({ out: new Tensor('float32', new Float32Array(192), [2, 4, 3, 8]) }),
    SHAPE,
    'out … [2, 4, 3, 6] … [2, 4, 3, 8]',
  ],
  [
    'out of another type',
    option({ out: new Tensor('float16', new Uint16Array(144), [2, 4, 3, 6]) }),
    TYPE,
    'out … float32 … float16',
  ],
  [
    'out that is query',
    {
      query: overlapping,
      key: floats(2, 2, 5, 8),
      value: floats(2, 2, 5, 8),
      options: { out: overlapping },
    },
    VALUE,
    'out … query',
  ],
  ['out that is the mask', maskAsOut(), VALUE, 'out … attnMask'],
  ['out that shares its memory with value', sharedValue(), VALUE, 'out … value'],
];

function maskAsOut() {
  const both = new Tensor('float32', new Float32Array(120), [2, 4, 3, 5]);
  return { value: floats(2, 2, 5, 5), options: { attnMask: both, out: both } };
}

function sharedValue() {
  const out = new Tensor('float32', new Float32Array(144), [2, 4, 3, 6]);
  const data = (out.data as Float32Array).subarray(24);
  return { value: { data, dims: value.dims }, options: { out } };
}

const PACKED = { query: floats(6, 4, 8), key: floats(10, 2, 8), value: floats(10, 2, 6) };
const STARTS = { query: Int32Array.of(0, 3, 6), key: Int32Array.of(0, 5, 10) };

/** A packed batch with other starts, and more options. */
function packed(cuSeqlens: unknown, more: object = {}, tensors: object = {}) {
  return { ...PACKED, ...tensors, options: { cuSeqlens, ...more } };
}

const PACKING: Case[] = [
  ['cuSeqlens an array', packed([0, 3, 6]), TYPE, 'cuSeqlens … a plain object'],
  ['cuSeqlens null', packed(null), TYPE, 'cuSeqlens … got null'],
  [
    'a misspelled name in it',
    packed({ query: STARTS.query, kye: STARTS.key }),
    TYPE,
    'cuSeqlens … "kye" … did you mean "key"',
  ],
  ['no key', packed({ query: STARTS.query }), TYPE, 'cuSeqlens.key … got undefined'],
  ['starts an array', packed({ ...STARTS, query: [0, 6] }), TYPE, 'cuSeqlens.query … Int32Array'],
  [
    'one start',
    packed({ ...STARTS, key: Int32Array.of(0) }),
    SHAPE,
    'cuSeqlens.key … B + 1 … got 1',
  ],
  [
    'starts that do not begin at 0',
    packed({ ...STARTS, query: Int32Array.of(1, 3, 6) }),
    VALUE,
    'cuSeqlens.query[0] … 0 … got 1',
  ],
  [
    'starts that fall',
    packed({ ...STARTS, query: Int32Array.of(0, 7, 6) }),
    VALUE,
    'cuSeqlens.query[2] … 7 or more … got 6',
  ],
  [
    'another total',
    packed({ ...STARTS, key: Int32Array.of(0, 5, 11) }),
    SHAPE,
    'cuSeqlens.key[2] … 10 … got 11',
  ],
  [
    'two numbers of sequences',
    packed({ ...STARTS, key: Int32Array.of(0, 10) }),
    SHAPE,
    'cuSeqlens.key … 3 … got 2',
  ],
  ['query of rank 4', packed(STARTS, {}, { query }), SHAPE, 'query … 3 axes … [2, 4, 3, 8]'],
  ['value of rank 2', packed(STARTS, {}, { value: floats(10, 6) }), SHAPE, 'value … [10, 6]'],
  [
    'another head dim of a packed key',
    packed(STARTS, {}, { key: floats(10, 2, 7) }),
    SHAPE,
    'key: expected [totalK, Hkv, 8] to match query [6, 4, 8], got [10, 2, 7]',
  ],
  [
    'packed heads that differ',
    packed(STARTS, { enableGqa: false }),
    SHAPE,
    'key: expected [totalK, 4, 8] … got [10, 2, 8]; heads may differ only with enableGqa',
  ],
  [
    'packed heads that do not divide',
    packed(STARTS, {}, { key: floats(10, 3, 8), value: floats(10, 3, 6) }),
    SHAPE,
    'key … 4 … 3',
  ],
  [
    'another total of value',
    packed(STARTS, {}, { value: floats(9, 2, 6) }),
    SHAPE,
    'value: expected [10, 2, Dv] to match key [10, 2, 8], got [9, 2, 6]',
  ],
  [
    'a packed head dim of 513',
    packed(STARTS, {}, { query: floats(6, 4, 513), key: floats(10, 2, 513) }),
    UNSUPPORTED,
    'query … 512 … [6, 4, 513]',
  ],
  ['layout bhsd', packed(STARTS, { layout: 'bhsd' }), VALUE, 'layout … cuSeqlens'],
  ['a mask', packed(STARTS, { attnMask: bools(5) }), UNSUPPORTED, 'attnMask … cuSeqlens'],
  [
    'a keepMask',
    packed(STARTS, { ...dropout, keepMask: bools(2, 4, 3, 5) }),
    UNSUPPORTED,
    'keepMask … cuSeqlens',
  ],
  ['samples of a packed batch', packed(STARTS, { samples: 3 }), UNSUPPORTED, 'samples … cuSeqlens'],
  [
    'kvLengths beyond a sequence',
    packed({ ...STARTS, key: Int32Array.of(0, 2, 10) }, { kvLengths: Int32Array.of(3, 1) }),
    VALUE,
    'kvLengths[0] … 0 to 2 … got 3',
  ],
  [
    'kvLengths of another batch',
    packed(STARTS, { kvLengths: Int32Array.of(3) }),
    SHAPE,
    'kvLengths … 2 … got 1',
  ],
  [
    'too few packed elements',
    packed(STARTS, {}, { query: { data: new Float32Array(7), dims: [6, 4, 8] } }),
    SHAPE,
    'query.data … 192 … 7',
  ],
];

const FORWARD_ONLY: Case[] = [
  [
    'weights of a packed batch',
    packed(STARTS, { outputs: ['weights'] }),
    UNSUPPORTED,
    'outputs … cuSeqlens',
  ],
  ['outputs a word', option({ outputs: 'weights' }), TYPE, 'outputs … array'],
  [
    'outputs with another word',
    option({ outputs: ['weight'] }),
    VALUE,
    'outputs[0] … did you mean "weights"',
  ],
  ['outputs with a number', option({ outputs: ['lse', 3] }), TYPE, 'outputs[1] … got 3'],
];

/** What samples and their moments do not take. */
const SAMPLES: Case[] = [
  ['samples 0', option({ ...dropout, samples: 0 }), VALUE, 'samples … from 1 to … got 0'],
  ['samples negative', option({ ...dropout, samples: -2 }), VALUE, 'samples … got -2'],
  ['samples a fraction', option({ ...dropout, samples: 1.5 }), VALUE, 'samples … got 1.5'],
  ['samples NaN', option({ ...dropout, samples: Number.NaN }), VALUE, 'samples … got NaN'],
  ['samples a text', option({ ...dropout, samples: '3' }), TYPE, 'samples … got "3"'],
  ['2^31 samples', option({ ...dropout, samples: 2 ** 31 }), VALUE, 'samples … 2147483647'],
  ['moments a number', option({ ...dropout, samples: 3, moments: 1 }), TYPE, 'moments … got 1'],
  ['moments without samples', option({ ...dropout, moments: true }), TYPE, 'samples … moments'],
  [
    'an output without the axis of samples',
    option({
      ...dropout,
      samples: 2,
      out: new Tensor('float32', new Float32Array(144), [2, 4, 3, 6]),
    }),
    SHAPE,
    'out: expected [2, 2, 4, 3, 6], got [2, 4, 3, 6]',
  ],
];

/** Those that only attentionForward can tell. */
const MOMENTS: Case[] = [
  [
    'one sample has no variance',
    option({ ...dropout, samples: 1, moments: true }),
    VALUE,
    'samples … at least 2 … got 1',
  ],
  [
    'moments give no output',
    option({
      ...{ ...dropout, samples: 2, moments: true },
      out: new Tensor('float32', new Float32Array(144), [2, 4, 3, 6]),
    }),
    VALUE,
    'out … none … moments',
  ],
  [
    'matrices of samples',
    option({ ...dropout, samples: 2, outputs: ['lse', 'weights'] }),
    UNSUPPORTED,
    'outputs … samples … ["lse", "weights"]',
  ],
];

/** The arguments of a case; its options are on top of those that the good call has. */
function argumentsOf(given: Given, more: AttentionOptions = {}) {
  const { options } = given;
  const isPlain = options === undefined || Object.getPrototypeOf(options ?? 0) === Object.prototype;
  const merged = isPlain ? { ...GOOD, ...more, ...(options as object | undefined) } : options;
  const args = { query, key, value, ...given } as Record<string, unknown>;
  return [args.query, args.key, args.value, merged] as Parameters<typeof attentionForward>;
}

/** The arguments with an `out` that any write would show: the case's own where it brings one. */
function withOut(given: Given) {
  const own = (given.options as AttentionOptions | undefined)?.out;
  const fresh = new Tensor('float32', new Float32Array(144).fill(7), [2, 4, 3, 6]);
  const out = own instanceof Tensor ? own : fresh;
  const before = out.data.slice();
  return {
    args: argumentsOf(given, { out }),
    expectUntouched: () => expect(out.data).toEqual(before),
  };
}

/** A pattern of texts that must follow each other. */
function inOrder(pattern: string): RegExp {
  const literal = (text: string) => text.trim().replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
  return new RegExp(pattern.split('…').map(literal).join('.*'));
}

function check(error: unknown, code: string, pattern: string) {
  expect(error).toBeInstanceOf(Error);
  const { name, message, code: got } = error as Error & { code: string };
  expect(got, message).toBe(code);
  expect(name).toBe(CLASSES[got]);
  expect(message).toMatch(inOrder(pattern));
}

function thrownBy(work: () => unknown): unknown {
  try {
    work();
  } catch (error) {
    return error;
  }
  return expect.fail('nothing was thrown');
}

describe('the good call is good', () => {
  test.each(BACKENDS)('%s', (backend) => {
    const output = scaledDotProductAttentionSync(query, key, value, {
      ...{ ...GOOD, ...dropout },
      backend: backend as AttentionOptions['backend'],
    });
    expect(output.dims).toEqual([2, 4, 3, 6]);
  });

  test.each(['highest', 'high', 'medium'] as const)('with precision %s', (precision) => {
    const output = scaledDotProductAttentionSync(query, key, value, { ...GOOD, precision });
    expect(output.dims).toEqual([2, 4, 3, 6]);
  });
});

describe.each([
  ['tensors', TENSORS],
  ['options', OPTIONS],
  ['masks', MASKS],
  ['dropout', DROPOUT],
  ['packed batches', PACKING],
  ['out', OUT],
  ['samples', SAMPLES],
])('%s', (_, cases) => {
  test.each(cases)('%s', async (_, given, code, message) => {
    for (const compute of [scaledDotProductAttentionSync, attentionForwardSync]) {
      const { args, expectUntouched } = withOut(given);
      check(
        thrownBy(() => compute(...args)),
        code,
        message,
      );
      expectUntouched();
    }
    for (const compute of [scaledDotProductAttention, attentionForward]) {
      const { args, expectUntouched } = withOut(given);
      const promise: Promise<unknown> = compute(...args);
      expect(promise).toBeInstanceOf(Promise);
      const error = await promise.then(
        () => null,
        (reason) => reason,
      );
      check(error, code, message);
      expectUntouched();
    }
  });
});

describe('outputs of attentionForward', () => {
  test.each([...FORWARD_ONLY, ...MOMENTS])('%s', async (_, given, code, message) => {
    check(
      thrownBy(() => attentionForwardSync(...argumentsOf(given))),
      code,
      message,
    );
    const error = await attentionForward(...argumentsOf(given)).catch((reason) => reason);
    check(error, code, message);
  });

  test('are an unknown option of scaledDotProductAttention, or ignored nowhere', () => {
    const options = { ...GOOD, outputs: ['weights'] } as AttentionOptions;
    const error = thrownBy(() => scaledDotProductAttentionSync(query, key, value, options));
    check(error, TYPE, 'outputs');
  });
});

test('an [Lq, Lk] output that no array can hold is out of memory at once', async () => {
  const long = floats(1, 1, 2 ** 20, 1);
  const options = { outputs: ['weights'] } as const;
  const compute = () => attentionForwardSync(long, long, long, { outputs: [...options.outputs] });
  check(thrownBy(compute), 'ERR_SDPA_OUT_OF_MEMORY', 'memory');
});

describe('samples', () => {
  const options: AttentionOptions = { ...GOOD, ...dropout, seed: 1, samples: 2 };

  test('have no backward', async () => {
    const { output, backward, backwardSync } = attentionForwardSync(query, key, value, options);
    const message = 'backward … samples … without samples … got samples: 2';
    check(
      thrownBy(() => backwardSync(output)),
      UNSUPPORTED,
      message,
    );
    check(await backward(output).catch((reason: unknown) => reason), UNSUPPORTED, message);
  });

  test('scaledDotProductAttention has no moments to return', async () => {
    const moments = { ...options, moments: true } as unknown as AttentionOptions;
    const error = thrownBy(() => scaledDotProductAttentionSync(query, key, value, moments));
    check(error, TYPE, 'moments … attentionForward');
  });
});

describe('backward', () => {
  const result = attentionForwardSync(query, key, value, GOOD);
  const good = floats(2, 4, 3, 6);
  const cases: [string, unknown, unknown, string, string][] = [
    ['gradOutput undefined', undefined, undefined, TYPE, 'gradOutput … got undefined'],
    ['gradOutput a typed array', good.data, undefined, TYPE, 'gradOutput'],
    [
      'gradOutput of another shape',
      floats(2, 4, 3, 8),
      undefined,
      SHAPE,
      'gradOutput … [2, 4, 3, 6] … [2, 4, 3, 8]',
    ],
    [
      'gradOutput of another type',
      { data: new Uint16Array(144), dims: good.dims, type: 'float16' },
      undefined,
      TYPE,
      'gradOutput … float16',
    ],
    [
      'gradOutput with too few elements',
      { data: new Float32Array(3), dims: good.dims },
      undefined,
      SHAPE,
      'gradOutput.data … 144 … 3',
    ],
    [
      'gradOutput detached',
      { data: detachedArray(144), dims: good.dims },
      undefined,
      TYPE,
      'gradOutput.data … detached',
    ],
    [
      'gradOutput resizable',
      { data: new Float32Array(resizable, 0, 144), dims: good.dims },
      undefined,
      TYPE,
      'gradOutput.data … resizable',
    ],
    ['an unknown option', good, { sginal: null }, TYPE, '"sginal" … did you mean "signal"'],
    ['options a number', good, 3, TYPE, 'options … got 3'],
    ['signal an object', good, { signal: {} }, TYPE, 'signal … AbortSignal'],
  ];

  test.each(cases)('%s', async (_, gradOutput, options, code, message) => {
    const args = [gradOutput, options] as Parameters<typeof result.backward>;
    check(
      thrownBy(() => (result.backwardSync as (...args: unknown[]) => unknown)(...args)),
      code,
      message,
    );
    const promise = result.backward(...args);
    expect(promise).toBeInstanceOf(Promise);
    check(await promise.catch((reason: unknown) => reason), code, message);
  });
});

describe('dropoutMask', () => {
  const dims = [2, 4, 3, 5] as const;
  const good = { p: 0.5, placement: 'weights', seed: 1, offset: 0 };
  const cases: [string, unknown, unknown, string, string][] = [
    ['dims a number', 3, good, TYPE, 'dims … got 3'],
    ['dims of rank 3', [4, 3, 5], good, SHAPE, 'dims … [4, 3, 5]'],
    ['dims with 0', [2, 4, 0, 5], good, VALUE, 'dims[2] … got 0'],
    ['dims with a text', [2, 4, '3', 5], good, TYPE, 'dims[2] … got "3"'],
    ['dims whose product is absurd', [2 ** 30, 2 ** 30, 2 ** 30, 5], good, VALUE, 'dims'],
    [
      '512 channels at most',
      [1, 1, 1, 513],
      { ...good, placement: 'context' },
      UNSUPPORTED,
      'dims … 512',
    ],
    ['no memory for it', [1, 1, 2 ** 20, 2 ** 30], good, 'ERR_SDPA_OUT_OF_MEMORY', 'memory'],
    ['no options', dims, undefined, TYPE, 'options … got undefined'],
    ['a misspelled option', dims, { ...good, sead: 1 }, TYPE, '"sead" … did you mean "seed"'],
    ['p missing', dims, { ...good, p: undefined }, TYPE, 'p … got undefined'],
    ['p NaN', dims, { ...good, p: Number.NaN }, VALUE, 'p … got NaN'],
    ['p above 1', dims, { ...good, p: 2 }, VALUE, 'p … got 2'],
    [
      'placement another word',
      dims,
      { ...good, placement: 'weight' },
      VALUE,
      'placement … did you mean "weights"',
    ],
    ['seed missing', dims, { ...good, seed: undefined }, TYPE, 'seed … got undefined'],
    ['seed negative', dims, { ...good, seed: -1 }, VALUE, 'seed … got -1'],
    [
      'broadcast with another word',
      dims,
      { ...good, broadcast: ['heads'] },
      VALUE,
      'broadcast[0] … did you mean "head"',
    ],
    [
      'queryOffset beyond 32 bits',
      dims,
      { ...good, queryOffset: 2 ** 32 - 2 },
      VALUE,
      'queryOffset',
    ],
  ];

  test.each(cases)('%s', (_, given, options, code, message) => {
    const call = dropoutMask as (dims: unknown, options: unknown) => Uint8Array;
    check(
      thrownBy(() => call(given, options)),
      code,
      message,
    );
  });
});

describe('mergeAttention', () => {
  const output = floats(2, 4, 3, 6);
  const lse = floats(2, 4, 3);
  const good = { output, lse };
  const half = { data: new Uint16Array(144), dims: output.dims, type: 'float16' };
  const cases: [string, unknown, unknown, string, string][] = [
    ['parts undefined', undefined, undefined, TYPE, 'parts … got undefined'],
    ['parts one part', good, undefined, TYPE, 'parts … an array'],
    ['no parts', [], undefined, VALUE, 'parts … at least one'],
    ['a part null', [good, null], undefined, TYPE, 'parts[1] … got null'],
    ['a part missing', [undefined, good], undefined, TYPE, 'parts[0] … got undefined'],
    ['no lse', [{ output }], undefined, TYPE, 'parts[0].lse … got undefined'],
    ['output a typed array', [{ output: output.data, lse }], undefined, TYPE, 'parts[0].output'],
    ['output of booleans', [{ output: bools(2, 4, 3, 6), lse }], undefined, TYPE, 'bool'],
    [
      'lse of another type',
      [{ output, lse: { data: new Uint16Array(24), dims: lse.dims, type: 'float16' } }],
      undefined,
      TYPE,
      'parts[0].lse … float32 … float16',
    ],
    ['outputs of two types', [good, { output: half, lse }], undefined, TYPE, 'parts[1].output'],
    [
      'outputs of two shapes',
      [good, { output: floats(2, 4, 3, 5), lse }],
      undefined,
      SHAPE,
      'parts[1].output … [2, 4, 3, 6] … [2, 4, 3, 5]',
    ],
    [
      'lse of two shapes',
      [good, { output, lse: floats(2, 4, 2) }],
      undefined,
      SHAPE,
      'parts[1].lse … [2, 4, 3] … [2, 4, 2]',
    ],
    [
      'lse that does not fit',
      [{ output, lse: floats(2, 3, 4) }],
      undefined,
      SHAPE,
      'parts[0].lse … [2, 4, 3] … [2, 3, 4]',
    ],
    [
      'lse in the order of the other layout',
      [good],
      { layout: 'bshd' },
      SHAPE,
      'parts[0].lse … [2, 3, 4] … [2, 4, 3]',
    ],
    ['a rank of 2', [{ output: floats(3, 6), lse }], undefined, SHAPE, 'parts[0].output … [3, 6]'],
    [
      'too few elements',
      [{ output: { data: new Float32Array(3), dims: output.dims }, lse }],
      undefined,
      SHAPE,
      'parts[0].output.data … 144 … 3',
    ],
    ['output disposed', [{ output: disposedTensor(), lse }], undefined, DISPOSED, 'dispose()'],
    ['an unknown option', [good], { layuot: 'bhsd' }, TYPE, 'did you mean "layout"'],
    ['another layout', [good], { layout: 'sbhd' }, VALUE, 'layout … got "sbhd"'],
    ['options null', [good], null, TYPE, 'options … got null'],
  ];

  test.each(cases)('%s', (_, parts, options, code, message) => {
    const call = mergeAttention as (parts: unknown, options: unknown) => unknown;
    check(
      thrownBy(() => call(parts, options)),
      code,
      message,
    );
  });
});

describe('key/value caches', () => {
  const shape = { kvHeads: 2, headDim: 8, valueDim: 6 };
  const pool = new KVCachePool({ ...shape, blocks: 2 });
  const make = (options: unknown) => () => new KVCache(options as never);
  const makePool = (options: unknown) => () => new KVCachePool(options as never);
  const constructed: [string, () => unknown, string, string][] = [
    ['no options', make(undefined), TYPE, 'options … got undefined'],
    ['a misspelled option', make({ ...shape, maxLenght: 8 }), TYPE, 'did you mean "maxLength"'],
    ['no maxLength', make(shape), TYPE, 'maxLength … got undefined'],
    ['no kvHeads', make({ headDim: 8, maxLength: 8 }), TYPE, 'kvHeads … got undefined'],
    ['no headDim', make({ kvHeads: 2, maxLength: 8 }), TYPE, 'headDim … got undefined'],
    ['batch 0', make({ ...shape, maxLength: 8, batch: 0 }), VALUE, 'batch … got 0'],
    ['maxLength a fraction', make({ ...shape, maxLength: 0.5 }), VALUE, 'maxLength … got 0.5'],
    ['a headDim of 513', make({ kvHeads: 1, headDim: 513, maxLength: 8 }), UNSUPPORTED, 'headDim'],
    [
      'a type of integers',
      make({ ...shape, maxLength: 8, type: 'int8' }),
      VALUE,
      'type … got "int8"',
    ],
    ['a pool an object', make({ pool: {} }), TYPE, 'pool … a KVCachePool'],
    ['a shape beside a pool', make({ pool, headDim: 8 }), VALUE, 'headDim … pool'],
    [
      'on a GPU',
      make({ ...shape, maxLength: 8, device: 'cuda' }),
      UNAVAILABLE,
      'caches are in host memory',
    ],
    ['on a device', make({ ...shape, maxLength: 8, device: 'cpo' }), VALUE, 'did you mean "cpu"'],
    [
      'blocks beyond all numbers',
      make({ ...shape, batch: 2 ** 20, maxLength: 2 ** 20 }),
      VALUE,
      'maxLength … blocks',
    ],
    [
      'more memory than an array may have',
      make({ ...shape, headDim: 512, batch: 2 ** 12, maxLength: 2 ** 20 }),
      'ERR_SDPA_OUT_OF_MEMORY',
      'memory',
    ],
    ['a pool without blocks', makePool(shape), TYPE, 'blocks … got undefined'],
    ['a pool of 0 blocks', makePool({ ...shape, blocks: 0 }), VALUE, 'blocks … got 0'],
    [
      'blocks of no whole tile',
      makePool({ ...shape, blocks: 1, blockLength: 65 }),
      VALUE,
      'blockLength … a multiple of 64 … got 65',
    ],
    [
      'an unknown option of a pool',
      makePool({ ...shape, block: 1 }),
      TYPE,
      'did you mean "blocks"',
    ],
  ];
  test.each(constructed)('%s', (_, work, code, message) => check(thrownBy(work), code, message));

  const cacheKey = floats(2, 2, 3, 8);
  const cacheValue = floats(2, 2, 3, 6);
  const appended: [string, unknown[], string, string][] = [
    ['key undefined', [undefined, cacheValue], TYPE, 'key … got undefined'],
    ['value an array', [cacheKey, [1]], TYPE, 'value'],
    ['key of booleans', [bools(2, 2, 3, 8), cacheValue], TYPE, 'key … float32 … bool'],
    [
      'value of another type',
      [cacheKey, holding(cacheValue, new Uint16Array(72), 'float16')],
      TYPE,
      'value … float32 … float16',
    ],
    ['key of another batch', [floats(1, 2, 3, 8), cacheValue], SHAPE, 'key … [2, 2, L, 8] … [1, '],
    ['key of rank 3', [floats(2, 3, 8), cacheValue], SHAPE, 'key … [2, 2, L, 8] … [2, 3, 8]'],
    ['key in the other layout', [floats(2, 3, 2, 8), cacheValue], SHAPE, 'key … [2, 3, 2, 8]'],
    [
      'value of another length',
      [cacheKey, floats(2, 2, 4, 6)],
      SHAPE,
      'value … [2, 2, 3, 6] to match key … [2, 2, 4, 6]',
    ],
    [
      'too few elements',
      [holding(cacheKey, new Float32Array(5)), cacheValue],
      SHAPE,
      'key.data … 96 … 5',
    ],
    [
      'value detached',
      [cacheKey, { data: detachedArray(72), dims: cacheValue.dims }],
      TYPE,
      'value.data … detached',
    ],
    ['an unknown option', [cacheKey, cacheValue, { seqs: [0] }], TYPE, 'option "seqs"'],
    ['sequences a number', [cacheKey, cacheValue, { sequences: 2 }], TYPE, 'sequences … got 2'],
    ['no sequences', [cacheKey, cacheValue, { sequences: [] }], VALUE, 'sequences … at least one'],
    ['a sequence twice', [cacheKey, cacheValue, { sequences: [1, 1] }], VALUE, 'sequences … once'],
    [
      'a sequence that there is not',
      [cacheKey, cacheValue, { sequences: [0, 2] }],
      VALUE,
      'sequences[1] … 0 to 1 … got 2',
    ],
    ['lengths a number', [cacheKey, cacheValue, { lengths: 2 }], TYPE, 'lengths … got 2'],
    ['one length', [cacheKey, cacheValue, { lengths: [2] }], SHAPE, 'lengths … 2 … got 1'],
    [
      'a length beyond the rows',
      [cacheKey, cacheValue, { lengths: [2, 4] }],
      VALUE,
      'lengths[1] … 0 to 3 … got 4',
    ],
    ['another layout', [cacheKey, cacheValue, { layout: 'hbsd' }], VALUE, 'layout … got "hbsd"'],
  ];
  test.each(appended)('append: %s', (_, given, code, message) => {
    const cache = new KVCache({ ...shape, batch: 2, maxLength: 8 });
    const append = cache.append.bind(cache) as (...args: unknown[]) => void;
    check(
      thrownBy(() => append(...given)),
      code,
      message,
    );
    expect([...cache.lengths]).toEqual([0, 0]);
  });

  test('append: beyond maxLength, nothing is stored', () => {
    const cache = new KVCache({ ...shape, batch: 2, maxLength: 4 });
    cache.append(cacheKey, cacheValue, { lengths: [1, 2] });
    const append = () => cache.append(cacheKey, cacheValue);
    check(thrownBy(append), VALUE, 'append … at most 2 … sequence 1 … maxLength is 4, got 3');
    expect([...cache.lengths]).toEqual([1, 2]);
  });

  const cache = new KVCache({ ...shape, batch: 2, maxLength: 8 });
  const good = floats(2, 4, 3, 8);
  const asked: [string, unknown, unknown, string, string][] = [
    ['query a number', 3, undefined, TYPE, 'query … got 3'],
    [
      'query of another type',
      holding(good, new Uint16Array(192), 'float16'),
      undefined,
      TYPE,
      'query … float32 … float16',
    ],
    ['query of rank 3', floats(4, 3, 8), undefined, SHAPE, 'query … [4, 3, 8]'],
    [
      'query of another batch',
      floats(1, 4, 3, 8),
      undefined,
      SHAPE,
      'query … [2, Hq, Lq, 8] … [1,',
    ],
    ['heads that do not divide', floats(2, 3, 3, 8), undefined, SHAPE, 'query … a multiple … 2'],
    ['another head dim', floats(2, 4, 3, 7), undefined, SHAPE, 'query … [2, 4, 3, 7]'],
    ['too few elements', holding(good, new Float32Array(1)), undefined, SHAPE, 'query.data … 192'],
    ['a mask', good, { attnMask: bools(1) }, TYPE, 'unknown option "attnMask"'],
    ['options a number', good, 3, TYPE, 'options … got 3'],
    ['isCausal a number', good, { isCausal: 1 }, TYPE, 'isCausal … got 1'],
    ['isCausal null', good, { isCausal: null }, TYPE, 'isCausal … got null'],
    ['an offset for each of 3', good, { causalOffset: [1, 2, 3] }, SHAPE, 'causalOffset … 2 … 3'],
    ['a sequence that there is not', good, { sequences: [0, -1] }, VALUE, 'sequences[1] … got -1'],
    ['dropout without training', good, { dropoutP: 0.5 }, TYPE, 'training … dropoutP'],
    ['another backend', good, { backend: 'cpx' }, VALUE, 'backend … did you mean "cpu"'],
    [
      'out of another shape',
      good,
      { out: new Tensor('float32', good.data, good.dims) },
      SHAPE,
      'out … [2, 4, 3, 6]',
    ],
  ];
  test.each(asked)('attend: %s', async (_, given, options, code, message) => {
    const attend = cache.attend.bind(cache) as (...args: unknown[]) => Promise<unknown>;
    const attendSync = cache.attendSync.bind(cache) as (...args: unknown[]) => unknown;
    check(
      thrownBy(() => attendSync(given, options)),
      code,
      message,
    );
    check(await attend(given, options).catch((reason: unknown) => reason), code, message);
  });

  test('truncate and fork', () => {
    check(
      thrownBy(() => cache.truncate(-1)),
      VALUE,
      'length … got -1',
    );
    check(
      thrownBy(() => cache.truncate(0, { sequences: [5] })),
      VALUE,
      'sequences[0] … got 5',
    );
    check(
      thrownBy(() => cache.fork(0, 0)),
      VALUE,
      'to … another',
    );
    check(
      thrownBy(() => cache.fork(2, 0)),
      VALUE,
      'from … got 2',
    );
  });

  test('after dispose', async () => {
    const gone = new KVCache({ ...shape, batch: 2, maxLength: 8 });
    gone.dispose();
    gone.dispose();
    const orphan = new KVCache({ batch: 2, pool });
    orphan.append(cacheKey, cacheValue);
    pool.dispose();
    for (const used of [gone, orphan]) {
      const uses = [
        () => used.append(cacheKey, cacheValue),
        () => used.attendSync(good),
        () => used.truncate(0),
        () => used.fork(0, 1),
      ];
      for (const use of uses) check(thrownBy(use), DISPOSED, 'dispose()');
      check(await used.attend(good).catch((reason: unknown) => reason), DISPOSED, 'dispose()');
    }
    check(thrownBy(make({ pool })), DISPOSED, 'KVCachePool: used after dispose()');
    expect(pool.freeBlocks).toBe(0);
    orphan.dispose();
  });
});

describe('generators', () => {
  const cases: [string, () => unknown, string, string][] = [
    ['options null', () => new Generator(null as never), TYPE, 'options … got null'],
    ['a misspelled option', () => new Generator({ sed: 1 } as never), TYPE, 'did you mean "seed"'],
    ['seed NaN', () => new Generator({ seed: Number.NaN }), VALUE, 'seed … got NaN'],
    ['seed a text', () => new Generator({ seed: '1' as never }), TYPE, 'seed … got "1"'],
    ['offset negative', () => new Generator({ offset: -1 }), VALUE, 'offset … got -1'],
    [
      'manualSeed without a seed',
      () => manualSeed(undefined as never),
      TYPE,
      'seed … got undefined',
    ],
    ['manualSeed of a generator', () => new Generator().manualSeed(0.5), VALUE, 'seed … got 0.5'],
    [
      'setState of nothing',
      () => new Generator().setState(null as never),
      TYPE,
      'state … got null',
    ],
    [
      'setState without an offset',
      () => new Generator().setState({ seed: 1 } as never),
      TYPE,
      'state.offset',
    ],
    [
      'setState of 65 bits',
      () => new Generator().setState({ seed: 0, offset: 2n ** 64n }),
      VALUE,
      'state.offset',
    ],
  ];

  test.each(cases)('%s', (_, work, code, message) => check(thrownBy(work), code, message));
});

describe('hostile arguments', () => {
  test('getters that change what they give are read once', () => {
    let reads = 0;
    const shifty = {
      get data() {
        return reads++ === 0 ? query.data : new Float32Array(1);
      },
      dims: query.dims,
    };
    const output = scaledDotProductAttentionSync(shifty, key, value, GOOD);
    expect([...output.data]).toEqual([
      ...scaledDotProductAttentionSync(query, key, value, GOOD).data,
    ]);
    expect(reads).toBe(1);
  });

  test('a getter that detaches another argument leads to an error, not to a crash', () => {
    const victim = query.data.slice();
    const options = {
      enableGqa: true,
      get scale() {
        structuredClone(victim.buffer, { transfer: [victim.buffer] });
        return 0.5;
      },
    };
    const compute = () =>
      scaledDotProductAttentionSync({ ...query, data: victim }, key, value, options);
    check(thrownBy(compute), TYPE, 'query.data … detached');
  });

  test('what a getter throws comes through as it is', async () => {
    const own = new Error('own');
    const options = {
      enableGqa: true,
      get scale(): number {
        throw own;
      },
    };
    expect(thrownBy(() => scaledDotProductAttentionSync(query, key, value, options))).toBe(own);
    await expect(scaledDotProductAttention(query, key, value, options)).rejects.toBe(own);
  });

  test('names of the prototype are no options', () => {
    const options = JSON.parse('{"__proto__": {"isCausal": 3}, "constructor": 1}');
    check(
      thrownBy(() => scaledDotProductAttentionSync(query, key, value, options)),
      TYPE,
      'option',
    );
  });

  test('options without a prototype are options', () => {
    const options = Object.assign(Object.create(null), { ...GOOD, isCausal: true });
    expect(scaledDotProductAttentionSync(query, key, value, options).dims).toEqual([2, 4, 3, 6]);
  });

  test('undefined stands for an option that is not given', () => {
    const options = {
      isCausal: undefined,
      ...GOOD,
      scale: undefined,
      attnMask: undefined,
      dropoutP: undefined,
    };
    const output = scaledDotProductAttentionSync(query, key, value, options);
    expect([...output.data]).toEqual([
      ...scaledDotProductAttentionSync(query, key, value, GOOD).data,
    ]);
  });
});
