// The results as charts: time against length, and operations a second against the machine's peaks.
import { nameSubject, ONNXRUNTIME, OURS, PYTORCH, TFJS } from './subjects.mjs';

/** @typedef {import('./compare.mjs').Result} Result */
/** @typedef {import('./ratios.mjs').Standing} Standing */
/** @typedef {import('./ratios.mjs').Peaks} Peaks */

const OUR_COLORS = ['#0d2f57', '#2b6ca3', '#6fa3cc', '#0b8a74', '#7fbcae'];
const OTHERS = [
  { name: `${ONNXRUNTIME}, its fastest form`, color: '#d9481c' },
  { name: `${PYTORCH}, from Python`, color: '#dcae62' },
  { name: `${OURS} js`, color: '#64748b' },
  { name: TFJS, color: '#b9a0cf' },
];
const GRID = { grid: true, gridColor: '#e5e9ef' };
const LEGEND = {
  ...{ orient: 'bottom', title: null, columns: 3 },
  ...{ symbolOpacity: 1, labelFontSize: 12, labelLimit: 400 },
};
const INK = '#1f2933';
const LENGTH_CASE = /^1x12x(?<length>\d+)x64(?<causal> causal)?$/;

/**
 * Time of a call against the length, both logarithmic: every key on the left, causal on the right;
 * null where no such case was measured.
 * @param {Standing[]} standings
 * @param {number} threads
 * @param {string} machine
 */
export function timeChart(standings, threads, machine) {
  const values = pointsOf(standings, threads).flatMap((point) => {
    const found = point.case.match(LENGTH_CASE)?.groups;
    if (found === undefined) return [];
    const panel = found.causal ? 'causal' : 'every query sees every key';
    return [{ ...point, length: Number(found.length), panel }];
  });
  if (values.length === 0) return null;
  const lengths = [...new Set(values.map(({ length }) => length))];
  const log = (/** @type {number} */ base) => ({ type: 'log', base, nice: false, padding: 12 });
  const x = { field: 'length', type: 'quantitative', scale: log(2), title: 'length' };
  const y = { field: 'ms', type: 'quantitative', scale: log(10), title: 'milliseconds' };
  const encoding = {
    x: { ...x, axis: { ...GRID, values: lengths, format: 'd', labelFontSize: 12 } },
    y: { ...y, axis: { ...GRID, labelFontSize: 12, format: '~g', values: powers(0.01, 1e6) } },
    color: colorOf(values),
  };
  const marks = [
    { mark: { type: 'line', strokeWidth: 2.2 } },
    { mark: { type: 'point', filled: true, size: 55, opacity: 1 } },
  ];
  return {
    title: {
      text: 'Time of one call of attention against the length',
      subtitle: [
        `Float32; batch 1, 12 heads, head dim 64; medians. Threads: ${threads}; of js and tfjs: 1.`,
        machine,
      ],
    },
    data: { values },
    facet: {
      column: {
        ...{ field: 'panel', type: 'nominal', title: null, sort: 'descending' },
        header: { labelFontSize: 13, labelColor: INK },
      },
    },
    spec: { width: 330, height: 380, encoding, layer: marks },
  };
}

/**
 * Operations a second of each case beside the machine's peaks.
 * @param {Standing[]} standings
 * @param {number} threads
 * @param {Peaks} peaks of one core
 * @param {string} machine
 */
export function speedChart(standings, threads, peaks, machine) {
  const values = pointsOf(standings, threads);
  const cases = [...new Set(values.map((point) => point.case))];
  const limits = Object.entries(peaks).map(([name, rate], i) => ({
    name: `${name} peak`,
    rate: rate * threads,
    rise: -4 - 15 * (i % 2), // neighbours do not run into each other
  }));
  const y = { field: 'case', type: 'nominal', sort: cases, title: null };
  const x = {
    type: 'quantitative',
    scale: { type: 'log', nice: false, padding: 16 },
    axis: { ...GRID, values: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000] },
    title: 'GFLOP/s (logarithmic)',
  };
  const rise = { expr: 'datum.rise' };
  return {
    title: {
      text: 'Operations a second, and what the machine can do',
      subtitle: [
        `Float32; batch x heads x length x head dim; medians. Threads: ${threads}. A causal call`,
        'counts half the pairs. Dashed: the most multiply-adds in registers, measured here.',
        machine,
      ],
    },
    width: 640,
    height: { step: 30 },
    layer: [
      {
        data: { values: limits },
        mark: { type: 'rule', strokeDash: [5, 4], strokeWidth: 1.5, color: INK },
        encoding: { x: { field: 'rate', ...x } },
      },
      {
        data: { values: limits },
        mark: { type: 'text', baseline: 'bottom', dy: rise, fontSize: 11, color: INK },
        encoding: { x: { field: 'rate', ...x }, y: { value: 0 }, text: { field: 'name' } },
      },
      {
        data: { values },
        mark: { type: 'point', filled: true, size: 90, opacity: 0.9 },
        encoding: {
          y: { ...y, axis: { ...GRID, labelLimit: 260, labelFontSize: 12 } },
          x: { field: 'gflops', ...x },
          color: colorOf(values),
        },
      },
    ],
  };
}

/**
 * What is drawn of each case at one number of threads.
 * @param {Standing[]} standings
 * @param {number} threads
 */
function pointsOf(standings, threads) {
  return standings.flatMap((standing) => {
    if (standing.threads !== threads) return [];
    const { ours, onnxruntime, pytorch, js, tfjs } = standing;
    const others = [onnxruntime, pytorch, js, tfjs].map((result, i) => ({
      series: OTHERS[i].name,
      result,
    }));
    const drawn = ours.filter(({ form }) => !form.endsWith('portable'));
    const own = drawn.map((result) => ({ series: nameSubject(result), result }));
    // The first is drawn last, above the others.
    return [...own, ...others]
      .reverse()
      .flatMap(({ series, result }) =>
        result === null
          ? []
          : [{ case: standing.case, series, ms: result.medianMs, gflops: result.gflops }],
      );
  });
}

/** A color for each series, the same in all charts. @param {{series: string}[]} values */
function colorOf(values) {
  const drawn = [...new Set(values.map(({ series }) => series))];
  const others = OTHERS.filter(({ name }) => drawn.includes(name));
  const isOther = (/** @type {string} */ series) => others.some(({ name }) => name === series);
  const ours = drawn.filter((series) => !isOther(series)).reverse();
  const domain = [...ours, ...others.map(({ name }) => name)];
  const range = [...OUR_COLORS.slice(0, ours.length), ...others.map(({ color }) => color)];
  return { field: 'series', type: 'nominal', scale: { domain, range }, legend: LEGEND };
}

/** The powers of ten from least to most. @param {number} least @param {number} most */
function powers(least, most) {
  const all = [];
  for (let value = least; value <= most; value *= 10) all.push(value);
  return all;
}
