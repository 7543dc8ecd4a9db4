// Writes docs/placement.md with its charts from the result files of the experiment alone.
//
//   npm run report -- [options]
//     --results FOLDER  where runs.jsonl and noise.json are (default: out/experiment)
//     --docs FOLDER     where placement.md and the folder placement/ go (default: docs)
import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { save } from '../../demo/pictures.mjs';
import { runCommand } from '../command';
import { biasChart, curvesChart, differencesChart, noiseChart, termsChart } from './charts';
import type { NoiseFile } from './noise';
import { writeReport } from './page';
import { NOISE_FILE, RUNS_FILE, readResults } from './results';
import { summarize } from './summary';

runCommand(async () => {
  const { values: given } = parseArgs({
    options: {
      results: { type: 'string', default: 'out/experiment' },
      docs: { type: 'string', default: 'docs' },
    },
  });
  const [results, docs] = [given.results, given.docs].map((folder) =>
    path.resolve(process.env.INIT_CWD ?? '', folder),
  );
  await report(results, docs);
  console.log(`Written: ${path.relative('', path.join(docs, 'placement.md'))}`);
});

async function report(results: string, docs: string): Promise<void> {
  const { header, rows } = readResults(results);
  const noise: NoiseFile = JSON.parse(readFileSync(path.join(results, NOISE_FILE), 'utf8'));
  const summary = summarize(rows);
  const folder = path.join(docs, 'placement');
  mkdirSync(folder, { recursive: true });
  // The report and the numbers it is made of stay together.
  for (const name of [RUNS_FILE, NOISE_FILE]) {
    const [from, to] = [path.join(results, name), path.join(folder, name)];
    if (from !== to) copyFileSync(from, to);
  }
  await drawAll(folder, {
    terms: termsChart(),
    curves: curvesChart(summary),
    differences: differencesChart(summary),
    noise: noiseChart(noise.cases),
    bias: biasChart(noise.cases),
  });
  writeFileSync(path.join(docs, 'placement.md'), writeReport(header, rows, summary, noise));
}

/** PNG only: where a page shows an SVG, its font may be missing. */
async function drawAll(folder: string, pictures: Record<string, object>): Promise<void> {
  const temporary = mkdtempSync(path.join(tmpdir(), 'node-sdpa-'));
  try {
    for (const [name, picture] of Object.entries(pictures)) {
      await save(temporary, name, picture);
      copyFileSync(path.join(temporary, `${name}.png`), path.join(folder, `${name}.png`));
    }
  } finally {
    rmSync(temporary, { recursive: true });
  }
}
