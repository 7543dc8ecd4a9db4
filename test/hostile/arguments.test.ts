// What JavaScript can put in the place of options, tensors and signals: getters, proxies, polluted
// prototypes, arrays that lie about themselves, buffers that change hands. Expected are the numbers
// of an honest call, or an error with a code.
import { createContext, runInContext } from 'node:vm';
import { afterEach, describe, expect, test } from 'vitest';
import {
  type AttentionOptions,
  attentionForward,
  attentionForwardSync,
  dropoutMask,
  Generator,
  KVCache,
  KVCachePool,
  mergeAttention,
  scaledDotProductAttention,
  scaledDotProductAttentionSync,
  Tensor,
  type TensorLike,
} from '../../lib/index';
import { randomTensor } from '../cases';
import { BACKENDS, expectSame } from '../harness';

const DIMS = [2, 2, 5, 8];
const plain = (seed: number, dims = DIMS) => ({
  data: Float32Array.from(randomTensor(seed, dims).data),
  dims,
});
const [query, key, value] = [plain(1), plain(2), plain(3)];

function thrownBy(work: () => unknown): unknown {
  try {
    work();
  } catch (error) {
    return error;
  }
  return undefined;
}

/** Any object of a program without types. */
// biome-ignore lint/suspicious/noExplicitAny: what callers pass is not what the types ask for
const hostile = (value: unknown) => value as any;

const EACH = BACKENDS.map((name) => [name, name as AttentionOptions['backend']] as const);

describe('a polluted Object.prototype', () => {
  const names: string[] = [];
  const pollute = (name: string, value: unknown) => {
    Object.defineProperty(Object.prototype, name, {
      value,
      configurable: true,
      enumerable: true,
      writable: true,
    });
    names.push(name);
  };
  const clean = () => {
    for (const name of names.splice(0)) delete hostile(Object.prototype)[name];
  };
  afterEach(clean);

  const POLLUTIONS: Record<string, unknown> = {
    ...{ isCausal: true, scale: 7, dropoutP: 0.5, training: true, seed: 3, softcap: 2 },
    ...{ outputs: ['weights'], layout: 'bshd', precision: 'medium', windowSize: [0, 0] },
    ...{
      kvLengths: Int32Array.of(1, 1),
      signal: AbortSignal.abort(),
      somethingElse: 1,
      samples: 4,
    },
    ...{ sequences: [1], causalOffset: -3, enableGqa: true, keyOffset: 9, placement: 'context' },
  };

  test.each(Object.keys(POLLUTIONS))('%s on it is no option of any call', async (name) => {
    const cacheOf = () => {
      const cache = new KVCache({ batch: 2, kvHeads: 2, headDim: 8, maxLength: 8 });
      cache.append(key, value, {});
      return cache.attendSync(query, {}).output.data;
    };
    const run = async () => [
      scaledDotProductAttentionSync(query, key, value).data,
      scaledDotProductAttentionSync(query, key, value, {}).data,
      (await scaledDotProductAttention(query, key, value, {})).data,
      (await attentionForwardSync(query, key, value, {}).backward(query, {})).gradKey.data,
      dropoutMask([1, 1, 4, 4], { p: 0.5, seed: 1 }),
      Float64Array.of(Number(new Generator({ seed: 5 }).getState().offset)),
      mergeAttention([attentionForwardSync(query, key, value)], {}).output.data,
      cacheOf(),
    ];
    const wanted = await run();
    pollute(name, POLLUTIONS[name]);
    const polluted = await run();
    clean(); // the test runner has options too
    wanted.forEach((array, i) => {
      expectSame(`${i}`, polluted[i] as Float32Array, array as Float32Array);
    });
  });
});

