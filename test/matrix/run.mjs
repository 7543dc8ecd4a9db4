// Installs the packed package by every package manager and runs it on every runtime: by import and
// by require, in the main thread and in a worker; in odd places; and packed by bundlers. Prints one
// table, and writes out/matrix.json. x86-64 Linux only.
//
//   npm run test:matrix -- [options]
//     --only TEXT    only rows with this in their names
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { root } from '../../tools/build-native.mjs';
import { installApart } from '../../tools/install-apart.mjs';
import { pack } from '../../tools/pack.mjs';
import { INSTALLERS } from './installers.mjs';
import { startRegistry } from './registry.mjs';

const HERE = path.dirname(fileURLToPath(import.meta.url));
const { values: options } = parseArgs({ options: { only: { type: 'string', default: '' } } });

const modules = installApart(HERE);
const inModules = (/** @type {string} */ name) => path.join(modules, name);

/** What runs the package: its name, its program, and the arguments before a script. */
const RUNTIMES = [
  ...[20, 22, 24, 26].map((major) => ({
    name: `Node ${major}`,
    command: [inModules(`node${major}/bin/node`)],
  })),
  { name: 'Bun', command: [inModules('bun/bin/bun')] },
  { name: 'Deno', command: [inModules('deno/deno'), 'run', '--allow-all', '--quiet'] },
];
/** Runs verdaccio, package managers and bundlers. */
const NODE = inModules('node22/bin/node');

/** What a package manager may not say: a warning about the package, or that it ran a script of its. */
const WARNING = /^(?=.*(node-sdpa|node-gyp-build))(?=.*(warn|deprecat|denied)).*$/im;
const SCRIPT =
  /\b(?:pre|post)?install[$:]|> .*install$|scripts?\b.*\b(not|blocked|ignored)|(ignored|blocked|running) .*(script|install)|must be built|node-gyp rebuild|cmake/im;

/** @type {{row: string, column: string, problem: string | null}[]} */
const cells = [];
const start = Date.now();
const folder = realpathSync(mkdtempSync(path.join(tmpdir(), 'node-sdpa-matrix-')));
chmodSync(folder, 0o755);
const registry = await startRegistry({
  ...{ folder: path.join(folder, 'registry'), node: NODE, modules, tarball: pack() },
});
try {
  testInstallers();
  testPlaces();
  testBundles();
} finally {
  registry.stop();
  rmSync(folder, { recursive: true, force: true });
}
report();

/** Every package manager, with scripts and without, then every runtime on what it installed. */
function testInstallers() {
  for (const installer of INSTALLERS) {
    for (const scripts of /** @type {const} */ (['allow', 'ignore'])) {
      const row = `${installer.name}${scripts === 'ignore' ? ', no scripts' : ''}`;
      if (!row.includes(options.only)) continue;
      const project = path.join(folder, row, 'Übung mit Leerzeichen 注意');
      const installed = cell(row, 'install', () => install(installer, scripts, project));
      if (!installed) continue;
      const able = RUNTIMES.filter(({ name }) => installer.runtimes?.test(name) ?? true);
      for (const runtime of able) {
        const nodeOptions = runtime.name.startsWith('Node') ? installer.nodeOptions : [];
        cell(row, runtime.name, () => runBoth(runtime, project, nodeOptions));
      }
    }
  }
}

/**
 * @param {import('./installers.mjs').Installer} installer
 * @param {'allow' | 'ignore'} scripts
 * @param {string} project
 */
function install(installer, scripts, project) {
  mkdirSync(project, { recursive: true });
  writeFileSync(path.join(project, 'package.json'), '{ "name": "user", "private": true }');
  const files = { '.npmrc': `registry=${registry.url}\n`, ...installer.files?.(registry.url) };
  for (const [name, text] of Object.entries(files)) {
    writeFileSync(path.join(project, name), text);
  }
  const [program, ...args] = installer.command;
  const command = /js$/.test(program) ? [NODE, inModules(program)] : [inModules(program)];
  const { ok, output } = execute([...command, ...args, ...installer[scripts]], project);
  assert(ok, output);
  assert.doesNotMatch(output, WARNING);
  assert.doesNotMatch(output, SCRIPT);
  cpSync(path.join(HERE, 'project'), project, { recursive: true });
}

