// Formats and lints: biome for TypeScript, JavaScript and JSON, clang-format for C++.
import { readdirSync } from 'node:fs';
import path from 'node:path';
import { root, run } from './build-native.mjs';

const isWrite = process.argv.includes('--write');
const isNative = /\.(h|cpp|inl|cu|cuh)$/;
const native = ['native', 'bench', 'test'].flatMap((folder) =>
  readdirSync(path.join(root, folder), { recursive: true, encoding: 'utf8' })
    .filter((name) => isNative.test(name))
    .map((name) => path.join(folder, name)),
);

const biome = ['node_modules/@biomejs/biome/bin/biome', 'check', '--error-on-warnings'];
const clang = ['node_modules/clang-format/index.js', ...native];
const results = [
  run(process.execPath, isWrite ? [...biome, '--write'] : biome, { print: true }),
  run(process.execPath, [...clang, ...(isWrite ? ['-i'] : ['--dry-run', '--Werror'])], {
    print: true,
  }),
];
if (!results.every((result) => result.ok)) {
  if (!isWrite) console.error('`npm run format` mends what can be mended.');
  process.exit(1);
}
