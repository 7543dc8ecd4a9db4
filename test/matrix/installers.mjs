// How each package manager installs the package from a registry, with install scripts allowed or
// not; and how Node runs what it laid out.

/**
 * @typedef {object} Installer
 * @property {string} name
 * @property {string[]} command below the modules of the matrix; a script of Node's ends in js
 * @property {(url: string) => Record<string, string>} [files] of the project
 * @property {string[]} allow what makes it run install scripts, or tell of them as it does by itself
 * @property {string[]} ignore what makes it ignore them
 * @property {string[]} [nodeOptions] for the layout
 * @property {RegExp} [runtimes] that can run the layout; all can, if none are named
 */

/** @param {string} name @param {string} program @returns {Installer} */
const npm = (name, program) => ({
  name,
  command: [program, 'install', 'node-sdpa', '--no-audit', '--no-fund', '--foreground-scripts'],
  allow: [],
  ignore: ['--ignore-scripts'],
});

/** @param {string} name @param {string} program @returns {Installer} */
const pnpm = (name, program) => ({
  name,
  command: [program, 'add', 'node-sdpa', '--config.minimumReleaseAge=0'],
  allow: [],
  ignore: ['--ignore-scripts'],
});

/** @type {Installer[]} */
export const INSTALLERS = [
  npm('npm 11', 'npm11/bin/npm-cli.js'),
  npm('npm 12', 'npm12/bin/npm-cli.js'),
  pnpm('pnpm 10', 'pnpm10/bin/pnpm.cjs'),
  pnpm('pnpm 11', 'pnpm11/bin/pnpm.mjs'),
  {
    name: 'Yarn 4 PnP',
    command: ['yarn4/bin/yarn.js', 'add', 'node-sdpa'],
    files: (url) => ({
      '.yarnrc.yml': `npmRegistryServer: '${url}'
unsafeHttpWhitelist: ['127.0.0.1']
nodeLinker: pnp
enableScripts: true
enableTelemetry: false
npmMinimalAgeGate: 0
pnpEnableEsmLoader: true
`,
      'yarn.lock': '',
    }),
    allow: [],
    ignore: ['--mode=skip-build'],
    nodeOptions: ['--require', './.pnp.cjs', '--loader', './.pnp.loader.mjs'],
    runtimes: /^Node/,
  },
  {
    name: 'Bun',
    command: ['bun/bin/bun', 'add', 'node-sdpa'],
    allow: [],
    ignore: ['--ignore-scripts'],
  },
  {
    name: 'Deno',
    command: ['deno/deno', 'add', 'npm:node-sdpa', '--minimum-dependency-age=0'],
    files: () => ({ 'deno.json': '{ "nodeModulesDir": "auto" }' }),
    allow: ['--allow-scripts'],
    ignore: [],
  },
];
