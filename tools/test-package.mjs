// Packs the package as it would be published, and checks the tarball: its size, its files and its
// types; then installs it elsewhere and uses it: no compiler runs, `require` and `import` share one
// copy with types, the shipped binary computes, and the command line works.
import assert from 'node:assert/strict';
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { copyCheckout, root, run } from './build-native.mjs';
import { pack } from './pack.mjs';

/** The greatest size of the tarball, in bytes. */
const MOST_BYTES = 20_000_000;

/** What lies in the package's folder. `binding.gyp` would make npm and pnpm compile on install. */
const FILES = [
  ...['ARCHITECTURE.md', 'CHANGELOG.md', 'CMakeLists.txt', 'LICENSE', 'README.md', 'SECURITY.md'],
  ...['bench', 'bin', 'dist', 'native', 'package.json', 'prebuilds', 'tools'],
];
const INSTALL_SCRIPTS = ['preinstall', 'install', 'postinstall', 'prepare', 'prepublish'];

const USE = `
const { backend, output } = sdpa.attentionForwardSync(...[1, 2, 3].map((x) => {
  return new sdpa.Tensor('float32', Float32Array.of(x, x), [1, 1, 2, 1]);
}));
if (!backend.startsWith('cpu:') || output.data[0] !== 3) throw new Error(backend);
`;
const CONSUMERS = {
  'use.cjs': `const sdpa = require('node-sdpa');\n${USE}`,
  'use.mjs': `import * as sdpa from 'node-sdpa';\n${USE}
    import { createRequire } from 'node:module';
    const { Tensor } = createRequire(import.meta.url)('node-sdpa');
    if (Tensor !== sdpa.Tensor) throw new Error('require and import have a copy each');`,
};
const TYPED = `import { attentionForwardSync, Tensor, type AttentionResult } from 'node-sdpa';
const x = new Tensor('float32', new Float32Array(2), [1, 1, 2, 1]);
export const result: AttentionResult = attentionForwardSync(x, x, x, { isCausal: true });\n`;

const folder = mkdtempSync(path.join(tmpdir(), 'node-sdpa-'));
const user = path.join(folder, 'user');
const installed = path.join(user, 'node_modules/node-sdpa');
try {
  const tarball = pack();
  checkSize(tarball);
  checkReproducible(tarball);
  checkMaterials();
  checkTypes(tarball);
  install(tarball);
  useAsLibrary();
  useCommands();
  console.log(`The package installs without a build and works; it is ${tarball}.`);
} finally {
  rmSync(folder, { recursive: true, force: true });
}

/** @param {string} tarball */
function checkSize(tarball) {
  const { size } = statSync(tarball);
  assert(size <= MOST_BYTES, `${tarball} has ${size} bytes, more than ${MOST_BYTES}`);
  console.log(`${path.basename(tarball)} has ${size} bytes`);
}

/** The same tree, elsewhere and later, packs to the same bytes. @param {string} tarball */
function checkReproducible(tarball) {
  const copy = path.join(folder, 'copy');
  copyCheckout(copy);
  for (const name of ['dist', 'prebuilds']) {
    cpSync(path.join(root, name), path.join(copy, name), { recursive: true }); // as of now
  }
  const again = pack(copy, path.join(folder, 'packed again'));
  const [first, second] = [tarball, again].map((file) => readFileSync(file));
  assert(first?.equals(/** @type {Buffer} */ (second)), 'two packs of one tree differ');
  rmSync(copy, { recursive: true });
}

/** The bill of materials names what package.json does, and nothing else. */
function checkMaterials() {
  const { dependencies } = JSON.parse(readFileSync(path.join(root, 'package.json'), 'utf8'));
  const bill = JSON.parse(npm(root, 'run', '--silent', 'sbom').replace(/^npm warn.*$/gm, ''));
  const names = bill.components.map((/** @type {{name: string}} */ { name }) => name);
  assert.deepEqual(names, Object.keys(dependencies));
}

/** publint and attw: the exports and types are right for every kind of import. @param {string} tarball */
function checkTypes(tarball) {
  const modules = path.join(root, 'node_modules');
  const publint = [path.join(modules, 'publint/src/cli.js'), tarball, '--strict'];
  must(run(process.execPath, publint));
  must(run(process.execPath, [path.join(modules, '@arethetypeswrong/cli/dist/index.js'), tarball]));
}

