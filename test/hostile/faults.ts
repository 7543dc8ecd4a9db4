// Runs programs with faults.c preloaded: a machine that is short of memory or threads, or that
// refuses AMX.
import { spawnSync } from 'node:child_process';
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type ChildOptions, runProgram } from '../child';

/** glibc's own malloc is behind the one that fails. */
export const hasFaults =
  process.platform === 'linux' &&
  (process.report.getReport() as { header: Record<string, unknown> }).header.glibcVersionRuntime !==
    undefined;

/** Compiles faults.c; `run` is `runProgram` with it. Call `remove` in the end. */
export function compileFaults() {
  const folder = mkdtempSync(join(tmpdir(), 'node-sdpa-faults-'));
  chmodSync(folder, 0o755);
  const library = join(folder, 'faults.so');
  const flags = ['-shared', '-fPIC', '-O1', '-Wall', '-Werror'];
  const args = [...flags, '-o', library, join(__dirname, 'faults.c'), '-ldl'];
  const { status, stderr } = spawnSync('cc', args, { encoding: 'utf8' });
  if (status !== 0) throw new Error(`cc: ${stderr}`);
  let count = 0;
  return {
    run(name: string, options: ChildOptions = {}) {
      const control = join(folder, `control-${count++}`);
      writeFileSync(control, Buffer.alloc(4096));
      chmodSync(control, 0o666); // for programs that another user runs
      const env = { ...options.env, LD_PRELOAD: library, SDPA_FAULTS: control };
      return runProgram(`hostile/${name}`, { ...options, env });
    },
    remove: () => rmSync(folder, { recursive: true }),
  };
}
