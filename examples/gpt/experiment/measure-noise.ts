// The noise part of the experiment alone: `npm run experiment:noise -- [--out FOLDER]`.
import { mkdirSync } from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { runCommand } from '../command';
import { measureNoise } from './noise';

runCommand(() => {
  const options = { out: { type: 'string', default: 'out/experiment' } } as const;
  const { values: given } = parseArgs({ options });
  const folder = path.resolve(process.env.INIT_CWD ?? '', given.out);
  mkdirSync(folder, { recursive: true });
  measureNoise(folder);
});
