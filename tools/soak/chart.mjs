// The chart of a soak: memory, and the numbers of handles and threads, over calls.
import * as vega from 'vega';
import { compile } from 'vega-lite';

const COLORS = { 'resident set': '#2b6ca3', external: '#0b8a74', heap: '#d9481c' };

/** An SVG. @param {{calls: number, rss: number, external: number, heap: number, handles: number, files: number, threads: number}[]} samples */
export async function drawSoak(samples) {
  const memory = samples.flatMap(({ calls, rss, external, heap }) =>
    Object.entries({ 'resident set': rss, external, heap }).map(([what, bytes]) => ({
      ...{ calls: calls / 1000, what, value: bytes / 2 ** 20 },
    })),
  );
  const counts = samples.flatMap(({ calls, handles, files, threads }) =>
    Object.entries({ handles, 'open files': files, threads }).map(([what, value]) => ({
      ...{ calls: calls / 1000, what, value },
    })),
  );
  /** @type {any} */
  const chart = {
    config: {
      background: '#ffffff',
      padding: 20,
      font: 'Helvetica, Arial, sans-serif',
      view: { stroke: null },
      title: { anchor: 'start', color: '#1f2933', fontSize: 13 },
      axis: { labelColor: '#1f2933', titleColor: '#64748b', titleFontWeight: 400, tickSize: 4 },
      axisY: { grid: true, gridColor: '#e5e9ef', domain: false, ticks: false },
    },
    vconcat: [
      panel('Memory after collecting garbage', memory, 'MiB', {
        ...{ domain: Object.keys(COLORS), range: Object.values(COLORS) },
      }),
      panel('Handles, files and threads', counts, 'count', { scheme: 'dark2' }),
    ],
    resolve: { scale: { color: 'independent' } },
  };
  const view = new vega.View(vega.parse(compile(chart).spec), { renderer: 'none' });
  return view.toSVG();
}

/** @param {string} title @param {object[]} values @param {string} unit @param {object} colors */
function panel(title, values, unit, colors) {
  return {
    title,
    width: 560,
    height: 160,
    data: { values },
    mark: { type: 'line', strokeWidth: 1.5 },
    encoding: {
      x: { field: 'calls', type: 'quantitative', title: 'thousand calls', axis: { grid: false } },
      y: { field: 'value', type: 'quantitative', title: unit, scale: { zero: true } },
      color: { field: 'what', type: 'nominal', title: null, scale: colors },
    },
  };
}
