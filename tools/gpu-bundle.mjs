// Packs what a machine with a GPU needs beside Node into out/gpu: the tests of the backends as one
// file, their vectors, and the binaries. `npm run test:gpu` runs it; `node tools/gpu-bundle.mjs` is
// for machines to copy out/gpu to, where `node dist/tests.cjs` does the rest.
import { cpSync, existsSync, mkdirSync, rmSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import { root } from './build-native.mjs';
import { PLUGIN } from './check-binaries.mjs';

export const bundle = path.join(root, 'out/gpu');

const FILES = [
  'test/gpu/checks.test.ts',
  ...[
    'conformance',
    'properties',
    'dropout',
    'packed',
    'precision',
    'samples',
    'splits',
    'special-values',
  ],
].map((name) => (name.includes('/') ? name : `test/${name}.test.ts`));

/** @param {string} binaries the folder of addon and plugin */
export async function makeBundle(binaries = path.join(root, 'build/Release')) {
  rmSync(bundle, { recursive: true, force: true });
  mkdirSync(path.join(bundle, 'build/Release'), { recursive: true });
  for (const name of ['node_sdpa.node', PLUGIN.name]) {
    const file = path.join(binaries, name);
    if (existsSync(file)) cpSync(file, path.join(bundle, 'build/Release', name));
  }
  cpSync(path.join(root, 'test/vectors'), path.join(bundle, 'dist/vectors'), { recursive: true });
  cpSync(path.join(root, 'package.json'), path.join(bundle, 'package.json'));
  const published = process.env.SDPA_CONFORMANCE ?? path.join(root, '../shared/conformance');
  if (existsSync(published)) {
    cpSync(published, path.join(bundle, 'conformance'), { recursive: true });
  }
  const loads = FILES.map((file) => `startFile('${file}'); require('../../${file}');`);
  const entry = `import { hasGpu, runFiles } from './main';
    import { startFile } from './vitest';
    if (hasGpu()) { ${loads.join('\n')} runFiles(); }`;
  await build({
    stdin: { contents: entry, resolveDir: path.join(root, 'test/gpu'), loader: 'ts' },
    outfile: path.join(bundle, 'dist/tests.cjs'),
    bundle: true,
    platform: 'node',
    target: 'node20',
    format: 'cjs',
    alias: { vitest: path.join(root, 'test/gpu/vitest.ts') },
    define: { 'process.env.SDPA_TEST_BACKENDS': '"cuda"' },
    logLevel: 'error',
  });
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  await makeBundle();
  console.log(`${bundle} is ready: copy it, and run node dist/tests.cjs there.`);
}
