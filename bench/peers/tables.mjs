// The results as tables in markdown, which read well on a terminal too.
import { ratio } from './ratios.mjs';
import { nameSubject, OURS } from './subjects.mjs';

/** @typedef {import('./compare.mjs').Result} Result */
/** @typedef {import('./compare.mjs').Memory} Memory */
/** @typedef {import('./ratios.mjs').Standing} Standing */
/** @typedef {import('./ratios.mjs').Ratios} Ratios */

/** Every subject of one case. @param {Result[]} results */
export function caseTable(results) {
  const columns = [results[0].case, 'threads', 'median ms', 'min', 'p90', 'GFLOP/s', 'error'];
  const rows = results.map((result) => [
    nameSubject(result),
    String(result.threads),
    ...[result.medianMs, result.minMs, result.p90Ms, result.gflops].map(digits),
    result.error.toExponential(0),
  ]);
  return table(columns, rows);
}

/** The median times of this package and of the best of each other. @param {Standing[]} standings */
export function summaryTable(standings) {
  const columns = ['median ms', 'threads', OURS, 'onnxruntime', 'PyTorch', 'tfjs wasm', 'js'];
  const rows = standings.map(({ case: name, threads, best, onnxruntime, pytorch, tfjs, js }) => [
    name,
    String(threads),
    ...[best, onnxruntime, pytorch, tfjs, js].map((result) => digits(result?.medianMs ?? null)),
  ]);
  return table(columns, rows);
}

/** How many times faster this package's own choice is. @param {Ratios[]} all */
export function ratioTable(all) {
  const columns = [
    ...['times faster than', 'threads', 'onnxruntime', 'PyTorch', 'tfjs wasm', 'js'],
    ...[
      'one thread',
      'not causal',
      'part of FMA peak',
      'part of plain read',
      "onnxruntime's fastest form",
    ],
  ];
  const rows = all.map((ratios) => {
    const { onnxruntime, pytorch, tfjs, js, oneThread, notCausal, ofFloatPeak, ofRead } = ratios;
    const numbers = [onnxruntime, pytorch, tfjs, js, oneThread, notCausal, ofFloatPeak, ofRead];
    const fastest = ratios.fastestOnnxruntime?.replace('onnxruntime ', '') ?? '';
    return [ratios.case, String(ratios.threads), ...numbers.map(digits), fastest];
  });
  return table(columns, rows);
}

/** The same for each instruction set and precision. @param {Standing[]} standings */
export function backendTable(standings) {
  const compared = standings.filter(({ onnxruntime }) => onnxruntime !== null);
  const kinds = [...new Set(compared.flatMap(({ ours }) => ours.map(nameBackend)))];
  const rows = compared.map(({ case: name, threads, ours, onnxruntime }) => {
    const find = (/** @type {string} */ kind) =>
      ours.find((result) => nameBackend(result) === kind);
    const ratios = kinds.map((kind) => {
      const result = find(kind);
      return digits(result === undefined ? null : ratio(result, onnxruntime));
    });
    return [name, String(threads), ...ratios];
  });
  return table(['times faster than onnxruntime', 'threads', ...kinds], rows);
}

/** A row for each subject, a column for each case. @param {Memory[]} memory */
export function memoryTable(memory) {
  const names = [...new Set(memory.map((one) => one.case))];
  const subjects = [...new Set(memory.map(nameSubject))];
  const rows = subjects.map((subject) => [
    subject,
    ...names.map((name) => {
      const found = memory.find((one) => one.case === name && nameSubject(one) === subject);
      return digits(found?.extraMiB ?? null);
    }),
  ]);
  return table(['extra MiB at the peak', ...names], rows);
}

/** @param {Result} result */
function nameBackend(result) {
  return nameSubject(result).replace(`${OURS} `, '');
}

/** Three digits that matter. @param {number | null} value */
function digits(value) {
  if (value === null || Number.isNaN(value)) return '';
  return value >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

/**
 * Markdown with columns of one width.
 * @param {string[]} columns
 * @param {string[][]} rows
 */
export function table(columns, rows) {
  const widths = columns.map((_, i) => Math.max(...[columns, ...rows].map((row) => row[i].length)));
  // Names stand at the left, numbers at the right.
  const isName = columns.map((_, i) => i === 0 || rows.some((row) => /[a-z]{2}/i.test(row[i])));
  const pad = (/** @type {string} */ cell, /** @type {number} */ i) =>
    isName[i] ? cell.padEnd(widths[i]) : cell.padStart(widths[i]);
  const layOut = (/** @type {string[]} */ cells) => `| ${cells.map(pad).join(' | ')} |`;
  const rule = widths.map((width, i) => `${'-'.repeat(width - 1)}${isName[i] ? '-' : ':'}`);
  return [layOut(columns), layOut(rule), ...rows.map(layOut)].join('\n');
}
