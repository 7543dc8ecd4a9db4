// Installs the packages that the benchmark compares with, on first use and apart from all others:
// they are large.
import { copyFileSync, existsSync, mkdirSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { root, run } from '../../tools/build-native.mjs';

/** Where they are; with the separator at its end, for createRequire. */
const PEERS_FOLDER = path.join(root, 'out', 'peers', path.sep);
const FILES = ['package.json', 'package-lock.json', '.npmrc'];

/** Does nothing where what the lockfile names is there. */
export function installPeers() {
  const sources = FILES.map((name) => fileURLToPath(new URL(`packages/${name}`, import.meta.url)));
  const copies = FILES.map((name) => path.join(PEERS_FOLDER, name));
  const isDone =
    existsSync(path.join(PEERS_FOLDER, 'node_modules', '.package-lock.json')) &&
    sources.every((file, i) => existsSync(copies[i]) && isEqual(file, copies[i]));
  if (isDone) return;
  process.stdout.write('installing the libraries to compare with ... ');
  mkdirSync(PEERS_FOLDER, { recursive: true });
  for (const [i, file] of sources.entries()) copyFileSync(file, copies[i]);
  const npm = process.env.npm_execpath;
  const args = ['ci', '--ignore-scripts', '--no-audit', '--no-fund'];
  const result = npm
    ? run(process.execPath, [npm, ...args], { cwd: PEERS_FOLDER })
    : run('npm', args, { cwd: PEERS_FOLDER });
  console.log(result.ok ? 'done' : `failed\n${result.output}`);
  if (!result.ok) process.exit(1);
}

/** An installed package. @param {string} name @returns {any} */
export function loadPeer(name) {
  return createRequire(PEERS_FOLDER)(name);
}

/** @param {string} a @param {string} b */
function isEqual(a, b) {
  return readFileSync(a).equals(readFileSync(b));
}
