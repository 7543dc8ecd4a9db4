// The demo's pictures: vega-lite describes them, vega draws the SVG, resvg turns it into a PNG.
import { mkdirSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { Resvg } from '@resvg/resvg-js';
import * as vega from 'vega';
import { compile } from 'vega-lite';

const require = createRequire(import.meta.url);
// A font from a package: many machines have none, and the picture should be the same on all.
const FONTS = ['400Regular/Inter_400Regular.ttf', '600SemiBold/Inter_600SemiBold.ttf'].map((file) =>
  require.resolve(`@expo-google-fonts/inter/${file}`),
);
// Without a canvas, vega takes every letter for 0.8 of the font's height; Inter's are narrower.
const { textMetrics } = /** @type {any} */ (vega); // exported, but not in the types
/** @typedef {{fontSize?: number, limit?: number}} TextItem */
textMetrics.width = (/** @type {TextItem} */ { fontSize = 11, limit }, /** @type {any} */ text) =>
  Math.min(limit || Number.POSITIVE_INFINITY, 0.54 * fontSize * String(text ?? '').length);

/** Scripts that Inter has no letters for: the machine's own fonts have to help. */
const BEYOND_INTER = /(?![\p{sc=Latin}\p{sc=Greek}\p{sc=Cyrillic}])\p{L}/u;
const INK = '#1f2933';
const QUIET = '#64748b';
const PAPER = '#ffffff';
const DROPPED = { cross: '#d9481c', cell: '#fce4da' };
const WEIGHT_COLORS = ['#eef3f8', '#bcd3e8', '#6fa3cc', '#2b6ca3', '#0d2f57'];
const CHANNEL_COLORS = ['#7a4b0a', '#dcae62', '#f4f1ea', '#7fbcae', '#064e43'];
export const PLACEMENT_COLORS = { weights: '#2b6ca3', context: '#0b8a74', scores: '#d9481c' };
/** Length of a matrix's side with so many cells; a few cells are drawn large. */
const sideOf = (/** @type {number} */ cells) => cells * Math.max(15, 220 / cells);

const CONFIG = {
  background: PAPER,
  padding: 28,
  font: 'Inter',
  view: { stroke: null },
  title: {
    anchor: 'start',
    frame: 'group',
    color: INK,
    fontSize: 16,
    fontWeight: 600,
    subtitleColor: QUIET,
    subtitleFontSize: 12,
    subtitleLineHeight: 17,
    subtitlePadding: 6,
    offset: 14,
  },
  axis: {
    domain: false,
    ticks: false,
    grid: false,
    labelColor: INK,
    labelFontSize: 10.5,
    labelPadding: 5,
    labelLimit: 110,
    titleColor: QUIET,
    titleFontSize: 11,
    titleFontWeight: 400,
    titlePadding: 10,
  },
  legend: {
    labelColor: INK,
    labelFontSize: 10.5,
    titleColor: QUIET,
    titleFontSize: 11,
    titleFontWeight: 400,
  },
};

/**
 * One picture of a matrix: a row for each query, a column for each key or channel.
 * @typedef {object} Matrix
 * @property {string} title
 * @property {string[]} subtitle
 * @property {readonly string[]} tokens
 * @property {number} columns how many there are
 * @property {(row: number, column: number) => number} valueAt
 * @property {(row: number, column: number) => boolean} isDropped
 */

/**
 * The attention map of a causal head: token against token, dropped cells crossed out.
 * @param {Matrix} matrix
 */
export function attentionMap(matrix) {
  const names = `${JSON.stringify(matrix.tokens)}[datum.value]`;
  return cells(matrix, {
    isCausal: true,
    x: { title: 'key: the token that is looked at', axis: { labelExpr: names, labelAngle: -90 } },
    y: { title: 'query: the token that looks', axis: { labelExpr: names } },
    color: {
      title: 'weight',
      scale: { type: 'pow', exponent: 0.5, domain: [0, 1], range: WEIGHT_COLORS },
      legend: { values: [0, 0.1, 0.3, 0.6, 1], format: '~g', gradientLength: 150 },
    },
  });
}

/**
 * The context of a head: token against channel, dropped cells crossed out.
 * @param {Matrix} matrix
 */
export function contextMap(matrix) {
  const names = `${JSON.stringify(matrix.tokens)}[datum.value]`;
  return cells(matrix, {
    isCausal: false,
    x: { title: 'channel of the context', axis: { labelAngle: 0, labelOverlap: 'parity' } },
    y: { title: 'query: the token that looks', axis: { labelExpr: names } },
    color: {
      title: 'context',
      scale: { domain: [-0.5, 0.5], domainMid: 0, clamp: true, range: CHANNEL_COLORS },
      legend: { values: [-0.5, -0.25, 0, 0.25, 0.5], format: '~g', gradientLength: 150 },
    },
  });
}

/**
 * @param {Matrix} matrix
 * @param {{isCausal: boolean, x: object, y: object, color: object}} look
 */
function cells({ title, subtitle, tokens, columns, valueAt, isDropped }, look) {
  const values = tokens.flatMap((_, row) =>
    Array.from({ length: look.isCausal ? row + 1 : columns }, (_, column) => ({
      row,
      column,
      value: valueAt(row, column),
      isDropped: isDropped(row, column),
    })),
  );
  const band = { type: 'band', padding: 0 };
  const cell = { type: 'rect', stroke: PAPER, strokeWidth: 1.2, cornerRadius: 2 };
  const cross = { type: 'point', shape: 'M-1,-1L1,1M1,-1L-1,1', size: 26, strokeWidth: 1.6 };
  const onlyDropped = [{ filter: 'datum.isDropped' }];
  return {
    title: { text: title, subtitle },
    width: sideOf(columns),
    height: sideOf(tokens.length),
    data: { values },
    encoding: {
      x: { field: 'column', type: 'ordinal', scale: band, ...look.x },
      y: { field: 'row', type: 'ordinal', scale: band, ...look.y },
    },
    layer: [
      { mark: cell, encoding: { color: { field: 'value', type: 'quantitative', ...look.color } } },
      { transform: onlyDropped, mark: { ...cell, color: DROPPED.cell } },
      { transform: onlyDropped, mark: { ...cross, stroke: DROPPED.cross } },
    ],
  };
}

/**
 * How the mean over more and more seeds approaches the undropped output, or does not.
 * @param {Record<string, {seeds: number, error: number}[]>} courses of each placement
 */
export function unbiasednessChart(courses) {
  const values = Object.entries(courses).flatMap(([placement, course]) =>
    course.map((point) => ({ placement, ...point })),
  );
  const last = values.filter(({ seeds }) => seeds === Math.max(...values.map((v) => v.seeds)));
  const scale = { domain: Object.keys(PLACEMENT_COLORS), range: Object.values(PLACEMENT_COLORS) };
  const grid = { grid: true, gridColor: '#e5e9ef', tickCount: 4 };
  const color = { field: 'placement', type: 'nominal', scale, legend: null };
  const apart = { expr: '{weights: 8, context: -8, scores: 0}[datum.placement]' };
  const x = { field: 'seeds', type: 'quantitative', scale: { type: 'log' }, title: 'seeds' };
  const y = { field: 'error', type: 'quantitative', scale: { type: 'log' } };
  return {
    title: {
      text: 'Dropout of scores is biased; of weights and of context it is not',
      subtitle: [
        'Distance of the mean over n seeds from the undropped output, relative to its length.',
        'An unbiased mean comes closer as 1/√n for ever; a biased one comes to rest at its bias.',
      ],
    },
    width: 560,
    height: 340,
    encoding: {
      x: { ...x, axis: { ...grid, values: [1, 10, 100, 1000], format: ',d' } },
      y: {
        ...y,
        title: 'distance of the mean',
        axis: { ...grid, values: [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], format: '.0%' },
      },
      color,
    },
    layer: [
      { data: { values }, mark: { type: 'line', strokeWidth: 2.5 } },
      { data: { values }, mark: { type: 'point', filled: true, size: 38, opacity: 1 } },
      {
        data: { values: last },
        mark: { type: 'text', align: 'left', dx: 10, dy: apart, fontSize: 12.5, fontWeight: 600 },
        encoding: { text: { field: 'placement' } },
      },
    ],
  };
}

/**
 * Pictures under one title, two in a row.
 * @param {string} title
 * @param {string[]} subtitle
 * @param {object[]} pictures
 */
export function sideBySide(title, subtitle, pictures) {
  const text = { text: title, subtitle, fontSize: 21, subtitleFontSize: 13, offset: 24 };
  return {
    title: { ...text, subtitleLineHeight: 19 },
    concat: pictures,
    columns: 2,
    spacing: 44,
    resolve: { scale: { color: 'independent', x: 'independent', y: 'independent' } },
  };
}

/**
 * Writes <folder>/<name>.svg and .png.
 * @param {string} folder
 * @param {string} name
 * @param {object} picture
 */
export async function save(folder, name, picture) {
  const spec = /** @type {import('vega-lite').TopLevelSpec} */ ({ ...picture, config: CONFIG });
  const view = new vega.View(vega.parse(compile(spec).spec), { renderer: 'none' });
  const svg = await view.toSVG();
  view.finalize();
  const loadSystemFonts = BEYOND_INTER.test(svg);
  const font = { fontFiles: FONTS, loadSystemFonts, defaultFontFamily: 'Inter' };
  const png = new Resvg(svg, { font, fitTo: { mode: 'zoom', value: 2 } }).render().asPng();
  mkdirSync(folder, { recursive: true });
  writeFileSync(path.join(folder, `${name}.svg`), svg);
  writeFileSync(path.join(folder, `${name}.png`), png);
}
