// What the benchmark found, on the terminal and as files: tables, data and charts.
import { mkdirSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { save } from '../../examples/demo/pictures.mjs';
import { speedChart, timeChart } from './pictures.mjs';
import { describeRatios, rank } from './ratios.mjs';
import { backendTable, caseTable, memoryTable, ratioTable, summaryTable } from './tables.mjs';

/**
 * @typedef {object} Run
 * @property {import('../report.mjs').Machine} machine
 * @property {Record<string, string>} versions of the libraries
 * @property {import('./ratios.mjs').Peaks} peaks
 * @property {import('./compare.mjs').Effort} effort
 * @property {boolean} reusesOutput
 */
/**
 * @typedef {object} Found
 * @property {import('./compare.mjs').Result[]} results
 * @property {import('./compare.mjs').Memory[]} memory
 * @property {import('./ratios.mjs').Read[]} reads of the bytes of decoding steps
 * @property {string[]} failures
 */

/** What the numbers are worth nothing without, in lines. @param {Run} run */
export function describeRun({ machine, versions, peaks, effort, reusesOutput }) {
  const { cpu, cores, platform, node, date } = machine;
  const libraries = Object.entries(versions).map(([name, version]) => `${name} ${version}`);
  const limits = Object.entries(peaks).map(([name, rate]) => `${name} ${rate.toFixed(0)}`);
  const output = reusesOutput ? 'an array that the caller keeps' : 'a new array each call';
  return [
    [...libraries, `Node.js ${node}`].join(', '),
    `${cpu}, ${cores} cores, ${platform}, ${date}`,
    ...(limits.length > 0 ? [`Peaks of one core, GFLOP/s: ${limits.join(', ')}`] : []),
    `${effort.rounds} rounds, each in a new order. Tensors of each library in; out: ${output}`,
  ];
}

/**
 * Prints the summary; writes README.md, results.json and the charts.
 * @param {string} folder
 * @param {Run & Found} found
 */
export async function writeResults(folder, found) {
  const { machine, peaks, results, memory, reads } = found;
  const standings = rank(results);
  if (standings.length === 0) {
    console.log('No native backend of this package was measured: there is nothing to compare.');
    return;
  }
  const ratios = describeRatios(standings, peaks, reads);
  const sections = [
    ['Median times', summaryTable(standings)],
    ['Ratios', ratioTable(ratios)],
    ['Ratios of each instruction set and precision', backendTable(standings)],
  ];
  if (memory.length > 0) sections.push(['Memory', memoryTable(memory)]);
  for (const [title, table] of sections) console.log(`${title}\n\n${table}\n`);

  mkdirSync(folder, { recursive: true });
  const data = JSON.stringify({ ...found, ratios }, round, 2);
  writeFileSync(path.join(folder, 'results.json'), `${data}\n`);
  const line = `${machine.cpu}, ${machine.cores} cores, Node.js ${machine.node}, ${machine.date}`;
  const counts = standings.map(({ threads }) => threads);
  const time = timeChart(standings, Math.max(...counts), line);
  const speed = speedChart(standings, Math.min(...counts), peaks, line);
  const cases = [...new Set(results.map((result) => result.case))];
  const text = [
    '# node-sdpa beside other libraries',
    ...describeRun(found),
    ...(time === null ? [] : ['![Time of a call against the length](time.png)']),
    "![Operations a second beside the machine's peaks](speed.png)",
    ...sections.flatMap(([title, table]) => [`## ${title}`, table]),
    '## All that was measured',
    ...cases.map((name) => caseTable(results.filter((result) => result.case === name))),
  ];
  writeFileSync(path.join(folder, 'README.md'), `${text.join('\n\n')}\n`);
  if (time !== null) await save(folder, 'time', time);
  await save(folder, 'speed', speed);
  console.log(`README.md, results.json and the charts are in ${path.relative('', folder)}`);
}

/** Five digits of a number are enough. @param {string} _key @param {unknown} value */
function round(_key, value) {
  return typeof value === 'number' ? Number(value.toPrecision(5)) : value;
}
