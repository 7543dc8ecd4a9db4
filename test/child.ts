// Runs programs in child processes, where a crash, an exit or an environment variable is theirs
// alone.
import { spawn } from 'node:child_process';
import { join } from 'node:path';
import { expect } from 'vitest';

export const ROOT = join(__dirname, '..');

export interface Finished {
  status: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}

export interface ChildOptions {
  args?: string[];
  env?: Record<string, string>;
  /** Default: the package's root. */
  cwd?: string;
  /** A program on standard input. */
  input?: string;
  timeout?: number;
  /** Another user to run as; only root can. */
  uid?: number;
  /** The model of a processor to play, as qemu-x86_64 -cpu takes it. */
  emulated?: string;
}

/** Runs Node; in the package's root, 'node-sdpa' is this package, through its exports. */
export function runNode(options: ChildOptions) {
  const { args = [], env = {}, input = '', timeout = 60_000, cwd = ROOT, uid, emulated } = options;
  const [program, ...before] = emulated
    ? ['qemu-x86_64', '-cpu', emulated, process.execPath, '--jitless']
    : [process.execPath];
  return new Promise<Finished>((resolve, reject) => {
    const child = spawn(program, [...before, ...args], {
      cwd,
      env: { ...cleanEnvironment(), ...env },
      timeout,
      uid,
      killSignal: 'SIGKILL',
    });
    let stdout = '';
    let stderr = '';
    child.stdout.setEncoding('utf8').on('data', (text) => {
      stdout += text;
    });
    child.stderr.setEncoding('utf8').on('data', (text) => {
      stderr += text;
    });
    child.on('error', reject);
    child.on('close', (status, signal) => resolve({ status, signal, stdout, stderr }));
    child.stdin.end(input);
  });
}

/** Runs test/programs/<name>.mjs and gives what it printed as JSON; it must exit with 0. */
export async function runProgram(name: string, options: ChildOptions = {}) {
  const program = join(__dirname, 'programs', `${name}.mjs`);
  const finished = await runNode({ ...options, args: [program, ...(options.args ?? [])] });
  expect(finished, `${name}: ${finished.stderr}`).toMatchObject({ status: 0, signal: null });
  return JSON.parse(finished.stdout);
}

/**
 * The environment without the variables that choose a backend, and without the test runner's. A
 * run on one backend alone keeps the addon that has it.
 */
function cleanEnvironment(): NodeJS.ProcessEnv {
  const own = process.env.SDPA_TEST_BACKENDS
    ? /^(SDPA_|NODE_OPTIONS$|NODE_V8_COVERAGE$|VITEST)/
    : /^(SDPA_|NODE_SDPA_|NODE_OPTIONS$|NODE_V8_COVERAGE$|VITEST)/;
  return Object.fromEntries(Object.entries(process.env).filter(([name]) => !own.test(name)));
}
