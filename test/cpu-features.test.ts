// Processors that lack a feature: which backend they get, that it computes what it should, and that
// no instruction is used that they do not have. Features are taken away by SDPA_CPU_FEATURES_OFF
// (native/cpu/cpu_features.h), or by an emulator that refuses them; and the instructions in the
// binary are held against what each backend asks for.
import { spawnSync } from 'node:child_process';
import { describe, expect, test } from 'vitest';
import { loadBinding } from '../lib/binding';
import { namedTensors } from './cases';
import { runNode } from './child';
import { decodeHalf } from './half';
import {
  type Call,
  expectBounded,
  expected,
  NATIVE_BACKENDS,
  publicOptions,
  representable,
  stored,
  X64_BACKENDS,
} from './harness';
import type { Storage } from './reference';

const TYPES: readonly Storage[] = ['float32', 'float16', 'bfloat16'];

/** Enough queries for every kernel, with dropout, a rest of queries and of keys, in each type. */
const calls = TYPES.map((type) =>
  representable({
    ...namedTensors({ name: '', seed: 19, shape: [1, 2, 1, 70, 70, 24, 24], options: {} }),
    options: { isCausal: true, dropoutP: 0.2, training: true, seed: 5, offset: 1 },
    type,
  }),
);
const answers = calls.map((call) => {
  const { output, droppedWeights, backward } = expected(call);
  return { output, droppedWeights, ...backward(call.gradOutput!.data) };
});
const input = JSON.stringify(
  calls.map((call) => ({
    query: plain(call.query, call.type),
    key: plain(call.key, call.type),
    value: plain(call.value, call.type),
    gradOutput: plain(call.gradOutput!, call.type),
    options: publicOptions(call),
  })),
);

function plain(tensor: Call['query'], type: Storage = 'float32') {
  const { data, dims } = stored(tensor, type);
  return { data: Array.from(data), dims, type };
}

/** Runs the calls in a process of its own, and checks what they gave. Returns the backend. */
async function backendThatRan(env: Record<string, string>, emulated?: string): Promise<string> {
  const finished = await runNode({ args: ['test/programs/calls.mjs'], env, input, emulated });
  // An instruction that the processor does not have would be SIGILL.
  expect(finished, finished.stderr).toMatchObject({ status: 0, signal: null });
  const { info, results } = JSON.parse(finished.stdout);
  for (const [i, result] of results.entries()) {
    const { type } = calls[i];
    expect(result.backend).toBe(info.selected);
    for (const name of ['output', 'gradQuery', 'gradKey', 'gradValue'] as const) {
      const values: number[] = result[name];
      const numbers =
        type === 'float32' ? values : values.map((x) => decodeHalf(type as 'float16', x));
      expectBounded(`${type} ${name}`, numbers, answers[i][name]);
    }
    const { droppedWeights } = answers[i];
    expectBounded(`${type} droppedWeights`, result.droppedWeights, droppedWeights);
    const drops = (x: number) => x === 0;
    expect(result.droppedWeights.map(drops)).toEqual(Array.from(droppedWeights.values, drops));
  }
  return info.selected;
}

const onX64Linux = process.arch === 'x64' && process.platform === 'linux';
if (!onX64Linux) console.log('skipped: processors that lack a feature (made for Linux on x86-64)');

const FEATURES = [...new Set(X64_BACKENDS.flatMap(({ needs, system }) => [...needs, ...system]))];

if (onX64Linux) {
  describe('a processor without', () => {
    const combinations: string[][] = [
      [],
      ...FEATURES.map((name) => [name]),
      ['amx_tile', 'amx_bf16', 'os_amx', 'amx_permission'],
      ['avx512_bf16', 'avx512vl'],
      ['avx512f', 'avx512dq', 'avx512bw', 'avx512vl', 'os_avx512'],
      ['amx_permission', 'f16c'],
      ['avx2', 'fma', 'f16c'],
      FEATURES,
    ];
    test.each(combinations.map((missing) => [missing.join(',') || 'no feature', missing] as const))(
      '%s',
      async (_, missing) => {
        const backend = await backendThatRan({ SDPA_CPU_FEATURES_OFF: missing.join(',') });
        const left = X64_BACKENDS.filter(({ name, needs, system }) => {
          const lacks = [...needs, ...system].some((feature) => missing.includes(feature));
          return NATIVE_BACKENDS.includes(name) && !lacks;
        });
        expect(backend).toBe(left[0].name);
      },
    );

    test.each(['', ',,', 'avx51,vx2,AVX2, fma,avx512', 'neon,portable,everything'])(
      'names that are none (%j)',
      async (names) => {
        const backend = await backendThatRan({ SDPA_CPU_FEATURES_OFF: names });
        expect(backend).toBe(NATIVE_BACKENDS[0]);
      },
    );

    test('a feature cannot be asked for, and a named backend that lacks one is an error', async () => {
      const env = { SDPA_CPU_FEATURES_OFF: 'f16c', SDPA_CPU_ISA: 'avx2' };
      const finished = await runNode({ args: ['test/programs/calls.mjs'], env, input });
      expect(finished).toMatchObject({ status: 1, signal: null });
      expect(finished.stderr).toContain('ERR_SDPA_BACKEND_UNAVAILABLE');
    });
  });
}

