// Training with examples/gpt: 200 steps learn, give the same bits again and with any number of
// threads and the masks of `js`, and a run that was interrupted goes on to the bit.
import { spawn } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  attentionForwardSync,
  backendInfo,
  type DropoutPlacement,
  dropoutMask,
  setNumThreads,
} from 'node-sdpa';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { Attention, Dropout } from '../../examples/gpt/attention';
import { restore, save } from '../../examples/gpt/checkpoint';
import { type Corpus, readBook, splitText } from '../../examples/gpt/text';
import { type Choice, type Settings, Trainer } from '../../examples/gpt/trainer';
import { ROOT } from '../child';

const STEPS = 200;
const PLACEMENTS: DropoutPlacement[] = ['weights', 'context', 'scores'];
const MODEL = { layers: 2, heads: 2, width: 32, length: 32 };

function settings(placement: DropoutPlacement, changes: Partial<Settings> = {}): Settings {
  return {
    model: MODEL,
    batch: 4,
    steps: STEPS,
    rate: 0.01,
    warmup: 20,
    weightDecay: 0.1,
    clip: 1,
    dropout: { placement, p: 0.25 },
    seed: 1,
    ...changes,
  };
}

let corpus: Corpus;
let folder: string;

beforeAll(() => {
  const { title, text } = readBook();
  corpus = splitText({ title, text: text.slice(0, 20_000) }, 0.1, 20_000, MODEL.length);
  folder = mkdtempSync(join(tmpdir(), 'node-sdpa-gpt-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

interface Run {
  readonly losses: number[];
  readonly trainer: Trainer;
}

function train(trainer: Trainer, steps = STEPS): Run {
  const losses = Array.from({ length: steps }, () => trainer.trainStep());
  return { losses, trainer };
}

function trainWith(placement: DropoutPlacement, choice?: Choice): Run {
  return train(new Trainer(settings(placement), corpus, choice));
}

/** Every loss and every number of both models, bit for bit. */
function expectSameRun(actual: Run, wanted: Run): void {
  expect(actual.losses).toEqual(wanted.losses);
  actual.trainer.model.parameters.forEach(({ name, value }, i) => {
    const { value: want } = wanted.trainer.model.parameters[i];
    expect(Buffer.from(value.buffer).equals(Buffer.from(want.buffer)), name).toBe(true);
  });
}

function withThreads<T>(count: number, work: () => T): T {
  const { threads } = backendInfo();
  setNumThreads(count);
  try {
    expect(backendInfo().threads).toBe(count);
    return work();
  } finally {
    setNumThreads(threads);
  }
}

const mean = (numbers: number[]) => numbers.reduce((sum, x) => sum + x) / numbers.length;

/** Attention that is told by the js backend's masks what to drop, and draws nothing itself. */
function maskedByJs(dropout: Dropout | undefined): Attention {
  if (dropout === undefined) throw new Error('there is no dropout to mask');
  const { placement, p, generator } = dropout;
  return (query, key, value, { batch, length, heads, headDim }) => {
    const { seed, offset } = generator.getState();
    generator.setState({ seed, offset: offset + 1n });
    const dims = [batch, heads, length, placement === 'context' ? headDim : length];
    const keep = dropoutMask(dims, { p, placement, seed, offset, backend: 'js' });
    const tensor = (data: unknown) => ({
      data: data as Float32Array,
      dims: [batch, length, heads, headDim],
    });
    const result = attentionForwardSync(tensor(query), tensor(key), tensor(value), {
      layout: 'bshd',
      isCausal: true,
      dropoutP: p,
      dropoutPlacement: placement,
      training: true,
      keepMask: { data: keep, dims },
    });
    return {
      output: result.output.data as Float32Array,
      backward(gradOutput) {
        const gradients = result.backwardSync(tensor(gradOutput));
        const [gradQuery, gradKey, gradValue] = [
          gradients.gradQuery,
          gradients.gradKey,
          gradients.gradValue,
        ].map(({ data }) => data as Float32Array);
        return { gradQuery, gradKey, gradValue };
      },
    };
  };
}

describe.each(PLACEMENTS)('200 steps with dropout of %s', (placement) => {
  let first: Run;
  beforeAll(() => {
    first = trainWith(placement);
  });

  test('learn: the loss falls by more than 1.5 nats a character', () => {
    console.log(`attention by ${backendInfo().selected}`);
    const fall = mean(first.losses.slice(0, 5)) - mean(first.losses.slice(-20));
    console.log(`the loss falls by ${fall.toFixed(3)} nats`);
    expect(fall).toBeGreaterThan(1.5);
    expect(first.trainer.validate()).toBeLessThan(2.8);
  });

  test('give the same bits with another number of threads and the masks of the js backend', () => {
    withThreads(5, () => {
      expectSameRun(trainWith(placement, { createAttention: maskedByJs }), first);
    });
  });
});

test('200 steps give the same bits again, on one thread too', () => {
  const first = withThreads(2, () => trainWith('weights'));
  withThreads(2, () => expectSameRun(trainWith('weights'), first));
  withThreads(1, () => expectSameRun(trainWith('weights'), first));
});

test('dropout does not touch the weights and batches of a seed, and another seed does', () => {
  const [a, b] = PLACEMENTS.map((placement) => new Trainer(settings(placement), corpus));
  expect(a.validate()).toBe(b.validate());
  const other = new Trainer(settings('weights', { seed: 2 }), corpus);
  expect(other.validate()).not.toBe(a.validate());
  expect(a.batches.getState()).toEqual(b.batches.getState());
  expect(other.batches.getState()).not.toEqual(a.batches.getState());
});

test('the js backend trains alike, but for rounding', () => {
  const [native, js] = (['auto', 'js'] as const).map((backend) =>
    train(new Trainer(settings('weights'), corpus, { backend }), 10),
  );
  js.losses.forEach((loss, i) => {
    expect(Math.abs(loss - native.losses[i]), `step ${i}`).toBeLessThan(1e-4);
  });
});

describe('a checkpoint', () => {
  test('goes on to the bit', () => {
    const file = join(folder, 'middle.safetensors');
    const create = () => new Trainer(settings('scores', { steps: 40 }), corpus);
    const whole = train(create(), 40);
    const before = train(create(), 25);
    save(file, before.trainer);
    const trainer = create();
    restore(file, trainer);
    expect(trainer.step).toBe(25);
    const after = train(trainer, 15);
    expectSameRun({ trainer, losses: [...before.losses, ...after.losses] }, whole);
    save(join(folder, 'a.safetensors'), whole.trainer);
    save(join(folder, 'b.safetensors'), trainer);
    const [a, b] = ['a', 'b'].map((name) => readFileSync(join(folder, `${name}.safetensors`)));
    expect(a.equals(b)).toBe(true);
    expect(readdirSync(folder).filter((name) => name.endsWith('.tmp'))).toEqual([]);
  });

  test('is refused by a run with other settings or another text, which stays as it was', () => {
    const file = join(folder, 'refused.safetensors');
    save(file, new Trainer(settings('weights'), corpus));
    const other = new Trainer(settings('weights', { rate: 0.02 }), corpus);
    expect(() => restore(file, other)).toThrow('another rate, 0.01 and not 0.02');
    const text = { title: 'another', text: 'abc'.repeat(1000) };
    const reader = new Trainer(settings('weights'), splitText(text, 0.5, 1000, MODEL.length));
    expect(() => restore(file, reader)).toThrow('learned another text');
    expect(other.step).toBe(0);
  });
});

describe('npm run train', () => {
  const program = ['--import', 'tsx', 'examples/gpt/train.ts'];
  const small = '--layers 1 --heads 2 --width 16 --length 32 --batch 4 --steps 250'.split(' ');

  /** Runs the command; sends SIGINT when the first steps are done, where that is asked for. */
  function run(out: string, isInterrupted: boolean, more: string[] = []) {
    return new Promise<{ status: number | null; text: string }>((resolve) => {
      const args = [...program, ...small, '--out', out, ...more];
      const child = spawn(process.execPath, args, { cwd: ROOT });
      let text = '';
      let isSent = false;
      const listen = (part: string) => {
        text += part;
        if (!isInterrupted || isSent || !text.includes('step 0/250')) return;
        isSent = child.kill('SIGINT');
      };
      child.stdout.setEncoding('utf8').on('data', listen);
      child.stderr.setEncoding('utf8').on('data', listen);
      child.on('close', (status) => resolve({ status, text }));
    });
  }

  test('saves at Ctrl-C, goes on to the bit, and says what cannot be resumed', async () => {
    const [whole, parts] = [join(folder, 'whole.safetensors'), join(folder, 'parts.safetensors')];
    expect(await run(whole, false)).toMatchObject({ status: 0 });
    const stopped = await run(parts, true);
    expect(stopped, stopped.text).toMatchObject({ status: 130 });
    expect(stopped.text).toMatch(/Saved in .* after \d+ of 250 steps; rerun to go on/);
    const rest = await run(parts, false);
    expect(rest.text).not.toContain('step 0/250');
    expect(rest, rest.text).toMatchObject({ status: 0 });
    expect(readFileSync(parts).equals(readFileSync(whole))).toBe(true);

    const changed = await run(parts, false, ['--seed', '7']);
    expect(changed).toMatchObject({ status: 1 });
    expect(changed.text.trim()).toMatch(/another seed, 1 and not 7; --fresh starts over/);
    const wrong = await run(parts, false, ['--width', '15']);
    expect(wrong).toMatchObject({ status: 1 });
    expect(wrong.text.trim()).toBe('--width: expected a multiple of 2 heads, got 15');
  });
});
