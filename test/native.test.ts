// The native addon: what it is told, which backend runs, what the environment chooses, and what
// happens where it does not load.
import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, describe, expect, test, vi } from 'vitest';
import { loadBinding } from '../lib/binding';
import {
  type AttentionOptions,
  attentionForwardSync,
  backendInfo,
  setNumThreads,
} from '../lib/index';
import { encodeProblem, PROBLEM_FIELDS, type Problem } from '../lib/problem-header';
import { SEED, settings } from './arbitrary';
import { NAMED_CASES, namedTensors } from './cases';
import { ROOT, runNode, runProgram } from './child';
import {
  BACKENDS,
  expectSame,
  FOREIGN_BACKEND,
  NATIVE_BACKENDS,
  stored,
  X64_BACKENDS,
} from './harness';
import { keepDecisions } from './reference';

const { version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8'));
/** Remedies of a binary that does not load. */
const BUILD = /npx node-sdpa build/;
const REINSTALL = /Reinstall/;
const INFO = join(ROOT, 'test/programs/info.mjs');
const FOREIGN_ISA = FOREIGN_BACKEND.replace('cpu:', '');

const loaded = loadBinding();
// Without the addon this run would test JavaScript alone; the error says how to build it.
if (loaded.error) throw loaded.error;
const native = loaded.native!;
const addonPath = loaded.path!;

test('the portable kernels are always there', () => {
  expect(NATIVE_BACKENDS).toContain('cpu:portable');
});

test('the fields of a Problem cross in the order of problem.h', () => {
  const read: string[] = [];
  const recorder = new Proxy({} as Problem, {
    get: (_, name: string) => read.push(name),
  });
  const header = encodeProblem(recorder);
  const snakeCase = (name: string) => name.replace(/[A-Z]/g, (x) => `_${x.toLowerCase()}`);
  expect(read.map(snakeCase).join(',')).toBe(native.problemFields);
  // Every field in a place of its own, in the order of reading.
  expect([...header]).toEqual(read.map((_, i) => i + 1));
});

test('the addon was built from this version', () => {
  expect(native.version).toBe(version);
  expect(backendInfo().version).toBe(version);
});

describe('native code checks for itself what it reads and writes', () => {
  const portable = native.backends.findIndex(({ name }) => name === 'cpu:portable');
  const problem = problemOf({ batch: 2, queryHeads: 4, kvHeads: 2, queryLength: 3, keyLength: 5 });
  const internal = expect.objectContaining({ code: 'ERR_SDPA_INTERNAL' });

  /**
   * No starts and no blocks; query, key, value, no mask, and the output: of 2 x 4 x 3 x 8,
   * 2 x 2 x 5 x 8 and 2 x 2 x 5 x 6.
   */
  function arrays() {
    const inputs = [new Float32Array(192), new Float32Array(160), new Float32Array(120)];
    const results = [new Float32Array(144), ...new Array(6).fill(null)];
    return [null, null, null, ...inputs, null, null, null, null, ...results];
  }

  const forwardSync = native.forwardSync as (...values: unknown[]) => void;
  const call = (header: Float64Array, backend: number, given: unknown[]) =>
    forwardSync(header, backend, ...given);

  test('a good call runs', () => {
    expect(call(encodeProblem(problem), portable, arrays())).toBeUndefined();
  });

  test(`a header with any field out of range is refused, seed ${SEED}`, () => {
    const sizes = PROBLEM_FIELDS.slice(0, 7);
    const property = fc.property(
      fc.constantFrom(...PROBLEM_FIELDS),
      fc.constantFrom(Number.NaN, Infinity, -Infinity, 0.5, -2, 2 ** 32, 2 ** 53, 1e300),
      (field, value) => {
        // Any number is a scale or a cap.
        fc.pre(field !== 'scale' && field !== 'softcap');
        fc.pre(!(field === 'causalOffset' && value === -2));
        fc.pre(!(field === 'dropoutP' && value === 0.5));
        const header = encodeProblem({ ...problem, [field]: value });
        expect(() => call(header, portable, arrays())).toThrow(internal);
      },
    );
    fc.assert(property, settings(300));
    for (const field of sizes) {
      const header = encodeProblem({ ...problem, [field]: 0 });
      expect(() => call(header, portable, arrays()), field).toThrow(internal);
    }
  });

  test('an array of another kind or length is refused', () => {
    const wrong = [
      new Float32Array(7),
      new Float64Array(192),
      new Uint16Array(192),
      [1],
      3,
      undefined,
    ];
    const needed = [3, 4, 5, 10];
    for (let i = 0; i < 17; i++) {
      for (const array of [...wrong, ...(needed.includes(i) ? [null] : [])]) {
        const given: unknown[] = arrays();
        given[i] = array;
        expect(() => call(encodeProblem(problem), portable, given), `array ${i}`).toThrow(internal);
      }
    }
    expect(() => call(new Float64Array(31), portable, arrays())).toThrow(internal);
    expect(() => call(encodeProblem(problem), 99, arrays())).toThrow(internal);
    expect(() => call(encodeProblem({ ...problem, maskBatch: 0 }), portable, withMask())).toThrow(
      internal,
    );
  });

  describe('a packed batch', () => {
    const LAYOUT_BSHD = 1;
    const packed = { ...problem, layout: LAYOUT_BSHD };
    const starts = [Int32Array.of(0, 3, 6), Int32Array.of(0, 5, 10)];
    const given = (query: unknown = starts[0], key: unknown = starts[1]) => {
      return [query, key, ...arrays().slice(2)];
    };
    const at = (i: number, array: unknown) => {
      return given().map((other, j) => (i === j ? array : other));
    };

    test('runs', () => {
      expect(call(encodeProblem(packed), portable, given())).toBeUndefined();
    });

    const wrong: [string, Problem, unknown[]][] = [
      ['starts without the other', packed, given(starts[0], null)],
      ['starts not from 0', packed, given(Int32Array.of(1, 3, 6))],
      ['starts that fall', packed, given(Int32Array.of(0, 7, 6))],
      ['a negative start', packed, given(Int32Array.of(0, -3, 6))],
      ['another total', packed, given(starts[0], Int32Array.of(0, 5, 9))],
      ['a sequence longer than the longest', packed, given(starts[0], Int32Array.of(0, 4, 10))],
      ['another number of sequences', packed, given(starts[0], Int32Array.of(0, 10))],
      ['the other layout', problem, given()],
      ['a mask', { ...packed, maskType: 1 }, at(6, new Uint8Array(1))],
      ['a keep mask', packed, at(7, new Uint8Array(120))],
      ['key lengths beyond a sequence', packed, at(9, Int32Array.of(6, 5))],
      ['scores', packed, at(12, new Float32Array(120))],
    ];
    test.each(wrong)('%s is refused', (_, header, arrays) => {
      expect(() => call(encodeProblem(header), portable, arrays)).toThrow(internal);
    });
  });

  describe('a cache', () => {
    const cached = { ...problem, keyLength: 70, keyBlockLength: 64 };
    /** 3 blocks of 2 x 64 x 8 and 2 x 64 x 6, of which the entries have 2 and 1. */
    const given = (more: Record<number, unknown> = {}) => {
      const blocks = { 2: Int32Array.of(0, 2, 1, 0), 9: Int32Array.of(70, 64) };
      const tensors = { 4: new Float32Array(3072), 5: new Float32Array(2304) };
      const all: Record<number, unknown> = { ...blocks, ...tensors, ...more };
      return arrays().map((array, i) => (i in all ? all[i] : array));
    };

    test('runs', () => {
      expect(call(encodeProblem(cached), portable, given())).toBeUndefined();
    });

    const starts = { 0: Int32Array.of(0, 3, 6), 1: Int32Array.of(0, 70, 140) };
    const wrong: [string, Problem, unknown[]][] = [
      ['a block that there is not', cached, given({ 2: Int32Array.of(0, 3, 1, 0) })],
      ['a negative block', cached, given({ 2: Int32Array.of(0, 2, -1, 0) })],
      ['too few blocks', cached, given({ 2: Int32Array.of(0, 1) })],
      ['blocks that do not divide', cached, given({ 2: Int32Array.of(0, 2, 1) })],
      ['no blocks', cached, given({ 2: null })],
      ['blocks of another kind', cached, given({ 2: new Float32Array(4) })],
      ['no lengths', cached, given({ 9: null })],
      ['a length beyond the longest', cached, given({ 9: Int32Array.of(71, 64) })],
      ['a negative length', cached, given({ 9: Int32Array.of(-1, 64) })],
      ['keys that are not whole blocks', cached, given({ 4: new Float32Array(3073) })],
      ['fewer values than keys', cached, given({ 5: new Float32Array(1536) })],
      ['keys of another type', { ...cached, keyType: 1 }, given()],
      ['blocks of no whole tile', { ...cached, keyBlockLength: 63 }, given()],
      ['blocks without a length', { ...cached, keyBlockLength: 0 }, given()],
      ['starts', { ...cached, layout: 1 }, given(starts)],
      ['a mask', { ...cached, maskType: 1 }, given({ 6: new Uint8Array(1) })],
      ['weights', cached, given({ 13: new Float32Array(2 * 4 * 3 * 70) })],
    ];
    test.each(wrong)('%s is refused', (_, header, arrays) => {
      expect(() => call(encodeProblem(header), portable, arrays)).toThrow(internal);
    });

    test('keys of another type than the query are for caches only', () => {
      const given: unknown[] = arrays();
      given[4] = new Uint16Array(160);
      given[5] = new Uint16Array(120);
      const header = encodeProblem({ ...problem, keyType: 1 });
      expect(() => call(header, portable, given)).toThrow(internal);
    });
  });

  /** A mask where the header says that there is none. */
  function withMask() {
    return arrays().map((array, i) => (i === 6 ? new Uint16Array(4) : array));
  }
});

/** A plain problem of head dim 8 and value dim 6. */
function problemOf(sizes: Partial<Problem>): Problem {
  const zeros = Object.fromEntries(PROBLEM_FIELDS.map((field) => [field, 0]));
  const mask = { maskBatch: 1, maskHeads: 1, maskQueries: 1, maskKeys: 1 };
  const window = { windowLeft: -1, windowRight: -1 };
  return { ...zeros, ...mask, ...window, headDim: 8, valueDim: 6, scale: 1, ...sizes } as Problem;
}

describe('backendInfo', () => {
  const info = backendInfo();

  test('names what is selected, and why nothing better is', () => {
    expect(info.tried.find(({ backend }) => backend === info.selected)).toMatchObject({ ok: true });
    for (const { ok, reason, code } of info.tried) {
      if (ok) continue;
      expect(reason).toBeTruthy();
      expect(code).toMatch(/^ERR_SDPA_/);
    }
    expect(info.tried.at(-1)).toMatchObject({ backend: 'js', ok: true });
    expect(info.binary).toMatch(/\.node$/);
    expect(info.threads).toBeGreaterThanOrEqual(1);
  });

  test('selects the best native backend that this processor can run', () => {
    if (process.arch === 'arm64') expect(NATIVE_BACKENDS).toEqual(['cpu:neon', 'cpu:portable']);
    if (process.arch !== 'x64' || process.platform !== 'linux') return;
    const line = readFileSync('/proc/cpuinfo', 'utf8').match(/^flags\s*:(.*)$/m)!;
    const flags = line[1].split(' ');
    const runnable = X64_BACKENDS.filter(({ needs }) => needs.every((x) => flags.includes(x)));
    expect(NATIVE_BACKENDS).toEqual(runnable.map(({ name }) => name));
    expect(info.selected).toBe(BACKENDS[0]);
  });
});

describe('a backend that is named is the one that runs', () => {
  const [named] = NAMED_CASES;
  const { query, key, value } = namedTensors(named);
  const selected = (backend: string) =>
    attentionForwardSync(stored(query), stored(key), stored(value), {
      backend: backend as AttentionOptions['backend'],
    }).backend;

  test.each(BACKENDS)('%s', (backend) => expect(selected(backend)).toBe(backend));

  test('cpu and auto mean the best', () => {
    expect(selected('cpu')).toBe(NATIVE_BACKENDS[0]);
    expect(selected('auto')).toBe(backendInfo().selected);
  });
});

/** What the library does as a new process would load it, with other environment variables. */
async function withEnvironment<T>(
  env: Record<string, string>,
  use: (library: typeof import('../lib/index')) => T,
): Promise<T> {
  const before = { ...process.env };
  vi.resetModules();
  Object.assign(process.env, env);
  try {
    return use(await import('../lib/index'));
  } finally {
    for (const name of Object.keys(env)) delete process.env[name];
    Object.assign(process.env, before);
    vi.resetModules();
  }
}

describe('setNumThreads', () => {
  test('is read back, and refuses what is no number of threads', () => {
    const before = backendInfo().threads;
    setNumThreads(3);
    expect(backendInfo().threads).toBe(3);
    for (const wrong of [0, -1, 1.5, Number.NaN, Infinity, 1e9]) {
      expect(() => setNumThreads(wrong)).toThrow(
        expect.objectContaining({ name: 'RangeError', code: 'ERR_SDPA_INVALID_ARG_VALUE' }),
      );
    }
    expect(() => setNumThreads('2' as unknown as number)).toThrow(
      expect.objectContaining({ name: 'TypeError', code: 'ERR_SDPA_INVALID_ARG_TYPE' }),
    );
    expect(backendInfo().threads).toBe(3);
    setNumThreads(before);
  });
});

describe('the environment', () => {
  test.each([
    ...BACKENDS.map((backend): [Record<string, string>, string] => [
      { SDPA_BACKEND: backend },
      backend,
    ]),
    [{ SDPA_BACKEND: 'cpu' }, NATIVE_BACKENDS[0]],
    [{ SDPA_BACKEND: 'auto' }, BACKENDS[0]],
    [{ SDPA_BACKEND: '' }, BACKENDS[0]],
    [{ SDPA_CPU_ISA: 'portable' }, 'cpu:portable'],
    [{ SDPA_CPU_ISA: 'portable', SDPA_BACKEND: 'cpu' }, 'cpu:portable'],
  ])('%o selects %s', async (env, backend) => {
    const result = await runProgram('info', { env });
    expect(result.backend).toBe(backend);
    expect(result.info.selected).toBe(backend);
    const selected = await withEnvironment(env, (library) => library.backendInfo().selected);
    expect(selected).toBe(backend);
  });

  test('a backend that cannot run here is named, not replaced', async () => {
    const info = await withEnvironment({ SDPA_BACKEND: 'cuda' }, (library) =>
      library.backendInfo(),
    );
    expect(info).toMatchObject({ selected: null, isa: null });
  });

  test.each(BACKENDS)(
    'dropoutMask is computed by SDPA_BACKEND=%s, with the same bits',
    async (backend) => {
      const dims = [2, 3, 5, 77] as const;
      const spec = {
        p: 0.3,
        placement: 'weights',
        seed: 7n,
        offset: 2n,
        broadcast: ['head'],
      } as const;
      const env = { SDPA_BACKEND: backend };
      const mask = await withEnvironment(env, (library) => library.dropoutMask(dims, spec));
      expectSame('mask', mask, keepDecisions(dims, spec));
      const context = await withEnvironment(env, (library) =>
        library.dropoutMask(dims, { ...spec, placement: 'context' }),
      );
      expectSame('mask', context, keepDecisions(dims, { ...spec, placement: 'context' }));
    },
  );

  test('NODE_DEBUG=sdpa says what is chosen; without it, nothing is printed', async () => {
    const [loud, quiet] = await Promise.all([
      runNode({ args: [INFO], env: { NODE_DEBUG: 'sdpa' } }),
      runNode({ args: [INFO] }),
    ]);
    expect(loud.stderr).toContain('node_sdpa.node');
    expect(quiet.stderr).toBe('');
  });

  test('SDPA_NUM_THREADS sets the threads and leaves the bits alone', async () => {
    const [one, three] = await Promise.all([
      runProgram('info', { env: { SDPA_NUM_THREADS: '1' } }),
      runProgram('info', { env: { SDPA_NUM_THREADS: '3' } }),
    ]);
    expect(one.info.threads).toBe(1);
    expect(three.info.threads).toBe(3);
    expect(three.hash).toBe(one.hash);
  });

  test.each([
    [{ SDPA_BACKEND: 'cuda' }, 'ERR_SDPA_BACKEND_UNAVAILABLE', 'cuda'],
    [{ SDPA_BACKEND: 'gpu' }, 'ERR_SDPA_INVALID_ARG_VALUE', 'SDPA_BACKEND: expected'],
    [{ SDPA_BACKEND: 'cpu:avx1024' }, 'ERR_SDPA_INVALID_ARG_VALUE', 'SDPA_BACKEND: expected'],
    [{ SDPA_CPU_ISA: FOREIGN_ISA }, 'ERR_SDPA_BACKEND_UNAVAILABLE', FOREIGN_ISA],
    [{ SDPA_CPU_ISA: 'sse9' }, 'ERR_SDPA_INVALID_ARG_VALUE', 'SDPA_CPU_ISA: expected'],
    [{ SDPA_NUM_THREADS: 'many' }, 'ERR_SDPA_INVALID_ARG_VALUE', 'SDPA_NUM_THREADS: expected'],
    [{ SDPA_NUM_THREADS: '0' }, 'ERR_SDPA_INVALID_ARG_VALUE', 'SDPA_NUM_THREADS: expected'],
  ])('%o is an error that says so', async (env, code, fragment) => {
    const thrown = await withEnvironment(env as Record<string, string>, (library) => {
      const tensor = { data: new Float32Array(1), dims: [1, 1, 1, 1] };
      try {
        return library.scaledDotProductAttentionSync(tensor, tensor, tensor);
      } catch (error) {
        return error;
      }
    });
    expect(thrown).toMatchObject({ code, message: expect.stringContaining(fragment) });
    const finished = await runNode({ args: [INFO], env: env as Record<string, string> });
    expect(finished).toMatchObject({ status: 1, signal: null });
    expect(finished.stderr).toContain(code);
    expect(finished.stderr).toContain(fragment);
  });
});

describe('a binary that does not load', () => {
  const folder = mkdtempSync(join(tmpdir(), 'node-sdpa-test-'));
  afterAll(() => rmSync(folder, { recursive: true }));

  /** A package root that holds `content` in place of the addon. */
  function rootWith(name: string, content: Buffer | string | null): Record<string, string> {
    const root = join(folder, name);
    mkdirSync(join(root, 'build/Release'), { recursive: true });
    if (content !== null) writeFileSync(join(root, 'build/Release/node_sdpa.node'), content);
    return { NODE_SDPA_PREBUILD: root };
  }

  const genuine = readFileSync(addonPath);

  /** The genuine addon with a text in it replaced, wherever it stands, by one that is no longer. */
  function altered(text: string, other: string): Buffer {
    const copy = Buffer.from(genuine);
    expect(genuine.indexOf(text), text).toBeGreaterThan(0);
    for (let at = genuine.indexOf(text); at >= 0; at = genuine.indexOf(text, at + 1)) {
      copy.write(other, at, 'latin1');
    }
    return copy;
  }

  const version9 = altered(`\0${version}\0`, '\x009.');
  /** The genuine addon with a number of its ELF header, two bytes, changed. */
  function withHeader(offset: number, value: number): Buffer {
    const copy = Buffer.from(genuine);
    copy.writeUInt16LE(value, offset);
    return copy;
  }
  const MACHINE = 18;
  const [RISCV, ARM64, X64] = [243, 183, 62];
  const otherArch = process.arch === 'x64' ? ARM64 : X64;

  const start = Buffer.concat([Buffer.from('MZ'), Buffer.alloc(58), Buffer.from([64, 0, 0, 0])]);
  const windows = Buffer.concat([start, Buffer.from('PE\0\0'), Buffer.from([0x64, 0xaa])]);
  const mac = Buffer.from('cffaedfe0c000001'.padEnd(128, '0'), 'hex');

  const otherLibc = altered('libc.so.6\0', 'libc.so\0\0\0');
  const [glibc = ''] = genuine.toString('latin1').match(/GLIBC_2\.\d+\0/) ?? [];
  const otherPrebuilds = rootWith('other', null);
  const aix = join(otherPrebuilds.NODE_SDPA_PREBUILD, 'prebuilds/aix-ppc64');
  mkdirSync(aix, { recursive: true });
  writeFileSync(join(aix, 'node-sdpa.node'), '');

  // What is wrong, the environment that makes it so, the cause and the remedy that are named.
  const failures: [string, Record<string, string>, RegExp, RegExp][] = [
    ['is missing', rootWith('missing', null), /there is no folder .*prebuilds\b/, /as external/],
    [
      'is not for this system',
      otherPrebuilds,
      /no binary for linux-\w+ \(glibc\), but aix-ppc64.node-sdpa.node\./,
      BUILD,
    ],
    ['is empty', rootWith('empty', ''), /no native addon/, REINSTALL],
    ['is a text', rootWith('text', 'text '.repeat(1000)), /no native addon/, REINSTALL],
    [
      'is cut off',
      rootWith('cut', genuine.subarray(0, 5000)),
      /cut off after 5000 of \d+/,
      REINSTALL,
    ],
    [
      'is for another processor',
      rootWith('arch', withHeader(MACHINE, otherArch)),
      /is for linux-(arm64|x64), and this is linux-(x64|arm64)/,
      REINSTALL,
    ],
    [
      'is for RISC-V',
      rootWith('riscv', withHeader(MACHINE, RISCV)),
      /is for linux-riscv64/,
      REINSTALL,
    ],
    ['is for Windows', rootWith('windows', windows), /is for win32-arm64/, REINSTALL],
    ['is for macOS', rootWith('mac', mac), /is for darwin-arm64/, REINSTALL],
    [
      'is for musl',
      rootWith('musl', otherLibc),
      /is for Linux with musl, and this system has glibc/,
      REINSTALL,
    ],
    [
      'needs a newer glibc',
      rootWith('glibc', altered(glibc, glibc.replace('_2.', '_9.'))),
      /GLIBC_9\.\d+/,
      BUILD,
    ],
    ['is of another version', rootWith('version', version9), /version 9\./, /Delete it/],
    [
      'has other fields',
      rootWith('fields', altered(',query_heads', ',query_hands')),
      /other fields/,
      /Delete it/,
    ],
  ];

  test.each(failures)(
    '%s: JavaScript computes, and backendInfo says why',
    async (_, env, reason, remedy) => {
      const result = await runProgram('info', { env });
      expect(result.backend).toBe('js');
      expect(result.info).toMatchObject({ selected: 'js', isa: null, threads: 1 });
      const passedOver = result.info.tried.find(
        ({ ok, backend }: { ok: boolean; backend: string }) => {
          return !ok && backend.startsWith('cpu');
        },
      );
      expect(passedOver.code).toBe('ERR_SDPA_LOAD_FAILED');
      expect(passedOver.reason).toMatch(reason);
      expect(passedOver.reason).toMatch(remedy);
      const js = await runProgram('info', { env: { SDPA_BACKEND: 'js' } });
      const here = await withEnvironment(env, (library) => library.backendInfo());
      expect(here).toMatchObject({ selected: 'js', tried: result.info.tried });
      expect(result.hash).toBe(js.hash);
    },
  );

  test.each(failures)(
    '%s: a native backend that is asked for is an error',
    async (_, env, reason) => {
      const tensor = { data: new Float32Array(1), dims: [1, 1, 1, 1] };
      const named = { backend: 'cpu' } as const;
      const rejected = await withEnvironment(env, (library) => {
        return library.attentionForward(tensor, tensor, tensor, named).catch((error) => error);
      });
      expect(rejected).toMatchObject({ message: expect.stringMatching(reason) });
      const finished = await runNode({ args: [INFO], env: { ...env, SDPA_BACKEND: 'cpu' } });
      expect(finished).toMatchObject({ status: 1, signal: null });
      expect(finished.stderr).toMatch(/ERR_SDPA_(BACKEND_UNAVAILABLE|LOAD_FAILED)/);
      expect(finished.stderr).toMatch(reason);
    },
  );

  test('a Node that is too old for it does not even try', async () => {
    const program = `Object.defineProperty(process, 'versions', {
        value: { ...process.versions, napi: '8', node: '14.21.3' },
      });
      console.log(JSON.stringify(require('node-sdpa').backendInfo()));`;
    const { stdout } = await runNode({ args: ['-e', program] });
    const { selected, tried } = JSON.parse(stdout);
    expect(selected).toBe('js');
    const { code, reason } = tried.find(({ backend }: { backend: string }) => backend === 'cpu');
    expect(code).toBe('ERR_SDPA_LOAD_FAILED');
    expect(reason).toMatch(/needs Node-API 9, and this runtime \(Node.js 14.21.3\) has 8/);
    expect(reason).toMatch(/Update to Node.js 20/);
  });

  test('a copy of the genuine one loads from there', async () => {
    const env = rootWith('copy', null);
    const path = join(env.NODE_SDPA_PREBUILD, 'build/Release/node_sdpa.node');
    copyFileSync(addonPath, path);
    const { info, backend } = await runProgram('info', { env });
    expect(info.binary).toBe(path);
    expect(backend).toBe(BACKENDS[0]);
  });
});