describe('options', () => {
  test('of a proxy are read once each, and no others are asked for', () => {
    const reads: PropertyKey[] = [];
    const options = new Proxy(
      { isCausal: true, scale: 0.5 },
      {
        get(target, name) {
          reads.push(name);
          return Reflect.get(target, name);
        },
      },
    );
    const output = scaledDotProductAttentionSync(query, key, value, options);
    expect(reads).toEqual(['isCausal', 'scale']);
    const wanted = scaledDotProductAttentionSync(query, key, value, { isCausal: true, scale: 0.5 });
    expectSame('output', output.data, wanted.data);
  });

  test.each([
    ['ownKeys', { ownKeys: () => hostile(Array.from({ length: 1000 }, (_, i) => `x${i}`)) }],
    ['getOwnPropertyDescriptor', { getOwnPropertyDescriptor: () => hostile(3) }],
    ['getPrototypeOf', { getPrototypeOf: () => Array.prototype }],
    ['a revoked one', null],
  ])('of a proxy whose traps lie: %s', (_, traps) => {
    const { proxy, revoke } = Proxy.revocable({ isCausal: true }, (traps ?? {}) as object);
    if (traps === null) revoke();
    // Its own TypeError, or ours; and the next call is as good as ever.
    expect(() => scaledDotProductAttentionSync(query, key, value, proxy)).not.toThrow(/internal/);
  });

  test.each([Number.NaN, -1, 2 ** 53, '4', null, { valueOf: () => 4 }])(
    'and shapes in array proxies of length %s',
    (length) => {
      const dims = new Proxy([2, 2, 5, 8], {
        get: (target, name) => (name === 'length' ? length : Reflect.get(target, name)),
      });
      const error = thrownBy(() =>
        scaledDotProductAttentionSync({ ...query, dims }, key, value, {
          windowSize: hostile(dims),
        }),
      );
      expect(error).toMatchObject({ code: expect.stringMatching(/^ERR_SDPA_(INVALID|SHAPE)/) });
    },
  );
});

/** Arrays whose properties do not say what they are. */
const LIARS: [string, (data: Float32Array) => Float32Array][] = [
  ...[1, 1e9, -1, Number.NaN, 'x'].map((length): [string, (data: Float32Array) => Float32Array] => [
    `of length ${length}`,
    (data) => Object.defineProperty(data, 'length', { value: length }),
  ]),
  ['of another buffer', (data) => Object.defineProperty(data, 'buffer', { value: null })],
  ['of another offset', (data) => Object.defineProperty(data, 'byteOffset', { value: 1e9 })],
  ['without a prototype', (data) => Object.setPrototypeOf(data, null)],
  [
    'of a subclass',
    (data) => {
      class Liar extends Float32Array {
        override get length() {
          return 3;
        }
        static get [Symbol.species]() {
          return hostile(Uint8Array);
        }
        override subarray() {
          return hostile([]);
        }
        override slice() {
          return hostile(null);
        }
      }
      return new Liar(hostile(data));
    },
  ],
  [
    'of another realm',
    (data) => {
      const context = createContext({ source: data });
      return runInContext('new Float32Array(source)', context);
    },
  ],
];

