// Measures how far results are from float64: the vector functions over their whole domains, and
// attention over millions of random rows, on every instruction set and at every precision.
//
//   npm run bench:precision -- [options]
//     --rows COUNT     random rows in all, half of them float32 (default: 2000000)
//     --step COUNT     tries every COUNT-th float of a function's domain (default: 1)
//     --out FILE       (default: bench/results/precision.md)
import { mkdirSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { backendInfo } from 'node-sdpa';
import { buildWithCmake, root, run } from '../tools/build-native.mjs';
import { computeHead, relativeError } from './reference.mjs';
import { describeMachine } from './report.mjs';

/**
 * @typedef {object} FunctionResult
 * @property {string} function
 * @property {string} backend
 * @property {number} from
 * @property {number} to
 * @property {number} count
 * @property {number} worst
 * @property {number} at
 * @property {number} rms
 */
/** @typedef {{relative: number, most: number}} Errors */
/**
 * @typedef {object} AttentionResult
 * @property {'float32' | 'float16' | 'bfloat16'} type
 * @property {number} spread
 * @property {number} length
 * @property {number} rows
 * @property {string} backend
 * @property {string} precision
 * @property {Errors} output
 * @property {Errors} gradients
 */

const { values: options } = parseArgs({
  options: {
    rows: { type: 'string', default: '2000000' },
    step: { type: 'string', default: '1' },
    out: { type: 'string', default: path.join(root, 'bench/results/precision.md') },
  },
});

const folder = path.join(root, 'build-bench');
const build = buildWithCmake(folder, [], { target: 'precision' });
if (!build.ok) throw new Error(build.output);

const compiler = checkReference();
const functions = /** @type {FunctionResult[]} */ (measure('functions', options.step));
const attention = /** @type {AttentionResult[]} */ (measure('attention', options.rows));
const text = `${describe().join('\n\n')}\n`;
console.log(text);
mkdirSync(path.dirname(options.out), { recursive: true });
writeFileSync(options.out, text);
console.log(`written to ${path.relative('', options.out)}`);

/** @param {string[]} args */
function measure(...args) {
  const { ok, output } = run(path.join(folder, 'build/precision'), args);
  if (!ok) throw new Error(`precision ${args.join(' ')} failed:\n${output}`);
  const lines = output.trim().split('\n');
  return lines.map((line) => JSON.parse(line));
}

/** The native float64 side has to agree with the one in JavaScript. Returns the compiler. */
function checkReference() {
  const [{ compiler, length, headDim, ...found }] = measure('reference');
  const sizes = { batch: 1, heads: 1, queryLength: length, keyLength: length, headDim };
  const problem = { name: 'reference', ...sizes, options: {}, isBackward: false };
  const position = { batch: 0, head: 0 };
  const expected = {
    output: computeHead(problem, found, position)[0],
    ...nameGradients(computeHead({ ...problem, isBackward: true }, found, position)),
  };
  for (const [name, values] of Object.entries(expected)) {
    const error = relativeError(found[name], values);
    if (!(error < 1e-13)) throw new Error(`float64 disagrees with itself: ${name}, ${error}`);
  }
  return compiler;
}

/** @param {ArrayLike<number>[]} gradients */
function nameGradients([gradQuery, gradKey, gradValue]) {
  return { gradQuery, gradKey, gradValue };
}

function describe() {
  const machine = describeMachine(backendInfo().version);
  const rows = attention
    .filter(({ backend, precision }) => `${backend} ${precision}` === subjects()[0])
    .reduce((sum, result) => sum + result.rows, 0);
  const types = /** @type {const} */ (['float32', 'float16', 'bfloat16']);
  return [
    '# How far results are from float64',
    `node-sdpa ${machine.package}, Node.js ${machine.node}, compiler ${compiler}  \n` +
      `${machine.cpu}, ${machine.platform}, ${machine.date}`,
    'Made by `npm run bench:precision`.',
    '## Vector functions',
    'Relative errors over ' +
      `${options.step === '1' ? 'every float' : `every ${options.step}th float`} of the domain ` +
      'whose size is at least 2^-26.',
    functionTable(),
    '## Attention',
    `Forward and backward of ${rows.toLocaleString('en')} random rows at head dim 64, lengths ` +
      `${lengths().join(', ')}: unit normals, and the same with queries, so scores, 4 times as ` +
      'large. Relative L2 is the length of the error over that of the exact tensor; the largest ' +
      "error of an element is in units of the exact tensor's root mean square. Gradients: the " +
      'worst of the three. The longest two have 256 queries a head. The worst length of each. The 16-bit types are exact inputs here; ' +
      'rounding their results to the type is part of the error.',
    ...types.flatMap((type) => [`### ${type}`, worstTable(type)]),
    '## Attention by length',
    'Relative L2 at float32.',
    ...[1, 4].flatMap((spread) =>
      /** @type {const} */ (['output', 'gradients']).flatMap((what) => [
        `### ${what === 'output' ? 'Output' : 'Gradients'}, ${nameSpread(spread)}`,
        lengthTable(spread, what),
      ]),
    ),
  ];
}

function functionTable() {
  const cells = functions.map((f) => [
    f.function,
    f.backend,
    `[${f.from}, ${f.to}]`,
    f.count.toLocaleString('en'),
    f.worst.toExponential(2),
    f.at.toPrecision(9),
    f.rms.toExponential(2),
  ]);
  return table(['function', 'backend', 'domain', 'floats', 'largest', 'at', 'rms'], cells);
}

/** @param {AttentionResult['type']} type */
function worstTable(type) {
  const columns = [1, 4].flatMap((spread) => {
    const name = nameSpread(spread);
    return [`${name}: output`, 'largest', 'gradients', 'largest'];
  });
  const cells = subjects().map((subject) => [
    subject,
    ...[1, 4].flatMap((spread) => {
      const own = attention.filter(
        (a) => a.type === type && a.spread === spread && `${a.backend} ${a.precision}` === subject,
      );
      const worst = (/** @type {(a: AttentionResult) => number} */ pick) =>
        Math.max(...own.map(pick)).toExponential(1);
      return [
        worst((a) => a.output.relative),
        worst((a) => a.output.most),
        worst((a) => a.gradients.relative),
        worst((a) => a.gradients.most),
      ];
    }),
  ]);
  return table(['backend, precision', ...columns], cells);
}

/** @param {number} spread @param {'output' | 'gradients'} what */
function lengthTable(spread, what) {
  const cells = subjects().map((subject) => {
    const own = attention.filter(
      (a) =>
        a.type === 'float32' && a.spread === spread && `${a.backend} ${a.precision}` === subject,
    );
    return [subject, ...own.map((a) => a[what].relative.toExponential(2))];
  });
  return table(['backend, precision', ...lengths().map(String)], cells);
}

function subjects() {
  return [...new Set(attention.map(({ backend, precision }) => `${backend} ${precision}`))];
}

function lengths() {
  return [...new Set(attention.map(({ length }) => length))];
}

/** @param {number} spread */
function nameSpread(spread) {
  return spread === 1 ? 'unit normals' : `scores x ${spread}`;
}

/** @param {string[]} header @param {string[][]} rows */
function table(header, rows) {
  const line = (/** @type {string[]} */ cells) => `| ${cells.join(' | ')} |`;
  return [line(header), line(header.map(() => '---')), ...rows.map(line)].join('\n');
}
