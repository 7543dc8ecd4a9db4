// Builds the addon with CMake and with node-gyp and compares the two: the same exports, and the
// same bits in outputs and gradients on every native backend.
import { createRequire } from 'node:module';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { buildWithCmake, buildWithGyp, root, run } from './build-native.mjs';

const require = createRequire(import.meta.url);

const PLACEMENTS = /** @type {const} */ (['weights', 'context', 'scores']);

/**
 * Named calls that together enter each kernel and the paths of its options.
 * @type {{name: string, dims: number[], options: import('node-sdpa').AttentionOptions}[]}
 */
const CASES = [
  { name: 'plain', dims: [2, 3, 33, 20], options: {} },
  { name: 'causal, one head dim of 64', dims: [1, 2, 130, 64], options: { isCausal: true } },
  { name: 'window and softcap', dims: [1, 1, 65, 7], options: { windowSize: [9, 4], softcap: 5 } },
  ...PLACEMENTS.map((dropoutPlacement) => ({
    name: `dropout of ${dropoutPlacement}`,
    dims: [1, 2, 70, 17],
    options: { dropoutPlacement, dropoutP: 0.3, training: true, seed: 7 },
  })),
];

if (process.argv[2] === '--digest') {
  console.log(JSON.stringify(digest()));
} else {
  compare();
}

/** The numbers of a tensor, as one hash of their bits. @param {{data: ArrayBufferView}} tensor */
function hashOf({ data }) {
  const { createHash } = require('node:crypto');
  const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
  return createHash('sha256').update(bytes).digest('hex').slice(0, 16);
}

/** What the addon that NODE_SDPA_PREBUILD names exports and computes. */
function digest() {
  const sdpa = require('node-sdpa');
  const binary = require('node-gyp-build').resolve(root);
  const native = require(binary);
  /** @type {{name: import('node-sdpa').BackendName, available: boolean}[]} */
  const backends = native.backends;
  const results = CASES.flatMap(({ name, dims, options }) => {
    const [query, key, value, gradOutput] = [0, 1, 2, 3].map((phase) => wave(dims, phase));
    return backends
      .filter(({ available }) => available)
      .map(({ name: backend }) => {
        const all = { ...options, backend };
        const result = sdpa.attentionForwardSync(query, key, value, all);
        const gradients = result.backwardSync(gradOutput);
        const parts = [result.output, result.lse, ...Object.values(gradients)].filter(Boolean);
        return { name, backend: result.backend, hashes: parts.map(hashOf) };
      });
  });
  return { binary, version: native.version, exports: Object.keys(native).sort(), results };
}

/**
 * Numbers without a pattern that a kernel could get right by accident.
 * @param {number[]} dims
 * @param {number} phase
 */
function wave(dims, phase) {
  const size = dims.reduce((a, b) => a * b);
  const data = Float32Array.from({ length: size }, (_, i) => 1.5 * Math.sin(i * 12.9898 + phase));
  return { dims, data };
}

function compare() {
  const builds = [
    { name: 'CMake', folder: path.join(root, 'build-cmake'), build: buildWithCmake },
    { name: 'node-gyp', folder: path.join(root, 'build-gyp'), build: buildWithGyp },
  ];
  const [cmake, gyp] = builds.map(({ name, folder, build }) => {
    const built = build(folder);
    if (!built.ok) fail(`the ${name} build failed:\n${built.output}`);
    const env = { ...process.env, NODE_SDPA_PREBUILD: folder };
    const ran = run(process.execPath, [fileURLToPath(import.meta.url), '--digest'], { env });
    if (!ran.ok) fail(`the ${name} build did not run:\n${ran.output}`);
    const found = JSON.parse(ran.output);
    if (!found.binary.startsWith(folder)) fail(`${found.binary} ran instead of the ${name} build`);
    return { ...found, binary: undefined };
  });
  if (cmake.results.length === 0) fail('no native backend ran');
  if (JSON.stringify(cmake) !== JSON.stringify(gyp)) {
    fail(`the builds differ:\n${JSON.stringify({ cmake, gyp }, null, 2)}`);
  }
  const ran = new Set(cmake.results.map((/** @type {{backend: string}} */ { backend }) => backend));
  console.log(
    `The CMake and node-gyp builds agree bit for bit: ${cmake.exports.length} exports and`,
  );
  console.log(
    `${cmake.results.length} results, of ${CASES.length} calls on ${[...ran].join(', ')}.`,
  );
}

/**
 * @param {string} message
 * @returns {never}
 */
function fail(message) {
  console.error(message);
  process.exit(1);
}
