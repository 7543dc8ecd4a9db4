// npx node-sdpa build: builds the native addon from the sources in the package, for machines that
// have no binary in it. A build works in a folder of its own; only an addon that loads is installed.
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import {
  buildWithCmake,
  buildWithGyp,
  compilerAdvice,
  copySources,
  findBuildSystem,
  root,
  run,
} from '../tools/build-native.mjs';

const { values: options } = parseArgs({ options: { out: { type: 'string' } } });
const out = path.resolve(options.out ?? root);
const installed = path.join(out, 'build/Release/node_sdpa.node');

const system = findBuildSystem();
if (system.name === null) fail(compilerAdvice(system.missing));
try {
  mkdirSync(path.dirname(installed), { recursive: true });
  writeFileSync(`${installed}.new`, '');
} catch (error) {
  fail(
    `${error}\nTake another folder: npx node-sdpa build --out FOLDER\n` +
      'and set NODE_SDPA_PREBUILD=FOLDER where the package is used.',
  );
}

const folder = mkdtempSync(path.join(tmpdir(), 'node-sdpa-build-'));
try {
  copySources(folder);
  installTools(folder);
  console.log(`building with ${system.name} ...`);
  const build =
    system.name === 'cmake' ? buildWithCmake(folder, [], { source: folder }) : buildWithGyp(folder);
  if (!build.ok) fail(`${build.output}\nThe build failed.`);
  tryOut(folder);
  copyFileSync(path.join(folder, 'build/Release/node_sdpa.node'), `${installed}.new`);
  renameSync(`${installed}.new`, installed);
} finally {
  rmSync(folder, { recursive: true, force: true });
  rmSync(`${installed}.new`, { force: true });
}
console.log(`${installed} is built, and will be used.`);
if (options.out !== undefined) console.log(`Set NODE_SDPA_PREBUILD=${out} for that.`);

/**
 * The programs and headers that a build needs, as this package's development has them. The package
 * itself does not depend on them: few users build it.
 * @param {string} folder
 */
function installTools(folder) {
  const file = path.join(folder, 'package.json');
  const { name, version, binary, devDependencies } = JSON.parse(readFileSync(file, 'utf8'));
  const tools = system.name === 'cmake' ? 'cmake-js' : 'node-gyp';
  const dependencies = Object.fromEntries(
    [tools, 'node-addon-api', 'node-api-headers'].map((tool) => [tool, devDependencies[tool]]),
  );
  writeFileSync(file, JSON.stringify({ name, version, binary, private: true, dependencies }));
  console.log(`installing ${Object.keys(dependencies).join(', ')} for the build ...`);
  const args = ['install', '--ignore-scripts', '--no-audit', '--no-fund', '--no-package-lock'];
  const result = npm(folder, args);
  if (!result.ok) fail(`${result.output}\nnpm could not install what the build needs.`);
}

/** npm: the one that started this, or the one beside Node. @param {string} cwd @param {string[]} args */
function npm(cwd, args) {
  const started = process.env.npm_execpath ?? '';
  const beside = path.join(
    path.dirname(process.execPath),
    '../lib/node_modules/npm/bin/npm-cli.js',
  );
  const script = [started, beside].find((file) => /npm-cli\.js$/.test(file) && existsSync(file));
  return script ? run(process.execPath, [script, ...args], { cwd }) : run('npm', args, { cwd });
}

/** Loads the new addon in a process of its own. @param {string} folder */
function tryOut(folder) {
  const env = { ...process.env, NODE_SDPA_PREBUILD: folder, SDPA_BACKEND: 'cpu' };
  const result = run(process.execPath, [path.join(root, 'bin/node-sdpa.mjs'), 'info'], { env });
  if (!result.ok || !/^computes +cpu:/m.test(result.output)) {
    fail(`${result.output}\nThe addon was built, but does not load.`);
  }
}

/**
 * @param {string} message
 * @returns {never}
 */
function fail(message) {
  throw Object.assign(new Error(message), { code: 'ERR_SDPA_BUILD_FAILED' });
}
