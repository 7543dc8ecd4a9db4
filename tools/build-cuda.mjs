// Builds the CUDA plugin, puts it beside the addon in build/Release, and checks it.
//
//   npm run build:cuda                        for all GPUs, as the package has it
//   npm run build:cuda -- --gpus 90a-real     for some, in less time: CMake's CUDA_ARCHITECTURES
import { copyFileSync, mkdirSync, statSync } from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { buildWithCmake, root, run } from './build-native.mjs';
import { checkPlugin, GLIBC_FLOOR, newerThan, PLUGIN, requirementsOf } from './check-binaries.mjs';

const { values } = parseArgs({ options: { gpus: { type: 'string' } } });
if (!run('nvcc', ['--version']).ok) fail('nvcc is needed, of CUDA 12.8 or later.');

const settings = ['SDPA_CUDA=ON', `SDPA_CUDA_ARCHITECTURES=${values.gpus ?? 'OFF'}`];
const start = performance.now();
const folder = path.join(root, 'build-cuda'); // so that npm run build does not call nvcc too
mkdirSync(folder, { recursive: true });
const build = buildWithCmake(folder, settings, { target: 'sdpa_cuda' });
if (!build.ok) fail(build.output);

const file = path.join(root, 'build/Release', PLUGIN.name);
copyFileSync(path.join(folder, 'build/Release', PLUGIN.name), file);
const { size } = statSync(file);
const problems = values.gpus ? [] : checkPlugin(file, size);
const { libraries, versions } = requirementsOf(file, 'glibc');
const tooNew = newerThan(GLIBC_FLOOR, versions);
if (tooNew.length > 0) problems.push(`${file} needs ${tooNew.join(', ')}`);
if (problems.length > 0) fail(problems.join('\n'));
const seconds = Math.round((performance.now() - start) / 1000);
console.log(`${file}: ${size} bytes, needs ${libraries.join(' ')}; built in ${seconds} s`);

/**
 * @param {string} message
 * @returns {never}
 */
function fail(message) {
  console.error(message);
  process.exit(1);
}