/** @param {string} tarball */
function install(tarball) {
  mkdirSync(user);
  writeFileSync(path.join(user, 'package.json'), '{ "private": true }');
  const log = npm(user, 'install', '--ignore-scripts=false', tarball);
  assert.doesNotMatch(log, /gyp|cmake/i);
  assert.deepEqual(readdirSync(installed).sort(), FILES);
  const { scripts } = JSON.parse(readFileSync(path.join(installed, 'package.json'), 'utf8'));
  assert.deepEqual(
    INSTALL_SCRIPTS.filter((name) => Object.hasOwn(scripts, name)),
    [],
  );
}

function useAsLibrary() {
  for (const [name, code] of Object.entries(CONSUMERS)) {
    writeFileSync(path.join(user, name), code);
    must(run(process.execPath, [name], { cwd: user }));
  }
  for (const name of ['typed.mts', 'typed.cts']) {
    writeFileSync(path.join(user, name), TYPED);
    const tsc = path.join(root, 'node_modules/typescript/bin/tsc');
    const strict = ['--noEmit', '--strict', '--module', 'node16', '--target', 'es2022'];
    const lib = ['--lib', 'es2022,esnext.disposable', '--typeRoots', `${root}/node_modules/@types`];
    must(run(process.execPath, [tsc, ...strict, ...lib, '--types', 'node', name], { cwd: user }));
  }
}

/** `npx node-sdpa info | bench | build`, and what they say where something is missing. */
function useCommands() {
  const binary = path.join(installed, 'build/Release/node_sdpa.node');
  const shipped = must(command(['info']));
  assert.match(shipped, /^binary +\S+prebuilds\S+\.node$/m);
  assert.match(shipped, /^computes +cpu:\w+, up to \d+ threads? a call$/m);
  assert.match(must(command(['help'])), /build .*from source/);
  assert.match(mustNot(command(['info', '--wrong'])), /^Unknown option '--wrong'/);
  assert.match(mustNot(command(['wrong'])), /^wrong: no such command/);

  const bench = must(command(['bench', '--quick', '--shapes', '1x12x128x64', '--threads', '1']));
  assert.match(bench, /^ +js +1( +[\d.]+){5}/m);
  assert.match(bench, /^1x12x128x64 +cpu:\w+ +1( +[\d.]+){5}/m);

  // A PATH with Node and nothing else.
  const bin = path.join(folder, 'bin');
  mkdirSync(bin);
  symlinkSync(process.execPath, path.join(bin, 'node'));
  const bare = mustNot(command(['build'], { PATH: bin, CXX: '' }));
  assert.match(
    bare,
    /needs a C\+\+17 compiler: none was found.*\n.*apt-get install g\+\+ make cmake/,
  );

  const file = path.join(folder, 'a file');
  writeFileSync(file, '');
  assert.match(mustNot(command(['build', '--out', file])), /--out FOLDER/);

  const elsewhere = path.join(folder, 'else where');
  must(command(['build', '--out', elsewhere]));
  assert(!existsSync(binary));
  const there = must(command(['info'], { NODE_SDPA_PREBUILD: elsewhere }));
  assert.match(there, /^binary +\S+else where\S+\.node$/m);

  // Without CMake, node-gyp builds the same.
  const python = must(run('python3', ['-c', 'import sys; print(sys.executable)'])).trim();
  symlinkSync(python, path.join(bin, 'python3'));
  for (const name of readdirSync('/usr/bin')) {
    const link = path.join(bin, name);
    if (name !== 'cmake' && !existsSync(link)) symlinkSync(path.join('/usr/bin', name), link);
  }
  const built = must(command(['build'], { PATH: bin }));
  assert.match(built, /building with node-gyp/);
  assert.match(must(command(['info'])), /^binary +\S+build\/Release\/node_sdpa\.node$/m);
  assert.deepEqual(readdirSync(path.dirname(binary)), ['node_sdpa.node']);
}

/** @param {string[]} args @param {Record<string, string>} [env] */
function command(args, env = {}) {
  const program = path.join(installed, 'bin/node-sdpa.mjs');
  return run(process.execPath, [program, ...args], { cwd: user, env: { ...process.env, ...env } });
}

/**
 * @param {string} cwd
 * @param {string[]} args
 */
function npm(cwd, ...args) {
  assert(process.env.npm_execpath, 'run this as npm run test:package');
  return must(run(process.execPath, [process.env.npm_execpath, ...args], { cwd }));
}

/** @param {{ok: boolean, output: string}} result */
function must({ ok, output }) {
  assert(ok, output);
  return output;
}

/** @param {{ok: boolean, output: string}} result */
function mustNot({ ok, output }) {
  assert(!ok, output);
  return output;
}