const hasEmulator = onX64Linux && spawnSync('qemu-x86_64', ['--version']).status === 0;
if (!hasEmulator) console.log('skipped: emulated processors (no qemu-x86_64 here)');

if (hasEmulator) {
  // An old processor and what AVX2 kernels ask for: all else is an illegal instruction to it, even
  // POPCNT, which compilers take for granted beside AVX2. No emulator has AVX-512: see below.
  describe('an emulated processor', () => {
    const needed = ['xsave', 'avx', 'avx2', 'fma', 'f16c'];
    const model = (features: string[]) =>
      ['Nehalem', '-popcnt', ...features.map((name) => `+${name}`)].join(',');

    test('with AVX2, FMA and F16C', async () => {
      expect(await backendThatRan({}, model(needed))).toBe('cpu:avx2');
    });

    const missing: [string, string[]][] = [
      ['any of them', needed],
      ['AVX2', ['avx2']],
      ['FMA', ['fma']],
      ['F16C', ['f16c']],
    ];
    test.each(missing)('without %s', async (_, features) => {
      const rest = needed.filter((name) => !features.includes(name));
      expect(await backendThatRan({}, model(rest))).toBe('cpu:portable');
    });
  });
}

const binutils = ['objdump', 'as'].every((name) => spawnSync(name, ['--version']).status === 0);
if (onX64Linux && !binutils) console.log('skipped: the instructions in the binary (no binutils)');

if (onX64Linux && binutils) {
  describe('the instructions in the binary', () => {
    const instructions = disassemble(loadBinding().path!);

    test.each(X64_BACKENDS)('$name has those of what it asks for, and no others', (backend) => {
      const own = instructions.get(backend.name) ?? [];
      expect(own.length).toBeGreaterThan(1000);
      expect(refused(own, backend.needs)).toEqual([]);
      // Proof that the assembler does refuse: the next backend's features are not enough.
      const next = X64_BACKENDS[X64_BACKENDS.indexOf(backend) + 1];
      if (next) expect(refused(own, next.needs).length).toBeGreaterThan(100);
    });

    test('everything else is for any x86-64', () => {
      const own = instructions.get('')!;
      expect(own.length).toBeGreaterThan(1000);
      // These ask the processor first: our detection, C++'s random_device, shadow stacks.
      const guarded = /^(xgetbv|rdrand|rdseed|rdssp|incssp|endbr64)/;
      expect(refused(own, []).filter((text) => !guarded.test(text))).toEqual([]);
    });
  });
}

/** The distinct instructions of each backend's functions; of all others under ''. */
function disassemble(file: string): Map<string, string[]> {
  const args = ['--disassemble', '--no-show-raw-insn', file];
  const { stdout } = spawnSync('objdump', args, { encoding: 'utf8', maxBuffer: 1 << 30 });
  const sets = new Map<string, Set<string>>();
  let current = new Set<string>();
  for (const line of stdout.split('\n')) {
    const symbol = line.match(/^[0-9a-f]+ <(.*)>:$/);
    if (symbol) {
      const isa = symbol[1].match(/4sdpa\d+(avx2|avx512|amx|portable)/)?.[1];
      const name = isa ? `cpu:${isa}` : '';
      current = sets.get(name) ?? new Set();
      sets.set(name, current);
    }
    const text = line.match(/^\s+[0-9a-f]+:\t(.*)$/)?.[1].replace(/\s*(#.*|<[^>]*>)/g, '');
    // Jumps name places that are not there; padding is spelled in ways of its own.
    if (text && !/^(bnd |notrack )?(j|call|loop|xbegin|data16|cs nop|nop)/.test(text)) {
      current.add(text.trim());
    }
  }
  return new Map([...sets].map(([name, set]) => [name, [...set]]));
}

/** What an assembler for x86-64 with these features and no more does not take. */
function refused(instructions: string[], features: readonly string[]): string[] {
  const args = ['--64', `-march=${['generic64', ...features].join('+')}`, '-o', '/dev/null', '-'];
  const { stderr } = spawnSync('as', args, {
    input: `${instructions.join('\n')}\n`,
    encoding: 'utf8',
    maxBuffer: 1 << 28,
  });
  return [...stderr.matchAll(/^.*?:(\d+): Error/gm)].map(
    ([, row]) => instructions[Number(row) - 1],
  );
}
