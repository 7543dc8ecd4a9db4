#!/usr/bin/env node
// The command line of the package: npx node-sdpa info | build | bench.

const USAGE = `Usage: npx node-sdpa COMMAND

  info                  what computes on this machine, and why
  build [--out FOLDER]  builds the native addon from source, for a machine without a binary
  bench [OPTIONS]       times the native addon against JavaScript on this machine
                          --shapes NAMES   only cases with any of these in their names
                          --backends NAMES instead of all that run here
                          --threads COUNTS of native backends (default: 1,2)
                          --quick          fewer repeats
`;

/** Each runs when its file is imported, and finds its arguments from process.argv[2] on. */
const COMMANDS = {
  info: () => import('./info.mjs'),
  build: () => import('./build.mjs'),
  bench: () => import('../bench/run.mjs'),
};

const [command = '--help'] = process.argv.splice(2, 1);
if (Object.hasOwn(COMMANDS, command)) {
  try {
    await COMMANDS[/** @type {keyof typeof COMMANDS} */ (command)]();
  } catch (error) {
    // What a user can mend needs no stack; a fault of ours does.
    const { code, message } = /** @type {NodeJS.ErrnoException} */ (error);
    console.error(/^ERR_(PARSE_ARGS|SDPA)_/.test(String(code)) ? message : error);
    process.exitCode = 1;
  }
} else if (['help', '--help', '-h'].includes(command)) {
  console.log(USAGE);
} else {
  console.error(`${command}: no such command\n\n${USAGE}`);
  process.exitCode = 1;
}
