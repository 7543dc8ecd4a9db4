// Installs packages that only one tool of ours needs, apart from the development dependencies: they
// are large, or ask for other versions.
import { copyFileSync, existsSync, mkdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { root, run } from './build-native.mjs';

const FILES = ['package.json', 'package-lock.json', '.npmrc'];

/** Runtimes for other systems, which npm takes by force only: they can be no dependencies. */
export function installForeignRuntimes() {
  return installApart(path.join(root, 'test/cross'), ['--force']);
}

/**
 * Installs what the lockfile in a folder names, if it is not there yet, and gives the folder of
 * the installed packages, below out/packages.
 * @param {string} source folder with package.json, package-lock.json and .npmrc
 * @param {string[]} [more] arguments for npm
 */
export function installApart(source, more = []) {
  const name = path.basename(source);
  const folder = path.join(root, 'out/packages', name);
  const modules = path.join(folder, 'node_modules');
  const isSame = (/** @type {string} */ file) => {
    const copy = path.join(folder, file);
    return existsSync(copy) && readFileSync(copy).equals(readFileSync(path.join(source, file)));
  };
  if (existsSync(path.join(modules, '.package-lock.json')) && FILES.every(isSame)) return modules;
  process.stdout.write(`installing what ${name} needs ... `);
  mkdirSync(folder, { recursive: true });
  const args = ['ci', '--ignore-scripts', '--no-audit', '--no-fund', ...more];
  const npm = process.env.npm_execpath;
  for (const file of FILES) copyFileSync(path.join(source, file), path.join(folder, file));
  const result = npm
    ? run(process.execPath, [npm, ...args], { cwd: folder })
    : run('npm', args, { cwd: folder });
  console.log(result.ok ? 'done' : `failed\n${result.output}`);
  if (!result.ok) process.exit(1);
  return modules;
}
