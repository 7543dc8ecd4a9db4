// npm run test:gpu: all tests of backends on the GPU of this machine, without and with the kernels
// for Hopper, and the shortest of them again under compute-sanitizer where that is installed.
import { existsSync } from 'node:fs';
import path from 'node:path';
import { run } from '../../tools/build-native.mjs';
import { bundle, makeBundle } from '../../tools/gpu-bundle.mjs';

// For a dry run: the folder of another addon and its plugin.
const prebuild = process.env.NODE_SDPA_PREBUILD;
await makeBundle(prebuild && path.join(prebuild, 'build/Release'));
const tests = [path.join(bundle, 'dist/tests.cjs'), ...process.argv.slice(2)];
const sanitizer = [process.env.CUDA_PATH ?? '/usr/local/cuda', 'bin/compute-sanitizer'];
const program = path.join(...sanitizer);
const tools = process.argv.length === 2 && existsSync(program) ? ['memcheck', 'racecheck'] : [];

const failed = ['0', '1'].filter((hopper) => !test(hopper));
process.exit(failed.length === 0 ? 0 : 1);

/** @param {string} hopper whether the kernels for Hopper are on @returns {boolean} whether all passed */
function test(hopper) {
  const env = { ...process.env, NODE_SDPA_PREBUILD: '', SDPA_CUDA_HOPPER: hopper };
  const options = { cwd: bundle, env, print: true };
  console.log(`SDPA_CUDA_HOPPER=${hopper}`);
  if (!run(process.execPath, tests, options).ok) return false;
  const short = [...tests, '--only', 'splits', '--only', 'torch'];
  return tools.every(
    (tool) =>
      run(program, ['--tool', tool, '--error-exitcode', '9', process.execPath, ...short], options)
        .ok,
  );
}
