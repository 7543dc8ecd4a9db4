// Many calls of all kinds in one process: memory, handles and threads must stay as they are, and the
// event loop must go on.
//
//   npm run soak -- --calls 1e6 [--lanes 8] [--chart docs/soak.svg] [--leak]
//
// Prints a table, writes out/soak.json, and fails if anything grows. --leak keeps every result, to
// show that the check would notice.
import { mkdirSync, readdirSync, writeFileSync } from 'node:fs';
import { cpus, totalmem } from 'node:os';
import path from 'node:path';
import { monitorEventLoopDelay, performance } from 'node:perf_hooks';
import { parseArgs } from 'node:util';
import jStat from 'jstat';
import { backendInfo, scaledDotProductAttentionSync } from 'node-sdpa';
import { root } from '../build-native.mjs';
import { callOnce } from './calls.mjs';

const { values: flags } = parseArgs({
  options: {
    calls: { type: 'string', default: '20000' },
    lanes: { type: 'string', default: '8' },
    chart: { type: 'string' },
    leak: { type: 'boolean', default: false },
  },
});
const calls = Number(flags.calls);
const SAMPLES = 120;
/** Memory settles first: pools fill, code is compiled, malloc finds its sizes. */
const WARM_UP = 0.5;
/** The most that memory may seem to grow over the rest of the run: a large tensor. */
const MOST_GROWTH = 4 * 2 ** 20;

const gc = globalThis.gc;
if (gc === undefined) throw new Error('run this as npm run soak, or with --expose-gc');

/** @typedef {{calls: number, rss: number, external: number, heap: number, handles: number, files: number, threads: number}} Sample */

/** @type {unknown[]} */
const kept = [];
const delay = monitorEventLoopDelay({ resolution: 5 });
const { samples, seconds } = await soak();
const report = judge(samples);
printAll();
if (flags.chart) {
  const { drawSoak } = await import('./chart.mjs');
  writeFileSync(flags.chart, await drawSoak(samples));
}
if (report.some(({ isFlat }) => !isFlat)) process.exitCode = 1;

async function soak() {
  /** @type {Sample[]} */
  const samples = [];
  let started = 0;
  let lot = 1;
  const every = Math.ceil(calls / SAMPLES);
  const lane = async (/** @type {number} */ end) => {
    while (started < end) {
      started++;
      lot = (Math.imul(lot, 1664525) + 1013904223) >>> 0; // Numerical Recipes' generator
      await callOnce(lot >>> 4);
      if (flags.leak) {
        const tensor = { data: new Float32Array(512), dims: [1, 1, 64, 8] };
        kept.push(scaledDotProductAttentionSync(tensor, tensor, tensor));
      }
      if (started % 2 === 0) await new Promise(setImmediate); // as a server's requests come
    }
  };
  const begin = performance.now();
  while (started < calls) {
    delay.enable();
    const end = Math.min(calls, started + every);
    await Promise.all(Array.from({ length: Number(flags.lanes) }, () => lane(end)));
    delay.disable(); // what is measured next is no call's doing
    await collect();
    samples.push(take(started));
  }
  return { samples, seconds: (performance.now() - begin) / 1000 };
}

/** Collects garbage; finalizers run in turns of their own. */
async function collect() {
  for (let i = 0; i < 3; i++) {
    gc?.();
    await new Promise(setImmediate);
  }
}

/** @param {number} calls @returns {Sample} */
function take(calls) {
  const { rss, external, heapUsed } = process.memoryUsage();
  const count = (/** @type {string} */ folder) =>
    process.platform === 'linux' ? readdirSync(folder).length : 0;
  return {
    ...{ calls, rss, external, heap: heapUsed },
    handles: process.getActiveResourcesInfo().length,
    files: count('/proc/self/fd'),
    threads: count('/proc/self/task'),
  };
}

/**
 * Memory is flat if its least-squares line rises by less than MOST_GROWTH over what comes after the
 * warm-up, or by no more than its own 99 % interval; a count, if it ends where it was.
 * @param {Sample[]} samples
 */
function judge(samples) {
  const rest = samples.slice(Math.floor(samples.length * WARM_UP));
  const span = calls * (1 - WARM_UP);
  const memory = /** @type {const} */ (['rss', 'external', 'heap']).map((name) => {
    const { slope, error } = fitLine(
      rest.map((x) => x.calls),
      rest.map((x) => x[name]),
    );
    const growth = slope * span;
    const margin = error * span * jStat.studentt.inv(0.995, rest.length - 2);
    return { name, growth, margin, isFlat: growth < Math.max(MOST_GROWTH, margin) };
  });
  const counts = /** @type {const} */ (['handles', 'files', 'threads']).map((name) => {
    const growth = (rest.at(-1)?.[name] ?? 0) - (rest[0]?.[name] ?? 0);
    return { name, growth, margin: 0, isFlat: growth <= 0 };
  });
  return [...memory, ...counts];
}

/** A least-squares line, and the standard error of its slope. @param {number[]} x @param {number[]} y */
function fitLine(x, y) {
  const mean = (/** @type {number[]} */ list) => list.reduce((sum, n) => sum + n, 0) / list.length;
  const [mx, my] = [mean(x), mean(y)];
  const square = x.reduce((sum, n) => sum + (n - mx) ** 2, 0);
  const slope = x.reduce((sum, n, i) => sum + (n - mx) * ((y[i] ?? 0) - my), 0) / square;
  const residual = y.reduce((sum, n, i) => sum + (n - my - slope * ((x[i] ?? 0) - mx)) ** 2, 0);
  return { slope, error: Math.sqrt(residual / (x.length - 2) / square) };
}

function printAll() {
  const milliseconds = (/** @type {number} */ nanoseconds) => (nanoseconds / 1e6).toFixed(2);
  const { threads, selected } = backendInfo();
  const machine = `${cpus()[0]?.model}, ${cpus().length} cores, ${Math.round(totalmem() / 2 ** 30)} GiB`;
  console.log(`${calls} calls in ${seconds.toFixed(1)} s on ${selected}, ${threads} threads`);
  console.log(`${machine}, Node.js ${process.versions.node}`);
  const [p50, p99] = [delay.percentile(50), delay.percentile(99)];
  console.log(
    `event loop delay: median ${milliseconds(p50)} ms, p99 ${milliseconds(p99)} ms, ` +
      `max ${milliseconds(delay.max)} ms (sampled every 5 ms, which is part of it)`,
  );
  for (const { name, growth, margin, isFlat } of report) {
    const last = samples.at(-1)?.[/** @type {keyof Sample} */ (name)] ?? 0;
    const isMemory = ['rss', 'external', 'heap'].includes(name);
    const show = (/** @type {number} */ n) =>
      isMemory ? `${(n / 2 ** 20).toFixed(2)} MiB` : `${n}`;
    const interval = isMemory ? ` (± ${show(margin)})` : '';
    console.log(
      `${name.padEnd(9)} ${show(last)} at the end, grown by ${show(growth)}${interval}: ` +
        (isFlat ? 'flat' : 'GROWS'),
    );
  }
  mkdirSync(path.join(root, 'out'), { recursive: true });
  const result = { calls, seconds, selected, p50, p99, max: delay.max, report, samples };
  writeFileSync(path.join(root, 'out/soak.json'), JSON.stringify(result));
}
