// The experiment of examples/gpt: its theory and measurements of noise, its statistics, its result
// files, its command, and the report that is written from them.
import { spawn } from 'node:child_process';
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { measureCases } from '../../examples/gpt/experiment/noise';
import { writeReport } from '../../examples/gpt/experiment/page';
import { EVALUATED_EVERY, type Job, listJobs, RUN } from '../../examples/gpt/experiment/plan';
import {
  appendRow,
  NOISE_FILE,
  openResults,
  type Row,
  RUNS_FILE,
  readResults,
} from '../../examples/gpt/experiment/results';
import { intervalOf, jointConfidence } from '../../examples/gpt/experiment/statistics';
import { againstNone, bestGroups, summarize } from '../../examples/gpt/experiment/summary';
import {
  approximateScoresMoments,
  approximateScoresWeights,
  contextOf,
  scoresMoments,
} from '../../examples/gpt/experiment/theory';
import { ROOT, runNode } from '../child';

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'node-sdpa-placement-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

describe('noise', () => {
  test('what the package draws has the means and variances of theory', () => {
    const cases = measureCases([0, 3], [0.3]);
    expect(cases).toHaveLength(2 * 2 * 3);
    const z = cases.flatMap((each) => each.z);
    expect(z).toHaveLength(cases.length * 16 * 2);
    // The largest of 384 normal numbers is below 4.5 but once in 400 times; the seed is fixed.
    expect(Math.max(...z.map(Math.abs))).toBeLessThan(4.5);
    for (const { placement, topWeight, noise, bias, correlation, meanTopWeight } of cases) {
      expect(noise.measured / noise.theory).toBeCloseTo(1, 1.7);
      expect(correlation.measured).toBeCloseTo(correlation.theory, 1.7);
      expect(meanTopWeight.measured).toBeCloseTo(meanTopWeight.theory, 1.7);
      if (placement !== 'scores') expect(bias.theory).toBeLessThan(1e-12);
      else if (topWeight > 0.5) expect(meanTopWeight.theory).toBeLessThan(0.9 * topWeight);
    }
  });

  test('a channel of the context that is 0 or 2 o has no distance of its variance', () => {
    for (const { placement, z } of measureCases([0, 1], [0.5])) {
      expect(z.every(Number.isFinite)).toBe(true);
      expect(z).toHaveLength(placement === 'context' ? 16 : 32);
    }
  });

  test('dropout of two scores, by hand', () => {
    const [w, p] = [0.9, 0.25];
    const row = { weights: Float64Array.of(w, 1 - w), values: Float64Array.of(1, -1), channels: 1 };
    const { mean, covariance, meanWeights } = scoresMoments(row, p);
    // Both kept: w. One kept: 1. None kept: 0.
    expect(meanWeights[0]).toBeCloseTo((1 - p) ** 2 * w + p * (1 - p), 14);
    expect(meanWeights[1]).toBeCloseTo((1 - p) ** 2 * (1 - w) + p * (1 - p), 14);
    expect(mean[0]).toBeCloseTo((1 - p) ** 2 * (2 * w - 1), 14);
    const square = (1 - p) ** 2 * (2 * w - 1) ** 2 + 2 * p * (1 - p);
    expect(covariance[0]).toBeCloseTo(square - mean[0] ** 2, 14);
  });

  test.each([4, 8, 16])('first-order theory comes near with the number of keys: %i', (keys) => {
    const p = 0.01;
    const powers = Float64Array.from({ length: keys }, (_, j) => Math.exp(Math.sin(3 * j + 1) / 2));
    const sum = powers.reduce((total, power) => total + power);
    const weights = powers.map((power) => power / sum);
    const values = Float64Array.from({ length: 2 * keys }, (_, at) => Math.cos(5 * at) + (at % 2));
    const row = { weights, values, channels: 2 };
    const [exact, first] = [scoresMoments(row, p), approximateScoresMoments(row, p)];
    const context = contextOf(row);
    const ratios = [
      (exact.meanWeights[0] - weights[0]) / (approximateScoresWeights(weights, p)[0] - weights[0]),
      ...first.covariance.map((x, at) => exact.covariance[at] / x),
      ...first.mean.map((x, d) => (exact.mean[d] - context[d]) / (x - context[d])),
    ];
    for (const ratio of ratios) expect(Math.abs(ratio - 1)).toBeLessThan(4 / keys);
  });
});

