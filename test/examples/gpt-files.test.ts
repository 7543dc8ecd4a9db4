// What examples/gpt keeps in files and writes from them: safetensors, and text from a model by a
// cache of keys and values.
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { xoroshiro128plus } from 'pure-rand/generator/xoroshiro128plus';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { evaluationAttention } from '../../examples/gpt/attention';
import { loadModel, save } from '../../examples/gpt/checkpoint';
import { ArrayCache } from '../../examples/gpt/kv-cache';
import { Gpt } from '../../examples/gpt/model';
import { randomStreams } from '../../examples/gpt/random';
import {
  decodeSafetensors,
  encodeSafetensors,
  readSafetensors,
  writeSafetensors,
} from '../../examples/gpt/safetensors';
import { readBook, splitText, UsageError, Vocabulary } from '../../examples/gpt/text';
import { Trainer } from '../../examples/gpt/trainer';
import { choose, Decoder, writeTokens } from '../../examples/gpt/writer';
import { runNode } from '../child';

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'node-sdpa-gpt-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

/** A file put together by hand from a header and the bytes behind it. */
function file(header: string, numbers = Buffer.alloc(0), length = BigInt(header.length)): Buffer {
  const start = Buffer.alloc(8);
  start.writeBigUInt64LE(length);
  return Buffer.concat([start, Buffer.from(header), numbers]);
}

const float32 = (...numbers: number[]) => Buffer.from(Float32Array.from(numbers).buffer);
const entry = (dtype: string, shape: unknown, begin: number, end: number) =>
  JSON.stringify({ dtype, shape, data_offsets: [begin, end] });

