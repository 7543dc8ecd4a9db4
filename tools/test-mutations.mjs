// Breaks the kernels on purpose, one way at a time, and shows that `npm run fuzz` finds each within
// a minute: a check of the fuzzer, to be run by hand after a change to it. Works on a copy; compiles
// only the portable kernels, which are the algorithm of every instruction set but AMX.
import { cpSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { root, run } from './build-native.mjs';

const SECONDS = 60;

/** @type {{name: string, file: string, from: string, to: string}[]} */
const MUTATIONS = [
  {
    name: 'the last key is dropped where it begins a tile',
    file: 'cpu/tile.inl',
    from: 'return first >= end; }',
    to: 'return first + 1 >= end && first > 0; }',
  },
  {
    name: 'a decision is read from the other half of its word',
    file: 'cpu/tile.inl',
    from: 'lane, half_at_least<1>(w[i], threshold));',
    to: 'lane, half_at_least<0>(w[i], threshold));',
  },
  {
    name: 'the diagonal of the causal rule is one key early',
    file: 'core/mask_rules.h',
    from: 'diagonal + v.right + 1;',
    to: 'diagonal + v.right + (v.right != 0);',
  },
  {
    name: 'a window reaches one key less to the left',
    file: 'core/mask_rules.h',
    from: 'diagonal - v.left;',
    to: 'diagonal - v.left + 1;',
  },
  {
    name: 'the context is not rescaled when the maximum moves',
    file: 'cpu/attention_forward.inl',
    from: 'store(c, mul(load(c), correction));',
    to: 'store(c, load(c));',
  },
  {
    name: 'query heads take key heads in turn, not in groups',
    file: 'cpu/tile.inl',
    from: 'q.kv_head = head / (p.query_heads / p.kv_heads);',
    to: 'q.kv_head = head % p.kv_heads;',
  },
  {
    name: 'Delta is off by a thousandth',
    file: 'cpu/attention_backward.inl',
    from: 'f.delta[i] = float(delta);',
    to: 'f.delta[i] = float(delta) * 0.999f;',
  },
  {
    name: 'dropout is rescaled by the stated p, not by its nearest step',
    file: 'core/dropout.h',
    from: 'has_keep_mask ? p.dropout_p : threshold / 65536.0;',
    to: 'p.dropout_p + 0.0 * has_keep_mask;',
  },
  {
    name: 'a coefficient of exp is off by 10^-3',
    file: 'cpu/tile.inl',
    from: 'broadcast(1.66665152e-1f)',
    to: 'broadcast(1.66832e-1f)',
  },
];

const work = path.join(root, 'out/mutation');
const objects = objectsOf(path.join(root, 'build/CMakeFiles'));
let missed = 0;
for (const { name, file, from, to } of MUTATIONS) {
  rmSync(work, { recursive: true, force: true });
  mkdirSync(path.join(work, 'build/Release'), { recursive: true });
  cpSync(path.join(root, 'native'), path.join(work, 'native'), { recursive: true });
  const source = path.join(work, 'native', file);
  const text = readFileSync(source, 'utf8');
  if (text.split(from).length !== 2) fail(`${file} does not have exactly one "${from}"`);
  writeFileSync(source, text.replace(from, to));
  build();
  const start = Date.now();
  const fuzz = path.join(root, 'test/fuzz/main.ts');
  const args = ['--import', 'tsx', fuzz, '--backend', 'cpu:portable', '--seconds', `${SECONDS}`];
  const env = { ...process.env, NODE_SDPA_PREBUILD: work };
  const { ok, output } = run(process.execPath, args, { env });
  const seconds = ((Date.now() - start) / 1000).toFixed(0);
  const found = output.match(/FAILED: (.*)/)?.[1];
  if (ok || !found) missed++;
  console.log(`${name} | ${found ? `found in ${seconds} s: ${found.slice(0, 90)}` : 'MISSED'}`);
}
rmSync(work, { recursive: true, force: true });
console.log(`${MUTATIONS.length - missed} of ${MUTATIONS.length} found`);
process.exit(missed === 0 ? 0 : 1);

/** The objects of the addon's build but the portable kernels', which are compiled anew. */
function objectsOf(/** @type {string} */ folder) {
  const wanted = /^(kernels\.dir|node_sdpa\.dir\/native\/(addon|static_runtime)).*\.o$/;
  return readdirSync(folder, { recursive: true, encoding: 'utf8' })
    .filter((name) => wanted.test(name) && !name.endsWith('/portable.cpp.o'))
    .map((name) => path.join(folder, name));
}

function build() {
  const compiler = process.env.CXX || 'c++';
  const object = path.join(work, 'portable.o');
  const flags = ['-std=c++17', '-O1', '-fPIC', '-fexceptions', '-ffp-contract=off'];
  const source = path.join(work, 'native/cpu/portable.cpp');
  const compiled = run(compiler, [...flags, `-I${work}/native`, '-c', source, '-o', object]);
  if (!compiled.ok) fail(compiled.output);
  const binary = path.join(work, 'build/Release/node_sdpa.node');
  const linked = run(compiler, ['-shared', '-fPIC', '-o', binary, object, ...objects, '-lpthread']);
  if (!linked.ok) fail(linked.output);
}

/** @param {string} message @returns {never} */
function fail(message) {
  console.error(message);
  process.exit(1);
}
