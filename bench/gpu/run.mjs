// npm run bench:gpu: the CUDA kernels against PyTorch's on this machine's GPU. Without one, or without
// PyTorch, it says so in one line. `-- --quick` takes fewer shapes and rounds.
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const here = path.dirname(fileURLToPath(import.meta.url));
const root = path.join(here, '../..');
const candidates = [
  process.env.NODE_SDPA_PREBUILD && path.join(process.env.NODE_SDPA_PREBUILD, 'build/Release'),
  path.join(root, 'build/Release'),
  path.join(root, 'prebuilds/linux-x64'),
].filter((folder) => folder !== undefined);
const plugin = candidates
  .map((folder) => path.join(String(folder), 'libsdpa_cuda.so'))
  .find((file) => existsSync(file));
if (!plugin) skip('there is no libsdpa_cuda.so: npm run build:cuda builds it');

const python = process.env.PYTHON ?? 'python3';
const probe = 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else 3)';
const { status } = spawnSync(python, ['-c', probe], { stdio: 'ignore' });
if (status === 3) skip('PyTorch finds no GPU');
if (status !== 0) skip(`${python} has no PyTorch (the variable PYTHON names another)`);

/** @param {string} script @param {string[]} more */
const run = (script, ...more) =>
  spawnSync(python, [path.join(here, script), plugin, ...more], { stdio: 'inherit' }).status ?? 1;
process.exit(run('check.py') || run('compare.py', ...process.argv.slice(2)));

/**
 * @param {string} reason
 * @returns {never}
 */
function skip(reason) {
  console.log(`skipped: ${reason}`);
  process.exit(0);
}
