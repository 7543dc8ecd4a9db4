// npm run test:gpu: all tests of backends on the GPU of this machine, and the shortest of them again
// under compute-sanitizer where that is installed.
import { existsSync } from 'node:fs';
import path from 'node:path';
import { run } from '../../tools/build-native.mjs';
import { bundle, makeBundle } from '../../tools/gpu-bundle.mjs';

// For a dry run: the folder of another addon and its plugin.
const prebuild = process.env.NODE_SDPA_PREBUILD;
await makeBundle(prebuild && path.join(prebuild, 'build/Release'));
const env = { ...process.env, NODE_SDPA_PREBUILD: '' };
const tests = [path.join(bundle, 'dist/tests.cjs'), ...process.argv.slice(2)];
const result = run(process.execPath, tests, { cwd: bundle, env, print: true });

const sanitizer = [process.env.CUDA_PATH ?? '/usr/local/cuda', 'bin/compute-sanitizer'];
const program = path.join(...sanitizer);
let isClean = true;
if (result.ok && process.argv.length === 2 && existsSync(program)) {
  for (const tool of ['memcheck', 'racecheck']) {
    const args = ['--tool', tool, '--error-exitcode', '9', process.execPath, ...tests];
    const checked = run(program, [...args, '--only', 'splits', '--only', 'torch'], {
      cwd: bundle,
      env,
      print: true,
    });
    isClean &&= checked.ok;
  }
}
process.exit(result.ok && isClean ? 0 : 1);
