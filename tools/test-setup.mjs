// Plays a machine without a compiler: `npm start` goes on in JavaScript and says so, `npm test`
// fails and says what to install. The files are copied aside, so that no build is touched.
import assert from 'node:assert/strict';
import { existsSync, mkdirSync, mkdtempSync, rmSync, symlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { copyCheckout, run } from './build-native.mjs';

const folder = mkdtempSync(path.join(tmpdir(), 'node-sdpa-'));
try {
  const copy = path.join(folder, 'copy');
  copyCheckout(copy);

  // A PATH with Node and a shell, and nothing else.
  const bin = path.join(folder, 'bin');
  mkdirSync(bin);
  symlinkSync(process.execPath, path.join(bin, 'node'));
  symlinkSync('/bin/sh', path.join(bin, 'sh'));
  const npm = process.env.npm_execpath;
  assert(npm, 'run this as npm run test:setup');
  const play = (/** @type {string[]} */ ...args) =>
    run(process.execPath, [npm, ...args], {
      cwd: copy,
      env: { HOME: process.env.HOME, PATH: bin },
    });

  const start = play('start');
  assert(start.ok, `npm start without a compiler:\n${start.output}`);
  assert.match(start.output, /apt-get install g\+\+/);
  assert.match(start.output, /Going on with the JavaScript backend/);
  assert(existsSync(path.join(copy, 'out/attention.png')), 'the demo drew no picture');

  const test = play('test');
  assert(!test.ok, 'npm test without a compiler has to fail');
  assert.match(test.output, /apt-get install g\+\+/);
  assert.doesNotMatch(test.output, /RUN|Tests/);
  console.log('Without a compiler, npm start went on in JavaScript and npm test said what to do.');
} finally {
  rmSync(folder, { recursive: true, force: true });
}