/**
 * By require and by import; both do the same in a worker.
 * @param {typeof RUNTIMES[number]} runtime
 * @param {string} project
 * @param {string[]} [more] arguments for the runtime
 */
function runBoth(runtime, project, more = []) {
  for (const script of ['use.cjs', 'use.mjs']) {
    const { ok, output } = execute([...runtime.command, ...more, script], project);
    assert(ok, `${script}: ${output}`);
    const loaded = output.split('\n').find((line) => line.startsWith('[{'));
    const threads = JSON.parse(loaded ?? '[]');
    assert.equal(threads.length, 2, output);
    for (const { selected, binary } of threads) {
      assert.match(selected, /^cpu:/);
      assert.match(binary, /prebuilds\/linux-x64\/node-sdpa\.glibc\.node$/);
    }
  }
}

/** Places where files cannot be written, or that another user owns. */
function testPlaces() {
  const row = 'read-only folder';
  if (!row.includes(options.only)) return;
  const project = path.join(folder, 'read-only');
  if (!cell(row, 'install', () => install(INSTALLERS[0], 'allow', project))) return;
  for (const name of readdirSync(project, { recursive: true, encoding: 'utf8' })) {
    const file = path.join(project, name);
    if (existsSync(file)) chmodSync(file, 0o555);
  }
  chmodSync(project, 0o555);
  // root may write anywhere: another user may not.
  const isRoot = process.getuid?.() === 0;
  const nobody = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups'];
  for (const { name, command } of RUNTIMES) {
    cell(row, name, () => {
      const asNobody = isRoot ? [...nobody, ...command] : command;
      const write = "require('node:fs').writeFileSync('new', '')";
      const refused = execute([...(isRoot ? nobody : []), NODE, '-e', write], project);
      assert.match(refused.output, /EACCES/);
      runBoth({ name, command: asNobody }, project);
    });
  }
}

/** What bundlers make of the package. Bundles are run by every Node. */
function testBundles() {
  const esbuild = inModules('esbuild/bin/esbuild');
  const vite = [NODE, inModules('vite/bin/vite.js'), 'build', '--logLevel', 'warn'];
  const bundle = ['--bundle', '--platform=node'];
  const viteConfig = (/** @type {string} */ ssr) => `export default {
    build: { ssr: 'entry.mjs', outDir: 'bundle' },
    ssr: { ${ssr} },
  };`;
  /** @type {{row: string, command: string[], file: string, files?: Record<string, string>}[]} */
  const bundles = [
    {
      row: 'esbuild, CommonJS',
      command: [esbuild, 'entry.mjs', ...bundle, '--outfile=bundle/entry.cjs'],
      file: 'bundle/entry.cjs',
    },
    {
      row: 'esbuild, ESM, external',
      command: [
        ...[esbuild, 'entry.mjs', ...bundle, '--format=esm', '--external:node-sdpa'],
        '--outfile=bundle/entry.mjs',
      ],
      file: 'bundle/entry.mjs',
    },
    {
      row: 'vite ssr',
      command: vite,
      file: 'bundle/entry.mjs',
      files: { 'vite.config.mjs': viteConfig('') },
    },
    {
      row: 'vite ssr, inlined',
      command: vite,
      file: 'bundle/entry.mjs',
      files: { 'vite.config.mjs': viteConfig('noExternal: true') },
    },
    {
      row: 'esbuild, deployed alone',
      command: [esbuild, 'entry.mjs', ...bundle, '--outfile=bundle/entry.cjs'],
      file: 'alone/entry.cjs',
    },
  ];
  for (const { row, command, file, files = {} } of bundles) {
    if (!row.includes(options.only)) continue;
    const project = path.join(folder, row);
    const installed = cell(row, 'install', () => {
      install(INSTALLERS[0], 'allow', project);
      for (const [name, text] of Object.entries(files)) {
        writeFileSync(path.join(project, name), text);
      }
      const { ok, output } = execute(command, project);
      assert(ok, output);
      assert.doesNotMatch(output, /warn/i);
    });
    if (!installed) continue;
    if (file.startsWith('alone')) deployAlone(project);
    for (const { name, command: runtime } of RUNTIMES.filter(({ name }) => /^Node/.test(name))) {
      cell(row, name, () => {
        const { ok, output } = execute([...runtime, file], project);
        assert(ok, output);
        assert.match(JSON.parse(output).binary, /prebuilds\/linux-x64\/node-sdpa\.glibc\.node$/);
      });
    }
  }
}