describe.each(EACH)('%s, arrays that lie about themselves', (_, backend) => {
  const wanted = attentionForwardSync(query, key, value, { backend });
  const wantedGradients = wanted.backwardSync(query);

  test.each(LIARS)('%s are what they are', async (_, lie) => {
    const liar = (tensor: TensorLike) => ({
      data: lie((tensor.data as Float32Array).slice()),
      dims: tensor.dims!,
    });
    const result = attentionForwardSync(liar(query), liar(key), liar(value), { backend });
    expectSame('output', result.output.data, wanted.output.data);
    const later = await attentionForward(liar(query), liar(key), liar(value), { backend });
    expectSame('asynchronous', later.output.data, wanted.output.data);
    const { gradKey } = await later.backward(liar(query));
    expectSame('gradKey', gradKey.data, wantedGradients.gradKey.data);
    const tensor = new Tensor('float32', liar(query).data, DIMS);
    expectSame('Tensor', tensor.toFloat32Array(), query.data);
  });

  test.each(LIARS)("%s, as a Tensor's data, change nothing", (name, lie) => {
    if (name.endsWith('subclass') || name.endsWith('realm')) return; // those are other arrays
    const tensors = [query, key, value].map(({ data }) => new Tensor('float32', data, DIMS));
    for (const { data } of tensors) lie(data as Float32Array);
    const [q, k, v] = tensors;
    const result = attentionForwardSync(q, k, v, { backend });
    expectSame('output', result.output.data, wanted.output.data);
    expectSame('gradKey', result.backwardSync(q).gradKey.data, wantedGradients.gradKey.data);
    expectSame('toFloat32Array', q.toFloat32Array(), query.data);
  });

  test('nor can an Int32Array', () => {
    class Liar extends Int32Array {
      override get length() {
        return 2;
      }
    }
    const run = (kvLengths: Int32Array) =>
      scaledDotProductAttentionSync(query, key, value, { kvLengths, backend });
    const mismatch = { code: 'ERR_SDPA_SHAPE_MISMATCH' };
    expect(thrownBy(() => run(new Liar(3)))).toMatchObject(mismatch);
    const type = { code: 'ERR_SDPA_INVALID_ARG_TYPE' };
    expect(thrownBy(() => run(Object.create(Int32Array.prototype)))).toMatchObject(type);
    expect(thrownBy(() => run(new Proxy(Int32Array.of(1, 1), {})))).toMatchObject(type);
    const foreign = runInContext('Int32Array.of(1, 3)', createContext({}));
    expectSame('foreign', run(foreign).data, run(Int32Array.of(1, 3)).data);
  });

  test.each([1, 2, 3])(
    'a signal that takes an input away when it is asked for the %i. time',
    async (turn) => {
      const victim = { data: query.data, dims: DIMS };
      let asked = 0;
      const signal = {
        get aborted() {
          if (++asked === turn) {
            structuredClone(victim.data.buffer, { transfer: [victim.data.buffer] });
          }
          return false;
        },
        addEventListener() {},
        removeEventListener() {},
      };
      const options = { signal: hostile(signal), backend };
      for (const run of [scaledDotProductAttentionSync, scaledDotProductAttention]) {
        victim.data = query.data.slice();
        asked = 0;
        const answer = await Promise.resolve()
          .then(() => run(victim, key, value, options))
          .catch((error) => error);
        // Either it was too late, or the error says what happened.
        if (answer instanceof Tensor) expectSame('output', answer.data, wanted.output.data);
        else expect(answer).toMatchObject({ code: 'ERR_SDPA_INVALID_ARG_TYPE' });
        expect(answer instanceof Tensor).toBe(victim.data.length > 0);
      }
    },
  );

  test('signals that throw do so to the caller, and leave nothing behind', async () => {
    const own = new Error('own');
    const throwing = () => {
      throw own;
    };
    const run = (methods: object) => {
      const signal = { aborted: false, addEventListener() {}, removeEventListener() {} };
      Object.defineProperties(signal, Object.getOwnPropertyDescriptors(methods));
      return scaledDotProductAttention(query, key, value, { signal: hostile(signal), backend });
    };
    await expect(run({ addEventListener: throwing })).rejects.toBe(own);
    await expect(run({ removeEventListener: throwing })).rejects.toBe(own);
    const atOnce = (_: string, listener: () => void) => {
      listener();
      listener();
    };
    await expect(run({ addEventListener: atOnce })).rejects.toMatchObject({
      code: 'ERR_SDPA_ABORTED',
    });
    await expect(
      run({
        addEventListener: atOnce,
        get reason() {
          throw own;
        },
      }),
    ).rejects.toBe(own);
    await expect(run({ removeEventListener: undefined })).rejects.toMatchObject({
      code: 'ERR_SDPA_INVALID_ARG_TYPE',
    });
  });

  test('aborts at random moments end in an answer or in an AbortError', async () => {
    const inputs = [1, 2, 3].map((seed) => plain(seed, [1, 4, 200, 32]));
    const [q, k, v] = inputs.map(({ data, dims }) => new Tensor('float32', data, dims));
    const wantedOutput = scaledDotProductAttentionSync(q, k, v, { backend });
    let aborted = 0;
    const calls = Array.from({ length: 60 }, async (_, i) => {
      const controller = new AbortController();
      const out = i % 3 === 0 ? new Tensor('float32', inputs[0].data, inputs[0].dims) : undefined;
      const call = scaledDotProductAttention(q, k, v, { signal: controller.signal, out, backend });
      if (i % 10 === 0) controller.abort();
      else setTimeout(() => controller.abort(), ((i * 7919) % 97) / 10);
      try {
        expectSame('output', (await call).data, wantedOutput.data);
      } catch (error) {
        expect(error).toMatchObject({ code: 'ERR_SDPA_ABORTED' });
        aborted++;
        if (out) expectSame('out', out.data, inputs[0].data);
      }
    });
    await Promise.all(calls);
    expect(aborted).toBeGreaterThan(0);
  });
});

