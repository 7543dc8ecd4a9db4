// Times N samples in one call, and their moments, against N calls, after checking that the samples
// are the bits of these calls.
//
//   npm run bench:samples -- [options]
//     --samples N        (default: 32)
//     --backends NAMES   instead of all that run here: cpu:avx2,js
//     --threads COUNT    (default: 1)
//     --turns COUNT      how often each is timed, in turns (default: 5)
import { parseArgs } from 'node:util';
import {
  attentionForwardSync,
  backendInfo,
  scaledDotProductAttentionSync,
  setNumThreads,
  Tensor,
} from 'node-sdpa';
import { normals } from './cases.mjs';
import { describeMachine } from './report.mjs';

const { values: given } = parseArgs({
  options: {
    samples: { type: 'string', default: '32' },
    backends: { type: 'string' },
    threads: { type: 'string', default: '1' },
    turns: { type: 'string', default: '5' },
  },
});
const samples = Number(given.samples);
const turns = Number(given.turns);
setNumThreads(Number(given.threads));

const info = backendInfo();
const machine = describeMachine(info.version);
const usable = info.tried.flatMap(({ backend, ok }) => (ok ? [backend] : []));

const dims = [1, 12, 512, 64];
const size = dims.reduce((product, n) => product * n, 1);
const next = normals(20240229);
const create = () => new Tensor('float32', Float32Array.from({ length: size }, next), dims);
const [query, key, value] = [create(), create(), create()];
const single = new Tensor('float32', new Float32Array(size), dims);
const all = new Tensor('float32', new Float32Array(samples * size), [samples, ...dims]);

console.log(
  `node-sdpa ${machine.package}, Node.js ${machine.node}, ${machine.cpu}, ${machine.date}`,
);
console.log(
  `${samples} samples of ${dims.join('x')}, p = 0.1, ${given.threads} thread(s): median ms`,
);
console.log('(least to most), and the share of the time of as many calls\n');
console.log('| backend | dropout | calls | samples | | moments | |');
console.log('| --- | --- | --- | --- | --- | --- | --- |');
for (const backend of given.backends?.split(',') ?? usable) {
  for (const placement of /** @type {const} */ (['weights', 'context', 'scores'])) {
    const options = {
      backend: /** @type {import('node-sdpa').BackendName} */ (backend),
      ...{ dropoutP: 0.1, dropoutPlacement: placement, training: true, seed: 1 },
    };
    measure(backend, options);
  }
}

/**
 * Checks and times one backend and placement, and prints a line.
 * @param {string} backend
 * @param {import('node-sdpa').AttentionOptions} options
 */
function measure(backend, options) {
  const call = (/** @type {number} */ offset) =>
    scaledDotProductAttentionSync(query, key, value, { ...options, offset, out: single });
  const sampled = { ...options, offset: 0, samples };
  const together = () => scaledDotProductAttentionSync(query, key, value, { ...sampled, out: all });
  together();
  for (let s = 0; s < samples; s++) {
    call(s);
    const same = single.data.every((x, i) => x === all.data[s * size + i]);
    if (!same) throw new Error(`${backend}, ${options.dropoutPlacement}: sample ${s} differs`);
  }
  const subjects = [
    () => {
      for (let s = 0; s < samples; s++) call(s);
    },
    together,
    () => attentionForwardSync(query, key, value, { ...sampled, moments: true }),
  ];
  const times = subjects.map(() => /** @type {number[]} */ ([]));
  for (let turn = 0; turn < turns; turn++) {
    for (const [i, subject] of subjects.entries()) {
      const start = performance.now();
      subject();
      times[i].push(performance.now() - start);
    }
  }
  const sorted = times.map((list) => list.sort((a, b) => a - b));
  const median = sorted.map((list) => list[list.length >> 1]);
  const [calls, outputs, moments] = sorted.map((list, i) => {
    return `${median[i].toFixed(1)} (${list[0].toFixed(1)} to ${list[list.length - 1].toFixed(1)})`;
  });
  const shares = [1, 2].map((i) => (median[i] / median[0]).toFixed(3));
  const columns = [
    backend,
    options.dropoutPlacement,
    calls,
    outputs,
    shares[0],
    moments,
    shares[1],
  ];
  console.log(`| ${columns.join(' | ')} |`);
}