test('intervals of means, against tabulated quantiles of Student', () => {
  const interval = intervalOf([1, 2, 3, 4, 5]);
  expect(interval.mean).toBe(3);
  expect(interval.high - 3).toBeCloseTo((2.776445 * Math.sqrt(2.5)) / Math.sqrt(5), 5);
  expect(3 - interval.low).toBeCloseTo(interval.high - 3, 12);
  expect(intervalOf([0, 2], 0.99).high - 1).toBeCloseTo(63.656741, 4); // sqrt(2)/sqrt(2) * t(1)
  expect(jointConfidence(10)).toBeCloseTo(0.995, 12);
});

/** A run that never was: dropout helps at the end, the more the larger p is. */
function madeUpRow(job: Job): Row {
  const wobble = Math.sin(job.seed * 7 + job.p * 31 + job.placement.length) / 50;
  const curve = Array.from({ length: RUN.steps / EVALUATED_EVERY + 1 }, (_, i) => ({
    step: i * EVALUATED_EVERY,
    training: 4 / (1 + i) + job.p,
    validation:
      i === 0 ? 4 + job.seed / 10 : 2.5 + 1 / i + (0.04 * i) / (1 + 5 * job.p) + wobble * i,
  }));
  return { ...job, curve, backend: 'made up', seconds: 60 };
}

describe('result files', () => {
  test('a line that was cut off goes away, and its run with it', () => {
    const results = join(folder, 'torn');
    expect(openResults(results, 100)).toEqual([]);
    const rows = listJobs(1).slice(0, 2).map(madeUpRow);
    appendRow(results, rows[0]);
    const file = join(results, RUNS_FILE);
    const before = readFileSync(file);
    appendFileSync(file, JSON.stringify(rows[1]).slice(0, 50));
    expect(openResults(results, 100)).toEqual([rows[0]]);
    expect(readFileSync(file).equals(before)).toBe(true);
    appendRow(results, rows[1]);
    expect(readResults(results).rows).toEqual(rows);
  });

  test('runs of other settings are not added to', () => {
    const results = join(folder, 'other');
    openResults(results, 100);
    expect(() => openResults(results, 101)).toThrow(/these runs have another "run"/);
  });
});