describe('buffers', () => {
  const wasm = hostile(globalThis).WebAssembly;
  const BUFFERS: [string, () => Float32Array, string | null][] = [
    [
      'resizable',
      () => new Float32Array(new (hostile(ArrayBuffer))(640, { maxByteLength: 1280 })),
      'ERR_SDPA_INVALID_ARG_TYPE',
    ],
    [
      'growable',
      () => new Float32Array(new (hostile(SharedArrayBuffer))(640, { maxByteLength: 1280 })),
      'ERR_SDPA_INVALID_ARG_TYPE',
    ],
    ['shared', () => new Float32Array(new SharedArrayBuffer(640)), null],
    [
      'of WebAssembly',
      () => new Float32Array(new wasm.Memory({ initial: 1 }).buffer, 64, 160),
      null,
    ],
    [
      'of a WebAssembly memory that has grown',
      () => {
        const memory = new wasm.Memory({ initial: 1 });
        const view = new Float32Array(memory.buffer, 64, 160);
        memory.grow(1);
        return view;
      },
      'ERR_SDPA_INVALID_ARG_TYPE',
    ],
    [
      'that were transferred',
      () => {
        const array = new Float32Array(160);
        structuredClone(array.buffer, { transfer: [array.buffer] });
        return array;
      },
      'ERR_SDPA_INVALID_ARG_TYPE',
    ],
  ];

  test.each(BUFFERS)('%s, in the place of each argument', async (_, make, code) => {
    const good = { dims: DIMS, data: query.data };
    const like = () => ({ data: make(), dims: DIMS });
    const cache = new KVCache({ batch: 2, kvHeads: 2, headDim: 8, maxLength: 64 });
    const result = attentionForwardSync(query, key, value);
    const works = [
      () => scaledDotProductAttention(like(), good, good),
      () => scaledDotProductAttention(good, like(), good),
      () => scaledDotProductAttention(good, good, like()),
      () => result.backward(like()),
      async () => new Tensor('float32', make(), DIMS),
      async () => cache.append(like(), good),
      async () => cache.append(good, like()),
      async () => cache.attendSync(like()),
      async () => mergeAttention([{ output: like(), lse: result.lse }]),
    ];
    cache.append(good, good);
    for (const work of works) {
      if (code === null) await work();
      else await expect(work()).rejects.toMatchObject({ code });
    }
    expect([...cache.lengths]).toEqual(code === null ? [15, 15] : [5, 5]);
  });
});

