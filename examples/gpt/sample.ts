// Writes text with the model that `npm run train` left.
//
//   npm run sample -- ["Prompt"] [options]
//     --model FILE          (default: out/gpt.safetensors)
//     --characters COUNT    how many to write (500)
//     --temperature NUMBER  0 takes the likeliest character each time (0.8)
//     --top-k COUNT         of so many of the likeliest characters only (default: all)
//     --seed COUNT          (default: another one each time)
import { existsSync } from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { loadModel } from './checkpoint';
import { CHECKPOINT, readCount, readNumber, runCommand } from './command';
import { randomStreams } from './random';
import { UsageError } from './text';
import { writeTokens } from './writer';

runCommand(() => {
  const { values: given, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      model: { type: 'string', default: CHECKPOINT },
      characters: { type: 'string', default: '500' },
      temperature: { type: 'string', default: '0.8' },
      'top-k': { type: 'string' },
      seed: { type: 'string', default: `${Date.now() % 2 ** 31}` },
    },
  });
  const file = path.resolve(process.env.INIT_CWD ?? '', given.model);
  if (!existsSync(file)) throw new UsageError(`${file} is not there yet: npm run train makes it`);
  const prompt = positionals.join(' ') || '\n';
  const { model, vocabulary } = loadModel(file);
  const [random] = randomStreams(readCount('seed', given.seed, 0, 2 ** 31 - 1), 1);
  const temperature = readNumber('temperature', given.temperature, 0);
  const topK = given['top-k'] === undefined ? undefined : readCount('top-k', given['top-k'], 1);
  let left = readCount('characters', given.characters, 1);
  process.stdout.write(prompt);
  const taste = { temperature, topK, random };
  for (const token of writeTokens(model, vocabulary.encode(prompt), taste)) {
    process.stdout.write(vocabulary.decode([token]));
    if (--left === 0) break;
  }
  process.stdout.write('\n');
});