describe('safetensors', () => {
  const tensors = new Map([
    ['matrix', { shape: [2, 3], data: Float32Array.of(1, -2, 3.5, 0, Infinity, 1e-40) }],
    ['scalar', { shape: [], data: Float32Array.of(7) }],
    ['empty', { shape: [0, 4], data: new Float32Array(0) }],
    ['Zähler', { shape: [1], data: Float32Array.of(NaN) }],
  ]);
  const metadata = { step: '12', name: 'a "quoted" name' };

  test('what is written is read again', () => {
    const bytes = encodeSafetensors({ tensors, metadata });
    expect(bytes.readBigUInt64LE() % 8n).toBe(0n); // numbers are aligned
    expect(decodeSafetensors(bytes)).toEqual({ tensors, metadata });
  });

  test('a file made by hand is read', () => {
    const header = `{"b":${entry('F32', [2], 4, 12)}, "a":${entry('F32', [1, 1], 0, 4)}}   `;
    const read = decodeSafetensors(file(header, float32(5, 6, 7)));
    expect(read.metadata).toEqual({});
    expect([...(read.tensors.get('a')?.data ?? [])]).toEqual([5]);
    expect([...(read.tensors.get('b')?.data ?? [])]).toEqual([6, 7]);
  });

  const pair = (first: string, second: string) => `{"a":${first},"b":${second}}`;
  const one = (entry: string) => `{"a":${entry}}`;
  const eight = float32(1, 2);
  test.each<[string, Buffer, RegExp]>([
    ['an empty file', Buffer.alloc(0), /too short/],
    ['a header longer than the file', file('{}', eight, 99n), /header has 99 bytes, the file 18/],
    ['a header of 2^63 bytes', file('{}', eight, 1n << 63n), /header has 9223372036854775808/],
    ['no JSON', file('{"a":'), /not JSON/],
    ['another JSON', file('[1]'), /not JSON: it does not begin with {/],
    ['bytes that are not UTF-8', file('{"\xff":1}'.slice(0, 4), eight, 10n), /not JSON/],
    ['an entry that is no object', file('{"a":1}'), /tensor "a": its entry/],
    ['another type', file(one(entry('F16', [4], 0, 8)), eight), /expected dtype F32, got "F16"/],
    ['a negative size', file(one(entry('F32', [-2], 0, 8)), eight), /\[-2\] is not a shape/],
    ['a fractional size', file(one(entry('F32', [0.5], 0, 2)), eight), /not a shape/],
    ['offsets beyond the end', file(one(entry('F32', [3], 0, 12)), eight), /are \[0,12\] of 8/],
    ['offsets that go backwards', file(one(entry('F32', [2], 8, 0)), eight), /needs 8 bytes/],
    ['a shape of another size', file(one(entry('F32', [3], 0, 8)), eight), /needs 12 bytes/],
    ['a gap', file(one(entry('F32', [1], 4, 8)), eight), /leave a gap/],
    [
      'an overlap',
      file(pair(entry('F32', [2], 0, 8), entry('F32', [1], 4, 8)), eight),
      /overlap or leave/,
    ],
    ['bytes left over', file(one(entry('F32', [1], 0, 4)), eight), /left over/],
    ['metadata of numbers', file('{"__metadata__":{"step":1}}'), /__metadata__/],
  ])('%s is refused', (_name, bytes, message) => {
    expect(() => decodeSafetensors(bytes)).toThrow(message);
    expect(() => decodeSafetensors(bytes)).toThrow(
      expect.objectContaining({ name: 'SafetensorsError' }),
    );
  });

  test('a write that fails leaves the old file', () => {
    const target = join(folder, 'kept.safetensors');
    writeSafetensors(target, { tensors, metadata });
    const wrong = { tensors: new Map([['a', { shape: [1n], data: new Float32Array(1) }]]) };
    expect(() => writeSafetensors(target, { ...wrong, metadata } as never)).toThrow('BigInt');
    expect(readSafetensors(target)).toEqual({ tensors, metadata });
    expect(readdirSync(folder).filter((name) => name.startsWith('kept'))).toHaveLength(1);
  });

  test('the message names the file', () => {
    const target = join(folder, 'broken.safetensors');
    writeFileSync(target, 'nothing of the kind');
    expect(() => readSafetensors(target)).toThrow(`${target}: the header has`);
  });
});

const SIZES = { layers: 2, heads: 2, width: 16, length: 12, vocabulary: 9 };

function createModel(): Gpt {
  const model = new Gpt(SIZES);
  model.initialize(randomStreams(5, 1)[0]);
  return model;
}

describe('writing with a cache', () => {
  const text = Int32Array.of(3, 1, 4, 1, 5, 8, 2, 6, 5, 3, 5, 8);

  test.each([[[12]], [[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]], [[5, 1, 3, 1, 2]]])(
    'pieces of %j tokens give the logits of full attention',
    (pieces) => {
      const model = createModel();
      const full = model.forward(text, 1, evaluationAttention());
      const decoder = new Decoder(model);
      for (const piece of pieces) {
        const logits = decoder.read(text.slice(decoder.position, decoder.position + piece));
        const last = (decoder.position - 1) * SIZES.vocabulary;
        for (let i = 0; i < SIZES.vocabulary; i++) {
          expect(Math.abs(logits[i] - full[last + i])).toBeLessThan(1e-5);
        }
      }
      expect(decoder.position).toBe(12);
    },
  );

  test('the text is that of a model that reads everything again for each character', () => {
    const model = createModel();
    const prompt = Int32Array.of(1, 2, 3);
    const taste = (seed: number) => ({ temperature: 0.9, random: randomStreams(seed, 1)[0] });
    const written: number[] = [];
    for (const token of writeTokens(model, prompt, taste(3))) {
      written.push(token);
      if (written.length === 40) break; // more than three times past the model's length
    }
    let seen = [...prompt];
    const again: number[] = [];
    const same = taste(3);
    while (again.length < 40) {
      const logits = model.forward(Int32Array.from(seen), 1, evaluationAttention());
      const token = choose(logits.slice(-SIZES.vocabulary) as Float32Array, same);
      again.push(token);
      seen.push(token);
      if (seen.length > SIZES.length) seen = seen.slice(-SIZES.length / 2);
    }
    expect(written).toEqual(again);
  });

  test('characters come by their probability', () => {
    const logits = Float32Array.of(0, Math.log(2), Math.log(5), -Infinity);
    const [random] = randomStreams(1, 1);
    const counts = [0, 0, 0, 0];
    for (let i = 0; i < 8000; i++) counts[choose(logits, { temperature: 1, random })]++;
    // Five standard deviations of a binomial count.
    [1000, 2000, 5000, 0].forEach((count, i) => {
      expect(Math.abs(counts[i] - count)).toBeLessThanOrEqual(5 * Math.sqrt(count));
    });
    expect(choose(logits, { temperature: 0, random })).toBe(2);
  });

  test('only the likeliest come where so many are wanted', () => {
    const logits = Float32Array.of(0, Math.log(2), Math.log(5), Math.log(2), -3);
    const [random] = randomStreams(2, 1);
    const seen = (topK: number, taste = { temperature: 1, topK, random }) =>
      [...new Set(Array.from({ length: 500 }, () => choose(logits, taste)))].sort();
    expect(seen(1)).toEqual([2]);
    expect(seen(2)).toEqual([1, 2, 3]); // 1 and 3 are as likely
    expect(seen(4)).toEqual([0, 1, 2, 3]);
    expect(seen(5)).toEqual([0, 1, 2, 3, 4]);
    expect(seen(99)).toEqual([0, 1, 2, 3, 4]);
  });

  test("seeds have 64 bits, and below 2^32 are pure-rand's own", () => {
    for (const seed of [0, 1, 77, 2 ** 31, 2 ** 32 - 1]) {
      const source = xoroshiro128plus(seed);
      source.jump();
      expect(randomStreams(seed, 1)[0].getState()).toEqual(source.getState());
      expect(randomStreams(BigInt(seed), 1)[0].getState()).toEqual(source.getState());
    }
    const states = [1n, 1n + 2n ** 32n, 1n + 2n ** 63n, 2n ** 64n - 1n].map(
      (seed) => `${randomStreams(seed, 1)[0].getState()}`,
    );
    expect(new Set(states).size).toBe(4);
  });

  test('a cache holds what was appended while it grows', () => {
    const cache = new ArrayCache(1, 1);
    for (let i = 1; i <= 100; i++) cache.append(Float32Array.of(0), Float32Array.of(i));
    expect(cache.length).toBe(100);
    expect(cache.attend(Float32Array.of(1))[0]).toBeCloseTo(50.5, 4); // equal weights: the mean
  });
});

describe('text', () => {
  test('a vocabulary goes there and back, and refuses what it lacks', () => {
    const vocabulary = Vocabulary.of('ça va 🐋?');
    expect(vocabulary.decode(vocabulary.encode('va 🐋'))).toBe('va 🐋');
    expect(() => vocabulary.encode('w')).toThrow(
      new UsageError('"w" is not in the text that was learned'),
    );
  });

  test('a split keeps the order and refuses texts that are too short', () => {
    const { training, validation, vocabulary } = splitText(
      { title: 'x', text: 'abcdefghij' },
      0.4,
      3,
      2,
    );
    expect(vocabulary.decode(training)).toBe('abcdef');
    expect(vocabulary.decode(validation)).toBe('ghi');
    expect(() => splitText({ title: 'x', text: 'abcd' }, 0.5, 9, 2)).toThrow('x: the text is too');
  });
});

test('npm run sample writes from a checkpoint, the same for the same seed', async () => {
  const { title, text } = readBook();
  const corpus = splitText({ title, text: text.slice(0, 5000) }, 0.2, 5000, 16);
  const trainer = new Trainer(
    {
      model: { layers: 1, heads: 2, width: 16, length: 16 },
      ...{ batch: 4, steps: 10, rate: 0.01, warmup: 1, weightDecay: 0, clip: 1, seed: 1 },
      dropout: { placement: 'none', p: 0 },
    },
    corpus,
  );
  for (let i = 0; i < 10; i++) trainer.trainStep();
  const checkpoint = join(folder, 'sample.safetensors');
  save(checkpoint, trainer);
  expect(loadModel(checkpoint).model.parameters.map(({ value }) => value)).toEqual(
    trainer.model.parameters.map(({ value }) => value),
  );

  const program = ['--import', 'tsx', 'examples/gpt/sample.ts'];
  const sample = (...args: string[]) =>
    runNode({ args: [...program, '--model', checkpoint, '--characters', '60', ...args] });
  const first = await sample('Call', 'me', '--seed', '4');
  expect(first, first.stderr).toMatchObject({ status: 0 });
  expect(first.stdout).toMatch(/^Call me[\s\S]{60}\n$/);
  expect((await sample('Call me', '--seed', '4')).stdout).toBe(first.stdout);

  const unknown = await sample('日本');
  expect(unknown).toMatchObject({ status: 1, stdout: expect.any(String) });
  expect(unknown.stderr.trim()).toBe('"日" is not in the text that was learned');
  const missing = await runNode({ args: [...program, '--model', join(folder, 'none')] });
  expect(missing.status).toBe(1);
  expect(missing.stderr).toMatch(/is not there yet: npm run train makes it\n$/);
  const broken = join(folder, 'sample-broken.safetensors');
  writeFileSync(broken, readFileSync(checkpoint).subarray(0, -4));
  const refused = await runNode({ args: [...program, '--model', broken] });
  expect(refused).toMatchObject({ status: 1, stdout: '' });
  expect(refused.stderr.trim().split('\n')).toHaveLength(1);
});
