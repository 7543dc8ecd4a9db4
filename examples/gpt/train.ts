// Trains a GPT on a text and keeps it in a file; started again, it goes on, to the bit.
//
//   npm run train -- [options]
//     --file FILE        the text to learn (default: Moby-Dick)
//     --out FILE         the checkpoint (default: out/gpt.safetensors)
//     --fresh            starts over where there is a checkpoint
//     --steps COUNT      (2000)      --batch COUNT      pieces of text in a step (8)
//     --layers COUNT     (2)         --heads COUNT      (4)
//     --width COUNT      (64)        --length COUNT     characters seen at once (128)
//     --rate NUMBER      highest learning rate (0.002)
//     --placement NAME   dropout of attention: weights, context, scores or none (weights)
//     --p NUMBER         its probability (0.1)
//     --seed COUNT       (1)
//     --backend NAME     what computes attention: auto, js, cpu:avx2 and so on (auto)
import { existsSync, rmSync } from 'node:fs';
import path from 'node:path';
import { setImmediate } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { type BackendName, backendInfo } from 'node-sdpa';
import { restore, save } from './checkpoint';
import { CHECKPOINT, readCount, readNumber, runCommand } from './command';
import { Progress } from './progress';
import { readBook, splitText, UsageError } from './text';
import { type Settings, Trainer } from './trainer';

const VALIDATION = { share: 0.1, longest: 16_384 };
/** After so many steps, and at the end, the run is validated and saved. */
const SAVED_EVERY = 200;
const PLACEMENTS = ['weights', 'context', 'scores', 'none'] as const;

runCommand(async () => {
  const { values: given } = parseArgs({
    options: {
      file: { type: 'string' },
      out: { type: 'string', default: CHECKPOINT },
      fresh: { type: 'boolean', default: false },
      steps: { type: 'string', default: '2000' },
      batch: { type: 'string', default: '8' },
      layers: { type: 'string', default: '2' },
      heads: { type: 'string', default: '4' },
      width: { type: 'string', default: '64' },
      length: { type: 'string', default: '128' },
      rate: { type: 'string', default: '0.002' },
      placement: { type: 'string', default: 'weights' },
      p: { type: 'string', default: '0.1' },
      seed: { type: 'string', default: '1' },
      backend: { type: 'string', default: 'auto' },
    },
  });
  const settings = readSettings(given);
  const book = readBook(given.file);
  const corpus = splitText(book, VALIDATION.share, VALIDATION.longest, settings.model.length);
  const trainer = new Trainer(settings, corpus, { backend: readBackend(given.backend) });
  // npm runs in the package's folder; the user means a file of their own.
  const out = path.resolve(process.env.INIT_CWD ?? '', given.out);
  if (given.fresh) rmSync(out, { force: true });
  if (existsSync(out)) resume(out, trainer);
  await train(trainer, out, book.title);
});

function readSettings(given: Record<string, string | boolean | undefined>): Settings {
  const count = (name: string, least: number) => readCount(name, `${given[name]}`, least);
  const placement = PLACEMENTS.find((name) => name === given.placement);
  if (placement === undefined) {
    throw new UsageError(`--placement: expected ${PLACEMENTS.join(', ')}, got ${given.placement}`);
  }
  const model = {
    layers: count('layers', 1),
    heads: count('heads', 1),
    width: count('width', 1),
    length: count('length', 2),
  };
  if (model.width % model.heads !== 0) {
    throw new UsageError(
      `--width: expected a multiple of ${model.heads} heads, got ${model.width}`,
    );
  }
  return {
    model,
    batch: count('batch', 1),
    steps: count('steps', 1),
    rate: readNumber('rate', `${given.rate}`, 0),
    warmup: 100,
    weightDecay: 0.1,
    clip: 1,
    dropout: { placement, p: placement === 'none' ? 0 : readNumber('p', `${given.p}`, 0, 1) },
    seed: readCount('seed', `${given.seed}`, 0, 2 ** 31 - 1),
  };
}

function readBackend(name: string): BackendName {
  const usable = backendInfo().tried.flatMap(({ backend, ok }) => (ok ? [backend] : []));
  const found = ['auto' as const, ...usable].find((backend) => backend === name);
  if (found !== undefined) return found;
  throw new UsageError(`--backend: expected auto, ${usable.join(', ')}, got ${name}`);
}

function resume(file: string, trainer: Trainer): void {
  try {
    restore(file, trainer);
  } catch (error) {
    if (error instanceof UsageError) error.message += '; --fresh starts over, --out takes another';
    throw error;
  }
}

async function train(trainer: Trainer, out: string, title: string): Promise<void> {
  const { settings, model } = trainer;
  const { selected, threads } = backendInfo();
  const count = model.parameters.reduce((sum, { value }) => sum + value.length, 0);
  console.log(`${title}: ${count} parameters, attention by ${selected}, ${threads} thread(s)`);
  let isStopped = false;
  const stop = () => {
    isStopped = true; // a second Ctrl-C ends the process at once
  };
  process.once('SIGINT', stop).once('SIGTERM', stop);

  const bar = new Progress(trainer);
  while (!trainer.isFinished && !isStopped) {
    bar.show(trainer.trainStep());
    if (trainer.step % SAVED_EVERY === 0) {
      bar.validation = trainer.validate();
      save(out, trainer);
    }
    await setImmediate(); // lets Ctrl-C and the progress bar have their turn
  }
  bar.stop();
  save(out, trainer);
  const where = path.relative(process.env.INIT_CWD ?? '', out);
  if (!trainer.isFinished) {
    console.log(
      `Saved in ${where} after ${trainer.step} of ${settings.steps} steps; rerun to go on.`,
    );
    process.exitCode = 130; // as a command that Ctrl-C ended
    return;
  }
  console.log(`Validation loss ${trainer.validate().toFixed(4)} nats a character; ${where}`);
  console.log('Now: npm run sample -- "Call me"');
}
