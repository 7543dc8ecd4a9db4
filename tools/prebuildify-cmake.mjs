#!/usr/bin/env node
// Lets prebuildify package the CMake build: it is run as node-gyp would be, and runs cmake-js.
// prebuildify's --target is a Node version, but cmake-js's is a CMake target: it is translated.
import { parseArgs } from 'node:util';
import { root, run } from './build-native.mjs';

const { values, positionals } = parseArgs({
  strict: false,
  allowPositionals: true,
  options: { target: { type: 'string' }, arch: { type: 'string' } },
});
const args = [`${root}/node_modules/cmake-js/bin/cmake-js`, positionals[0] ?? 'rebuild'];
if (values.target) args.push('--runtime-version', String(values.target));
if (values.arch) args.push('--arch', String(values.arch));
process.exit(run(process.execPath, args, { print: true }).status);