describe('caches', () => {
  const pool = () => new KVCachePool({ blocks: 4, kvHeads: 2, headDim: 8 });
  const rows = (length: number, seed: number) => plain(seed, [1, 2, length, 8]);

  test('disposed during attend, by hand or by a getter, twice', async () => {
    const cache = new KVCache({ batch: 2, kvHeads: 2, headDim: 8, maxLength: 64 });
    cache.append(key, value);
    const wanted = cache.attendSync(query).output.data;
    const attending = cache.attend(query);
    cache.dispose();
    cache.dispose();
    expectSame('output', (await attending).output.data, wanted);
    const disposed = { code: 'ERR_SDPA_DISPOSED' };
    await expect(cache.attend(query)).rejects.toMatchObject(disposed);
    for (const use of [
      () => cache.append(key, value),
      () => cache.fork(0, 1),
      () => cache.truncate(0),
      () => cache.length,
    ]) {
      expect(thrownBy(use)).toMatchObject(disposed);
    }
  });

  test('the pool disposed during attend', async () => {
    const shared = pool();
    const cache = new KVCache({ pool: shared });
    cache.append(rows(70, 1), rows(70, 2));
    const wanted = cache.attendSync(rows(1, 3)).output.data;
    const attending = cache.attend(rows(1, 3));
    shared.dispose();
    expectSame('output', (await attending).output.data, wanted);
    expect(thrownBy(() => cache.append(rows(1, 1), rows(1, 2)))).toMatchObject({
      code: 'ERR_SDPA_DISPOSED',
    });
  });

  test('a getter that cuts the cache while attend reads its options: no block is lost or shared', async () => {
    const shared = pool();
    const cache = new KVCache({ batch: 2, pool: shared });
    cache.append(rows(100, 1), rows(100, 2), { sequences: [0] });
    const wanted = cache.attendSync(rows(1, 3), { sequences: [0] }).output.data;
    const options = () => ({
      sequences: [0],
      // Read once the blocks are known.
      windowSize: new Proxy([-1, -1], {
        get(target, name) {
          if (name === '0') {
            cache.truncate(0, { sequences: [0] });
            cache.append(rows(100, 8), rows(100, 9), { sequences: [1] });
          }
          return Reflect.get(target, name);
        },
      }) as unknown as [number, number],
    });
    const { output } = await cache.attend(rows(1, 3), options());
    expectSame('output', output.data, wanted);
    expect(shared.freeBlocks).toBe(2);
    const kept = cache.attendSync(rows(1, 3), { sequences: [1] }).output.data;
    // The blocks that are free are nobody's: to fill them changes nothing.
    cache.append(rows(100, 5), rows(100, 6), { sequences: [0] });
    expect(shared.freeBlocks).toBe(0);
    expectSame('other', cache.attendSync(rows(1, 3), { sequences: [1] }).output.data, kept);
    cache.dispose();
    expect(shared.freeBlocks).toBe(4);
  });

  test('options that throw while attend reads them keep no block', async () => {
    const shared = pool();
    const cache = new KVCache({ pool: shared });
    cache.append(rows(100, 1), rows(100, 2));
    const own = new Error('own');
    const windowSize = new Proxy([-1, -1], {
      get(target, name) {
        if (name === '1') throw own;
        return Reflect.get(target, name);
      },
    }) as unknown as [number, number];
    await expect(cache.attend(rows(1, 3), { windowSize })).rejects.toBe(own);
    expect(thrownBy(() => cache.attendSync(rows(1, 3), { windowSize }))).toBe(own);
    cache.truncate(0);
    expect(shared.freeBlocks).toBe(4);
  });

  test('appended to, forked and cut while many attend', async () => {
    const shared = new KVCachePool({ blocks: 16, kvHeads: 2, headDim: 8 });
    const cache = new KVCache({ batch: 2, pool: shared });
    cache.append(rows(90, 1), rows(90, 2), { sequences: [0] });
    cache.append(rows(5, 3), rows(5, 4), { sequences: [1] });
    for (let round = 0; round < 40; round++) {
      const wanted = cache.attendSync(query).output.data;
      const attending = [cache.attend(query), cache.attend(query)];
      cache.fork(0, 1);
      cache.append(rows(3, round), rows(3, round), { sequences: [round % 2] });
      cache.truncate(20 + ((round * 13) % 71), { sequences: [0] });
      for (const { output } of await Promise.all(attending)) {
        expectSame(`round ${round}`, output.data, wanted);
      }
    }
    cache.dispose();
    expect(shared.freeBlocks).toBe(16);
  });
});