describe('the report', () => {
  const rows = listJobs(3).map(madeUpRow);

  test('differences are paired by seed', () => {
    const summary = summarize(rows);
    const final = (placement: string, p: number, seed: number) =>
      rows
        .find((row) => row.placement === placement && row.p === p && row.seed === seed)!
        .curve.at(-1)!.validation;
    const wanted = [1, 2, 3].map((seed) => final('scores', 0.2, seed) - final('none', 0, seed));
    const found = againstNone(summary, 'final').find(
      ({ first }) => first.placement === 'scores' && first.p === 0.2,
    );
    expect(found?.interval).toEqual(intervalOf(wanted));
    expect(found?.joint).toEqual(intervalOf(wanted, 1 - 0.05 / 12));
    expect(bestGroups(summary, 'final').map(({ p }) => p)).toEqual([0.5, 0.5, 0.5]);
  });

  test('runs that are missing, doubled or not paired are refused', () => {
    expect(() => summarize(rows.slice(1))).toThrow('no dropout, seed 1: expected one run, found 0');
    expect(() => summarize([...rows, rows[5]])).toThrow('expected one run, found 2');
    const moved = rows.map((row, i) =>
      i === 3 ? { ...row, curve: row.curve.map((p) => ({ ...p, validation: 9 })) } : row,
    );
    expect(() => summarize(moved)).toThrow('weights, p = 0.3: its runs did not start as those');
    expect(() => summarize(listJobs(1).map(madeUpRow))).toThrow('two seeds at least');
  });

  test('docs/placement.md is what its result files say', () => {
    const results = join(ROOT, 'docs/placement');
    const { header, rows } = readResults(results);
    const noise = JSON.parse(readFileSync(join(results, NOISE_FILE), 'utf8'));
    const page = writeReport(header, rows, summarize(rows), noise);
    expect(readFileSync(join(ROOT, 'docs/placement.md'), 'utf8')).toBe(page);
  });

  test('npm run report writes a page whose pictures and files are there', async () => {
    const [results, docs] = [join(folder, 'results'), join(folder, 'docs')];
    openResults(results, RUN.steps);
    for (const row of rows) appendRow(results, row);
    const cases = measureCases([0, 2], [0.1, 0.3]);
    const noise = { machine: {}, keys: 12, channels: 16, draws: 1, cases };
    writeFileSync(join(results, NOISE_FILE), JSON.stringify(noise));
    const program = ['--import', 'tsx', 'examples/gpt/experiment/report.ts'];
    const finished = await runNode({ args: [...program, '--results', results, '--docs', docs] });
    expect(finished, finished.stderr).toMatchObject({ status: 0 });

    const page = readFileSync(join(docs, 'placement.md'), 'utf8');
    const links = [...page.matchAll(/\]\((placement\/[^)]*)\)/g)].map(([, link]) => link);
    expect(links).toHaveLength(7);
    for (const link of links) expect(existsSync(join(docs, link)), link).toBe(true);
    expect(page).not.toMatch(/NaN|undefined|Infinity/);
    const summary = summarize(rows);
    const { mean, low, high } = againstNone(summary, 'final')[0].interval;
    const [m, l, h] = [mean, low, high].map((x) => `${x < 0 ? '−' : '+'}${Math.abs(x).toFixed(3)}`);
    const line = page.split('\n').find((text) => text.startsWith('| weights | 0.1 |'));
    expect(line).toContain(`${m} [${l}, ${h}]`);
    const again = join(folder, 'docs-again');
    await runNode({ args: [...program, '--results', join(docs, 'placement'), '--docs', again] });
    expect(readFileSync(join(again, 'placement.md'), 'utf8')).toBe(page);
  });
});

test('npm run experiment stops at Ctrl-C, keeps what has ended, and goes on', async () => {
  const results = join(folder, 'experiment');
  mkdirSync(results);
  writeFileSync(join(results, NOISE_FILE), '{}'); // it is there: the noise is not measured again
  const options = '--placements none --seeds 2 --steps 50 --jobs 1'.split(' ');
  const program = ['--import', 'tsx', 'examples/gpt/experiment/main.ts', '--out', results];
  const run = (isInterrupted: boolean) =>
    new Promise<{ status: number | null; text: string }>((resolve) => {
      const child = spawn(process.execPath, [...program, ...options], { cwd: ROOT });
      let text = '';
      let isSent = !isInterrupted;
      const listen = (part: string) => {
        text += part;
        if (!isSent && text.includes('none, seed 1:')) isSent = child.kill('SIGINT');
      };
      child.stdout.setEncoding('utf8').on('data', listen);
      child.stderr.setEncoding('utf8').on('data', listen);
      child.on('close', (status) => resolve({ status, text }));
    });

  const stopped = await run(true);
  expect(stopped, stopped.text).toMatchObject({ status: 130 });
  const before = readResults(results).rows;
  expect(before.map(({ seed }) => seed)).toEqual([1]);
  const ended = await run(false);
  expect(ended, ended.text).toMatchObject({ status: 0 });
  expect(ended.text).toContain('2 runs, of which 1 are done');
  const { header, rows } = readResults(results);
  expect(rows.map(({ seed }) => seed)).toEqual([1, 2]);
  expect(rows[0]).toEqual(before[0]);
  expect(header.run.steps).toBe(50);
  for (const { curve } of rows) {
    expect(curve.map(({ step }) => step)).toEqual([0, 50]);
    expect(curve[1].validation).toBeLessThan(curve[0].validation - 1);
  }
});
