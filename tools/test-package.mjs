// Packs the package as it would be published, installs the tarball elsewhere, and uses it: no
// compiler runs, `require` and `import` share one copy with types, and the shipped binary computes.
import assert from 'node:assert/strict';
import { cpSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { copyCheckout, root, run } from './build-native.mjs';

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
try {
  const copy = path.join(folder, 'copy');
  copyCheckout(copy);
  cpSync(path.join(root, 'dist'), path.join(copy, 'dist'), { recursive: true });
  npm(copy, 'run', 'prebuild');
  npm(copy, 'pack', '--pack-destination', folder);
  const tarball = readdirSync(folder).find((name) => name.endsWith('.tgz'));

  const user = path.join(folder, 'user');
  mkdirSync(user);
  writeFileSync(path.join(user, 'package.json'), '{ "private": true }');
  const log = npm(user, 'install', '--ignore-scripts=false', path.join(folder, `${tarball}`));
  assert.doesNotMatch(log, /gyp|cmake/i);
  const installed = path.join(user, 'node_modules/node-sdpa');
  const files = readdirSync(installed).sort();
  assert(
    !files.includes('binding.gyp') && files.includes('LICENSE') && files.includes('README.md'),
  );

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
  console.log(`The package installs without a build and works: ${files.join(', ')}.`);
} finally {
  rmSync(folder, { recursive: true, force: true });
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