/** Moves the bundle away from node_modules, with prebuilds/ beside it. @param {string} project */
function deployAlone(project) {
  const prebuilds = path.join(project, 'node_modules/node-sdpa/prebuilds');
  const alone = path.join(project, 'alone');
  cpSync(path.join(project, 'bundle'), alone, { recursive: true });
  cpSync(prebuilds, path.join(alone, 'prebuilds'), { recursive: true });
  rmSync(path.join(project, 'node_modules'), { recursive: true });
}

/**
 * Runs one cell of the table.
 * @param {string} row
 * @param {string} column
 * @param {() => void} test throws where something is wrong
 */
function cell(row, column, test) {
  let problem = null;
  try {
    test();
  } catch (error) {
    problem = /** @type {Error} */ (error).message;
    console.error(`\n${row}, ${column}:\n${problem}\n`);
  }
  cells.push({ row, column, problem });
  return problem === null;
}

/**
 * Runs a program as on a machine of a user's: with a home of its own, and none of our variables.
 * @param {string[]} command
 * @param {string} cwd
 */
function execute([program, ...args], cwd) {
  const home = path.join(folder, 'home');
  const bin = path.join(folder, 'bin');
  if (!existsSync(bin)) {
    mkdirSync(home);
    mkdirSync(bin);
    symlinkSync(NODE, path.join(bin, 'node'));
  }
  const env = {
    PATH: `${bin}:/usr/bin:/bin`,
    HOME: home,
    CI: 'true',
    NO_COLOR: '1',
    npm_config_registry: registry.url,
    NPM_CONFIG_REGISTRY: registry.url,
    BUN_CONFIG_REGISTRY: registry.url,
  };
  const result = spawnSync(program, args, { cwd, env, encoding: 'utf8', timeout: 120_000 });
  return {
    ok: result.status === 0,
    output: `${result.stdout}${result.stderr}${result.error ?? ''}`,
  };
}

/** Prints the table, and writes the counts as vitest's reporter would. */
function report() {
  const columns = ['install', ...RUNTIMES.map(({ name }) => name)];
  const rows = [...new Set(cells.map(({ row }) => row))];
  const width = Math.max(...rows.map((row) => row.length)) + 2;
  console.log(`\n${' '.repeat(width)}${columns.map((name) => name.padEnd(9)).join('')}`.trimEnd());
  for (const row of rows) {
    const marks = columns.map((column) => {
      const found = cells.find((one) => one.row === row && one.column === column);
      return (found === undefined ? '-' : found.problem === null ? 'ok' : 'FAILED').padEnd(9);
    });
    console.log(`${row.padEnd(width)}${marks.join('')}`.trimEnd());
  }
  const failed = cells.filter(({ problem }) => problem !== null).length;
  const passed = cells.length - failed;
  const seconds = Math.round((Date.now() - start) / 1000);
  console.log(`\n${passed} of ${cells.length} cells pass, in ${seconds} s. "-": not run.`);
  console.log('A runtime passes by import and by require, in the main thread and in a worker.');
  const counts = { numPassedTests: passed, numFailedTests: failed, numFailedTestSuites: 0 };
  writeFileSync(path.join(root, 'out/matrix.json'), JSON.stringify({ ...counts, cells }, null, 2));
  process.exitCode = failed > 0 || passed === 0 ? 1 : 0;
}
