// Continuous batching of examples/server: texts that come and go, on a pool that is too small for
// all, against each alone and against examples/gpt's own writer.
import { describe, expect, test } from 'vitest';
import { Gpt } from '../../examples/gpt/model';
import { randomStreams } from '../../examples/gpt/random';
import { writeTokens } from '../../examples/gpt/writer';
import {
  Engine,
  type EngineSizes,
  type Step,
  type Writing,
  type WrittenToken,
} from '../../examples/server/engine';

// Longer than a block of 64 positions, and than the piece of a prompt that one step reads.
const SIZES = { layers: 2, heads: 2, width: 16, length: 150, vocabulary: 40 };
const BLOCKS_OF_ONE = 2 * 3;

const model = new Gpt(SIZES);
model.initialize(randomStreams(5, 1)[0]);

function writingOf(id: number, length: number, count: number): Writing {
  const tokens = Array.from({ length }, (_, i) => (7 * id + i * i) % SIZES.vocabulary);
  const topK = id % 2 === 0 ? undefined : 5;
  return { id, tokens, count, temperature: 0.9, topK, seed: `${2n ** 63n + BigInt(id)}` };
}

// Short and long prompts, beyond the model's length too, and texts that outgrow it.
const WRITINGS = [
  writingOf(0, 1, 30),
  writingOf(1, 64, 20),
  writingOf(2, 65, 10),
  writingOf(3, 149, 100),
  writingOf(4, 150, 3),
  writingOf(5, 400, 1),
  writingOf(6, 7, 250),
  writingOf(7, 2, 30),
];

interface Run {
  readonly written: Map<number, WrittenToken[]>;
  readonly steps: Step[];
}

/** Lets an engine write all; `onStep` may do something to it after each step. */
function write(
  writings: readonly Writing[],
  sizes: EngineSizes,
  onStep: (engine: Engine, step: Step, run: Run) => void = () => {},
  count = writings.length, // how many come to their end
): Promise<Run> {
  const run: Run = { written: new Map(writings.map(({ id }) => [id, []])), steps: [] };
  let left = count;
  return new Promise((resolve, reject) => {
    const engine = new Engine(model, sizes, (step) => {
      run.steps.push(step);
      for (const token of step.written) run.written.get(token.id)!.push(token);
      if (step.failed.length > 0) reject(new Error(step.failed[0].message));
      onStep(engine, step, run);
      left -= step.ended.length;
      if (left === 0) resolve(run);
    });
    for (const writing of writings) engine.add(writing);
  });
}

const alone = Promise.all(
  WRITINGS.map(async (writing) => {
    const run = await write([writing], { batch: 1, blocks: BLOCKS_OF_ONE });
    return run.written.get(writing.id)!;
  }),
);

test.each(WRITINGS)("text $id is that of examples/gpt's writer", async (writing) => {
  const [random] = randomStreams(BigInt(writing.seed), 1);
  const wanted: number[] = [];
  for (const token of writeTokens(model, Int32Array.from(writing.tokens), { ...writing, random })) {
    wanted.push(token);
    if (wanted.length === writing.count) break;
  }
  expect((await alone)[writing.id].map(({ token }) => token)).toEqual(wanted);
});

describe.each<[string, EngineSizes]>([
  ['all at once', { batch: 8, blocks: 8 * BLOCKS_OF_ONE }],
  ['three at once', { batch: 3, blocks: 8 * BLOCKS_OF_ONE }],
  ['with blocks for hardly two', { batch: 8, blocks: BLOCKS_OF_ONE + 2 }],
  ['with blocks for one', { batch: 8, blocks: BLOCKS_OF_ONE }],
])('%s', (_name, sizes) => {
  test('every text has the bits that it has alone, in any order of arrival', async () => {
    for (const writings of [WRITINGS, [...WRITINGS].reverse()]) {
      const { written, steps } = await write(writings, sizes);
      const wanted = await alone;
      for (const { id } of writings) expect(written.get(id), `text ${id}`).toEqual(wanted[id]);
      expect(steps.at(-1)?.freeBlocks).toBe(sizes.blocks);
      expect(steps.flatMap(({ begun }) => begun)).toEqual(writings.map(({ id }) => id));
    }
  });

  test('texts that are cancelled leave, and the others do not notice', async () => {
    const gone = new Map([
      [1, 1],
      [3, 15],
      [6, 10],
    ]); // id: after how many tokens
    const wanted = await alone;
    const { written, steps } = await write(
      WRITINGS,
      sizes,
      (engine, step, run) => {
        for (const { id } of step.written) {
          if (run.written.get(id)!.length === gone.get(id)) engine.cancel(id);
        }
      },
      WRITINGS.length - gone.size,
    );
    for (const { id } of WRITINGS) {
      expect(written.get(id), `text ${id}`).toEqual(wanted[id].slice(0, gone.get(id)));
    }
    expect(steps.at(-1)?.freeBlocks).toBe(sizes.blocks);
  });
});

test('a text that is cancelled while it waits never begins', async () => {
  const run = await write([WRITINGS[0], WRITINGS[2]], { batch: 1, blocks: 6 }, (engine, _, run) => {
    if (run.steps.length === 1) {
      engine.add({ ...WRITINGS[1], id: 50 });
      engine.cancel(50);
    }
  });
  expect(run.steps.flatMap(({ begun }) => begun)).toEqual([0, 2]);
});

test('one pass through the model serves all that write', async () => {
  const writings = Array.from({ length: 8 }, (_, id) => writingOf(id, 1, 20));
  const { steps } = await write(writings, { batch: 8, blocks: 8 * BLOCKS_OF_ONE });
  expect(steps).toHaveLength(20);
  for (const { rows } of steps) expect(rows).toBe(8);
});

test('a pool that could not hold one text is refused', () => {
  expect(() => new Engine(model, { batch: 1, blocks: 5 }, () => {})).toThrow(
    'blocks: expected at least 6, got 5',
  );
});
