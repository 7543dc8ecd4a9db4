// Makes the release's tarball, with the binaries that prebuilds/ has.
import { mkdirSync, readdirSync, rmSync } from 'node:fs';
import path from 'node:path';
import { root, run } from './build-native.mjs';

/**
 * Packs a checkout, and gives the tarball's path.
 * @param {string} [source]
 * @param {string} [destination] a folder; what it has is removed
 */
export function pack(source = root, destination = path.join(root, 'out/package')) {
  rmSync(destination, { recursive: true, force: true });
  mkdirSync(destination, { recursive: true });
  const npm = process.env.npm_execpath;
  const args = ['pack', '--ignore-scripts', '--pack-destination', destination];
  const options = { cwd: source };
  const result = npm ? run(process.execPath, [npm, ...args], options) : run('npm', args, options);
  const [name] = readdirSync(destination);
  if (!result.ok || name === undefined) throw new Error(`npm pack failed:\n${result.output}`);
  return path.join(destination, name);
}
