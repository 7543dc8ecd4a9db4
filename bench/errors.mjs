// How far this package and other libraries are from float64 on the same inputs, by the number of
// keys. Nothing is timed.
//
//   npm run bench:errors -- [--out FILE]   (default: bench/results/errors.md)
//
// PyTorch takes part where the Python that TORCH_PYTHON names, or else python3, can import torch.
import { writeFileSync } from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { backendInfo } from 'node-sdpa';
import { root } from '../tools/build-native.mjs';
import { ERROR_CASES } from './cases.mjs';
import { compare, nameProcess, startLibraries } from './peers/compare.mjs';
import { installPeers } from './peers/install.mjs';
import { listKinds, nameSubject } from './peers/subjects.mjs';
import { describeMachine } from './report.mjs';

const { values: options } = parseArgs({
  options: { out: { type: 'string', default: path.join(root, 'bench/results/errors.md') } },
});

installPeers();
// A library's settings round alike.
const kinds = listKinds().filter(({ setting }) => setting === '');
const { libraries, versions } = await startLibraries(kinds);
/** @type {Map<string, Map<string, number>>} by subject, then by case */
const errors = new Map();
for (const problem of ERROR_CASES) {
  const subjects = kinds
    .filter((kind) => kind.fits(problem) && libraries.has(nameProcess(kind)))
    .map(({ fits: _, ...kind }) => ({ ...kind, threads: 1, reusesOutput: false }));
  const nothing = { rounds: 0, leastRounds: 0, seconds: 0 };
  const { results, failures } = await compare(problem, subjects, libraries, nothing);
  for (const failure of failures) console.log(`Left out: ${failure}`);
  for (const { error, ...subject } of results) {
    const name = nameSubject(subject);
    errors.set(name, (errors.get(name) ?? new Map()).set(problem.name, error));
  }
}
for (const library of libraries.values()) library.stop();

const machine = describeMachine(backendInfo().version);
const text = `${[
  '# Errors beside those of other libraries',
  `${Object.entries(versions)
    .map(([name, version]) => `${name} ${version}`)
    .join(', ')}, Node.js ${machine.node}  \n${machine.cpu}, ${machine.platform}, ${machine.date}`,
  'Made by `npm run bench:errors`.',
  'float32, two heads of 64 queries, head dim 64, unit normals. Relative L2 error against float64: ' +
    'of the output, the worst of 8 rows a head; of the gradients, the worst of the three. ' +
    'onnxruntime and tfjs run on one thread, onnxruntime in each form in which attention can be ' +
    'written for it.',
  '## Output',
  errorTable(false),
  '## Gradients',
  errorTable(true),
].join('\n\n')}\n`;
console.log(text);
writeFileSync(options.out, text);
console.log(`written to ${path.relative('', options.out)}`);

/** @param {boolean} isBackward */
function errorTable(isBackward) {
  const cases = ERROR_CASES.filter((problem) => problem.isBackward === isBackward);
  const line = (/** @type {string[]} */ cells) => `| ${cells.join(' | ')} |`;
  const rows = [...errors]
    .filter(([, own]) => cases.some(({ name }) => own.has(name)))
    .map(([subject, own]) =>
      line([subject, ...cases.map(({ name }) => own.get(name)?.toExponential(1) ?? '')]),
    );
  const header = ['', ...cases.map(({ keyLength }) => `${keyLength} keys`)];
  return [line(header), line(header.map(() => '---')), ...rows].join('\n');
}
