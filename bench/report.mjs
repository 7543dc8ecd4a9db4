// The benchmark's results as a table, as JSON and as a chart.
import { mkdirSync, writeFileSync } from 'node:fs';
import { arch, cpus, platform, release } from 'node:os';
import path from 'node:path';

/** @typedef {import('./timing.mjs').Result} Result */
/** @typedef {Record<string, string | number>} Machine */

/** What a result is worth nothing without. @param {string} version of this package */
export function describeMachine(version) {
  return {
    cpu: cpus()[0]?.model ?? 'unknown CPU',
    cores: cpus().length,
    platform: `${platform()} ${arch()} ${release()}`,
    node: process.versions.node,
    v8: process.versions.v8,
    package: version,
    date: new Date().toISOString().slice(0, 16).replace('T', ' '),
  };
}

const COLORS = ['#0d2f57', '#2b6ca3', '#6fa3cc', '#0b8a74', '#7a4b0a'];
const JS_COLOR = '#d9481c';

/** How many times faster than js a result is. @param {Result} result @param {Result[]} all */
export function ratioToJs(result, all) {
  const js = all.find((other) => other.case === result.case && other.backend === 'js');
  return js === undefined ? Number.NaN : js.medianMs / result.medianMs;
}

const COLUMNS = ['backend', 'threads', 'median ms', 'min', 'p90', 'GFLOP/s', 'x js', 'error'];

/** Prints the results of one case. @param {Result[]} results */
export function printCase(results) {
  for (const [i, result] of results.entries()) {
    const cells = [
      i === 0 ? result.case : '',
      result.backend,
      String(result.threads),
      ...[result.medianMs, result.minMs, result.p90Ms].map((ms) => ms.toFixed(ms < 10 ? 3 : 1)),
      result.gflops.toFixed(1),
      ratioToJs(result, results).toFixed(1),
      result.error.toExponential(0),
    ];
    console.log(layOut(cells));
  }
  console.log();
}

export function printHeader() {
  console.log(layOut(['case', ...COLUMNS]));
  console.log('-'.repeat(97));
}

/** @param {string[]} cells */
function layOut(cells) {
  const [name, backend, ...numbers] = cells;
  const widths = [7, 10, 9, 9, 8, 6, 6];
  const right = numbers.map((cell, i) => cell.padStart(widths[i]));
  return [name.padEnd(34), backend.padEnd(12), ...right].join(' ').trimEnd();
}

/**
 * Writes results.json, chart.svg and chart.png; what draws them is in a checkout only.
 * @param {string} folder
 * @param {Machine} machine
 * @param {Result[]} results
 */
export async function writeFiles(folder, machine, results) {
  mkdirSync(folder, { recursive: true });
  const file = path.join(folder, 'results.json');
  writeFileSync(file, `${JSON.stringify({ machine, results }, null, 2)}\n`);
  const { save } = await import('../examples/demo/pictures.mjs');
  await save(folder, 'chart', describeChart(machine, results));
}

/**
 * A row for each case, a point for each backend and number of threads.
 * @param {Machine} machine
 * @param {Result[]} results
 */
function describeChart(machine, results) {
  const speedAt = (/** @type {Result} */ { gflops, medianMs }, /** @type {number} */ ms) =>
    (gflops * medianMs) / ms;
  const values = results.map((result) => ({
    ...result,
    label: `${result.threads} thread${result.threads > 1 ? 's' : ''}`,
    fastest: speedAt(result, result.minMs),
    slowest: speedAt(result, result.p90Ms),
  }));
  const backends = [...new Set(results.map(({ backend }) => backend))];
  const range = backends.map((name, i) => (name === 'js' ? JS_COLOR : COLORS[i % COLORS.length]));
  const cases = [...new Set(results.map((result) => result.case))];
  const grid = { grid: true, gridColor: '#e5e9ef' };
  const ticks = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000];
  const legend = { orient: 'bottom', title: null, symbolOpacity: 1, labelFontSize: 12 };
  const shape = { field: 'label', type: 'nominal', legend };
  const y = { field: 'case', type: 'nominal', sort: cases, title: null };
  const x = {
    type: 'quantitative',
    scale: { type: 'log', nice: false, padding: 16 },
    title: 'GFLOP/s (logarithmic)',
  };
  const color = { field: 'backend', type: 'nominal', scale: { domain: backends, range }, legend };
  return {
    title: {
      text: 'Attention in Node.js: native backends against plain JavaScript',
      subtitle: [
        'Float32; batch x heads x length x head dim. Points: medians; lines: from p90 to minimum.',
        describeLabels(results),
        `${machine.cpu}, ${machine.platform}, Node.js ${machine.node}, ${machine.date}`,
      ],
    },
    width: 620,
    height: { step: 34 },
    encoding: { y: { ...y, axis: { ...grid, labelLimit: 260, labelFontSize: 12 } } },
    layer: [
      {
        data: { values },
        mark: { type: 'rule', strokeWidth: 3, opacity: 0.35 },
        encoding: {
          x: { field: 'slowest', axis: { ...grid, values: ticks }, ...x },
          x2: { field: 'fastest' },
          color,
        },
      },
      {
        data: { values },
        mark: { type: 'point', filled: true, size: 90, opacity: 0.9 },
        encoding: {
          x: { field: 'gflops', ...x },
          color,
          shape,
        },
      },
      {
        data: { values: cases.map((name) => ({ case: name, text: describeBest(name, results) })) },
        mark: { type: 'text', align: 'left', fontSize: 12 },
        encoding: { x: { value: 634 }, text: { field: 'text' } },
      },
    ],
  };
}

/** What the numbers at the right are. @param {Result[]} results */
function describeLabels(results) {
  const native = results.filter(({ backend }) => backend !== 'js');
  if (native.length === 0) return 'Only js was measured.';
  const counts = [...new Set(native.map(({ threads }) => threads))].join(' / ');
  return `At the right: how many times faster than js the best is, with ${counts} threads.`;
}

/**
 * The best ratio to js of a case for each number of threads.
 * @param {string} name
 * @param {Result[]} all
 */
function describeBest(name, all) {
  /** @type {Map<number, number>} */
  const best = new Map();
  for (const result of all) {
    if (result.case !== name || result.backend === 'js') continue;
    best.set(result.threads, Math.max(best.get(result.threads) ?? 0, ratioToJs(result, all)));
  }
  const ratios = [...best.values()].map((ratio) => `${ratio.toFixed(ratio < 10 ? 1 : 0)}`);
  return ratios.length === 0 ? '' : `${ratios.join(' / ')} x js`;
}
