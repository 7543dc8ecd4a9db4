// The server of examples/server over HTTP: its answers, what it refuses, and what it does when too
// many come, when clients go away or dawdle, and when it is told to stop.

import { spawn } from 'node:child_process';
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import { once } from 'node:events';
import { connect } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import type { FastifyInstance } from 'fastify';
import { scaledDotProductAttentionSync } from 'node-sdpa';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { Attention } from '../../examples/gpt/attention';
import { loadModel } from '../../examples/gpt/checkpoint';
import { randomStreams } from '../../examples/gpt/random';
import { writeTokens } from '../../examples/gpt/writer';
import type { Step } from '../../examples/server/engine';
import { decodeFloats } from '../../examples/server/floats';
import type { Answer } from '../../examples/server/metrics';
import { createServer } from '../../examples/server/server';
import { EngineThread, sentModel } from '../../examples/server/threads';
import { computeSamples, joinShards } from '../../examples/server/uncertainty';
import { ROOT } from '../child';
import { createCheckpoint, SIZES, serve } from './server-model';

const { file: checkpoint, remove } = createCheckpoint();
const { model, vocabulary } = loadModel(checkpoint);
afterAll(remove);

let app: FastifyInstance;
let url: string;
let port: number;
beforeAll(async () => {
  ({ app, url, port } = await serve({ checkpoint, limits: { requestMs: 400, characters: 5000 } }));
});
afterAll(() => app.close());

function post(route: string, body: unknown, to = url, signal?: AbortSignal): Promise<Response> {
  return fetch(to + route, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: typeof body === 'string' ? body : JSON.stringify(body),
    signal,
  });
}

interface Line {
  type: string;
  text?: string;
  seed?: string;
  entropy?: number;
}

async function generate(body: object, to = url): Promise<Line[]> {
  const response = await post('/generate', body, to);
  expect(response.status).toBe(200);
  expect(response.headers.get('content-type')).toBe('application/x-ndjson');
  const lines = (await response.text()).split('\n');
  expect(lines.pop()).toBe('');
  return lines.map((line) => JSON.parse(line));
}

const textOf = (lines: Line[]) => lines.map(({ text = '' }) => text).join('');

/** What examples/gpt writes by itself. */
function written(prompt: string, seed: bigint, count: number, temperature = 0.8, topK?: number) {
  const [random] = randomStreams(seed, 1);
  const tokens: number[] = [];
  const taste = { temperature, topK, random };
  for (const token of writeTokens(model, vocabulary.encode(prompt), taste)) {
    tokens.push(token);
    if (tokens.length === count) break;
  }
  return vocabulary.decode(tokens);
}

async function metric(name: string, to = url): Promise<number> {
  const lines = (await (await fetch(`${to}/metrics`)).text()).split('\n');
  return Number(lines.find((line) => line.startsWith(`gpt_server_${name} `))?.split(' ')[1]);
}

/** Waits until something is so. */
async function until(isSo: () => Promise<boolean> | boolean): Promise<void> {
  for (let i = 0; i < 500; i++) {
    if (await isSo()) return;
    await sleep(10);
  }
  expect.fail(`never so: ${isSo}`);
}

describe('answers', () => {
  test('text by a seed, of 64 bits too, is that of the model', async () => {
    const lines = await generate({
      prompt: 'Call me',
      characters: 120,
      seed: '18446744073709551615',
    });
    expect(lines[0]).toEqual({ type: 'start', seed: '18446744073709551615' });
    expect(lines.at(-1)).toEqual({ type: 'end', characters: 120 });
    expect(textOf(lines)).toBe(written('Call me', 2n ** 64n - 1n, 120));
    for (const { entropy } of lines.slice(1, -1)) expect(entropy).toBeGreaterThan(0);
    const greedy = await generate({ prompt: 'a', characters: 9, temperature: 0, seed: 3 });
    expect(textOf(greedy)).toBe(written('a', 3n, 9, 0));
    const few = await generate({ prompt: 'a', characters: 40, temperature: 2, topK: 3, seed: 3 });
    expect(textOf(few)).toBe(written('a', 3n, 40, 2, 3));
  });

  test('without a seed each text has its own, which gives it again', async () => {
    const [one, other] = await Promise.all([
      generate({ prompt: 'the', characters: 30 }),
      generate({ prompt: 'the', characters: 30 }),
    ]);
    expect(one[0].seed).not.toBe(other[0].seed);
    expect(await generate({ prompt: 'the', characters: 30, seed: one[0].seed })).toEqual(one);
  });

  test('many at once are each what they are alone', async () => {
    const texts = await Promise.all(
      Array.from({ length: 24 }, (_, seed) =>
        generate({ prompt: 'whale'.slice(seed % 5), characters: 50 + seed, seed }),
      ),
    );
    texts.forEach((lines, seed) => {
      expect(textOf(lines)).toBe(written('whale'.slice(seed % 5), BigInt(seed), 50 + seed));
    });
  });

  test('uncertainty is that of its module, sharded or not', async () => {
    const body = { text: 'the whale', placement: 'scores', p: 0.25, samples: 12, seed: '77' };
    const answer = await (await post('/uncertainty', body)).json();
    const { text, ...rest } = body;
    const job = { ...rest, placement: 'scores' as const, tokens: [...vocabulary.encode(text)] };
    const shards = [await computeSamples(model, job, 5, 7), await computeSamples(model, job, 0, 5)];
    const wanted = joinShards(job, model.sizes.vocabulary, shards);
    expect(answer).toMatchObject({ seed: '77', samples: 12, backends: wanted.backends });
    expect(answer.predictions).toEqual(
      wanted.predictions.map(({ token, likeliest, ...numbers }) => ({
        ...numbers,
        character: token === null ? null : vocabulary.decode([token]),
        likeliest: likeliest.map(({ token, mean }) => ({
          character: vocabulary.decode([token]),
          mean,
        })),
      })),
    );
  });

  test('attention maps are the weights of each layer and head', async () => {
    const text = 'There she blows';
    const { layers, heads, length, weights } = await (await post('/attention', { text })).json();
    expect({ layers, heads, length }).toEqual({ layers: 2, heads: 2, length: 15 });
    const maps = decodeFloats(weights);
    expect(maps).toHaveLength(2 * 2 * 15 * 15);
    // Weights times the unit matrix as values are the weights.
    const attention: Attention = (query, key, value, shape, layer) => {
      const { length, heads, headDim } = shape;
      const tensor = (data: unknown) => ({
        data: data as Float32Array,
        dims: [1, length, heads, headDim],
      });
      const options = { layout: 'bshd', isCausal: true } as const;
      const unit = new Float32Array(length * heads * length);
      for (let i = 0; i < length; i++) {
        for (let h = 0; h < heads; h++) unit[(i * heads + h) * length + i] = 1;
      }
      const units = { data: unit, dims: [1, length, heads, length] };
      const seen = scaledDotProductAttentionSync(tensor(query), tensor(key), units, options);
      for (let i = 0; i < seen.data.length; i++) {
        const [q, h, k] = [
          Math.floor(i / heads / length),
          Math.floor(i / length) % heads,
          i % length,
        ];
        const at = ((layer * heads + h) * length + q) * length + k;
        expect(Math.abs((seen.data[i] as number) - maps[at])).toBeLessThan(1e-6);
      }
      const output = scaledDotProductAttentionSync(
        tensor(query),
        tensor(key),
        tensor(value),
        options,
      );
      return { output: output.data as Float32Array };
    };
    model.forward(vocabulary.encode(text), 1, attention);
  });

  test('health and model', async () => {
    const health = await (await fetch(`${url}/healthz`)).json();
    expect(health).toMatchObject({ status: 'ok', running: 0, waiting: 0 });
    expect(health.backend.tried.length).toBeGreaterThan(0);
    const about = await (await fetch(`${url}/model`)).json();
    expect(about).toMatchObject({ step: 5, sizes: SIZES, characters: vocabulary.characters });
  });

  test('metrics count what was done, and so may other listeners', async () => {
    const answers: Answer[] = [];
    const steps: Step[] = [];
    const hearAnswer = (message: unknown) => void answers.push(message as Answer);
    const hearStep = (message: unknown) => void steps.push(message as Step);
    subscribe('node-sdpa-server:answer', hearAnswer);
    subscribe('node-sdpa-server:step', hearStep);
    const names = ['tokens_total', 'rows_total', 'step_seconds_count'];
    const before = await Promise.all(names.map((name) => metric(name)));
    await generate({ prompt: 'Call me', characters: 20 });
    const after = await Promise.all(names.map((name) => metric(name)));
    unsubscribe('node-sdpa-server:answer', hearAnswer);
    unsubscribe('node-sdpa-server:step', hearStep);
    // One step reads the prompt and writes a token, nineteen read one and write one.
    expect(after.map((count, i) => count - before[i])).toEqual([20, 26, 20]);
    expect(steps).toHaveLength(20);
    const [answer] = answers.filter(({ route }) => route === '/generate');
    expect(answer).toMatchObject({ route: '/generate', status: 200 });
    expect(answer.queueMs).toBeGreaterThan(0);
    expect(answer.runMs).toBeGreaterThan(0);
    const page = await (await fetch(`${url}/metrics`)).text();
    expect(page).toMatch(/gpt_server_backend\{backend="[a-z0-9:]+"\} 1/);
    expect(page).toMatch(/gpt_server_queue_seconds_count\{route="\/generate"\} [1-9]/);
    expect(page).toMatch(/gpt_server_attention_seconds_count\{backend="[a-z0-9:]+"\} [1-9]/);
    expect(page).toContain('nodejs_eventloop_lag_p99_seconds');
  });
});

describe('mistakes', () => {
  const long = 'a'.repeat(SIZES.length + 1);
  test.each<[string, string, unknown, number, string, string | RegExp]>([
    ['cut-off JSON', '/generate', '{"prompt":', 400, 'MALFORMED_JSON', /JSON/],
    ['no JSON', '/generate', 'hello', 400, 'MALFORMED_JSON', /JSON/],
    ['an empty body', '/generate', '', 400, 'MALFORMED_JSON', /empty/],
    ['an array', '/generate', [], 400, 'INVALID_FIELD', 'body: must be object'],
    ['a huge body', '/generate', { prompt: 'a'.repeat(70_000) }, 413, 'BODY_TOO_LARGE', /large/],
    ['a long prompt', '/generate', { prompt: 'a'.repeat(9000) }, 400, 'INVALID_FIELD', /prompt: /],
    ['an empty prompt', '/generate', { prompt: '' }, 400, 'INVALID_FIELD', /prompt: /],
    ['no prompt', '/generate', {}, 400, 'INVALID_FIELD', /'prompt'/],
    [
      'a number as prompt',
      '/generate',
      { prompt: 5 },
      400,
      'INVALID_FIELD',
      'prompt: must be string',
    ],
    [
      'a misspelled field',
      '/generate',
      { prompt: 'a', temprature: 1 },
      400,
      'UNKNOWN_FIELD',
      'unknown field "temprature"',
    ],
    ['a prototype', '/generate', '{"prompt":"a","__proto__":{}}', 400, 'MALFORMED_JSON', /JSON/],
    [
      'a character that is not known',
      '/generate',
      { prompt: 'a鯨' },
      400,
      'UNKNOWN_CHARACTER',
      '"鯨" is not in the text that was learned',
    ],
    [
      '-1 characters',
      '/generate',
      { prompt: 'a', characters: -1 },
      400,
      'INVALID_FIELD',
      /characters/,
    ],
    [
      '1.5 characters',
      '/generate',
      { prompt: 'a', characters: 1.5 },
      400,
      'INVALID_FIELD',
      /integer/,
    ],
    [
      '"5" characters',
      '/generate',
      { prompt: 'a', characters: '5' },
      400,
      'INVALID_FIELD',
      /integer/,
    ],
    ['too many', '/generate', { prompt: 'a', characters: 5001 }, 400, 'INVALID_FIELD', /<= 5000/],
    [
      'a negative temperature',
      '/generate',
      { prompt: 'a', temperature: -1 },
      400,
      'INVALID_FIELD',
      />= 0/,
    ],
    ['topK 0', '/generate', { prompt: 'a', topK: 0 }, 400, 'INVALID_FIELD', />= 1/],
    [
      'seed 2^64',
      '/generate',
      { prompt: 'a', seed: `${2n ** 64n}` },
      400,
      'INVALID_FIELD',
      /2\^64/,
    ],
    ['seed -1', '/generate', { prompt: 'a', seed: -1 }, 400, 'INVALID_FIELD', /seed: /],
    ['seed 0.5', '/generate', { prompt: 'a', seed: 0.5 }, 400, 'INVALID_FIELD', /seed: /],
    [
      'seed 2^53',
      '/generate',
      '{"prompt":"a","seed":9007199254740992}',
      400,
      'INVALID_FIELD',
      /2\^53/,
    ],
    ['seed {}', '/generate', { prompt: 'a', seed: {} }, 400, 'INVALID_FIELD', /seed: /],
    ['a long text', '/uncertainty', { text: long }, 400, 'INVALID_FIELD', /text: .* 96/],
    ['one sample', '/uncertainty', { text: 'a', samples: 1 }, 400, 'INVALID_FIELD', />= 2/],
    ['257 samples', '/uncertainty', { text: 'a', samples: 257 }, 400, 'INVALID_FIELD', /<= 256/],
    ['p 1.1', '/uncertainty', { text: 'a', p: 1.1 }, 400, 'INVALID_FIELD', /p: /],
    [
      'a placement',
      '/uncertainty',
      { text: 'a', placement: 'x' },
      400,
      'INVALID_FIELD',
      /placement: /,
    ],
    ['an unknown one', '/uncertainty', { text: '鯨' }, 400, 'UNKNOWN_CHARACTER', /鯨/],
    ['a long text', '/attention', { text: long }, 400, 'INVALID_FIELD', /text: .* 96/],
    ['no such route', '/generat', { prompt: 'a' }, 404, 'NOT_FOUND', 'there is no POST /generat'],
  ])('%s at %s', async (_name, route, body, status, code, message) => {
    const response = await post(route, body);
    const answer = await response.json();
    expect({ status: response.status, ...answer }).toEqual({
      status,
      error: {
        code,
        message: typeof message === 'string' ? message : expect.stringMatching(message),
      },
    });
  });

  test('another media type', async () => {
    const response = await fetch(`${url}/generate`, { method: 'POST', body: 'a=b' });
    expect(response.status).toBe(415);
    expect((await response.json()).error.code).toBe('UNSUPPORTED_MEDIA_TYPE');
  });

  test.each([
    ['a head that never ends', 'POST /generate HTTP/1.1\r\nhost: a\r\nx-', 408, 'TIMEOUT'],
    [
      'a body that never comes',
      'POST /generate HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{"p',
      408,
      'TIMEOUT',
    ],
    ['nothing at all', '', 408, 'TIMEOUT'],
    ['no HTTP', 'hello\r\n\r\n', 400, 'MALFORMED_HTTP'],
    ['a head without measure', `GET /${'a'.repeat(20_000)}`, 431, 'HEAD_TOO_LARGE'],
    ['no URL', 'GET /%zz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n', 400, 'BAD_REQUEST'],
  ])('%s', async (_name, bytes, status, code) => {
    const socket = connect(port, '127.0.0.1');
    socket.write(bytes);
    let answer = '';
    socket.setEncoding('utf8').on('data', (text) => {
      answer += text;
    });
    await once(socket, 'close');
    expect(answer).toMatch(new RegExp(`^HTTP/1.1 ${status} `));
    expect(JSON.parse(answer.split('\r\n\r\n')[1]).error.code).toBe(code);
    expect((await fetch(`${url}/healthz`)).status).toBe(200);
  });

  test('after all of these it writes as before', async () => {
    const lines = await generate({ prompt: 'Call me', characters: 10, seed: 1 });
    expect(textOf(lines)).toBe(written('Call me', 1n, 10));
  });
});

describe('load', () => {
  test('a client that goes away stops the work and frees its place', async () => {
    const tokens = await metric('tokens_total');
    const gone = new AbortController();
    const response = await post('/generate', { prompt: 'a', characters: 5000 }, url, gone.signal);
    const reader = response.body!.getReader();
    await reader.read();
    await until(async () => (await metric('running')) === 1);
    gone.abort();
    await until(async () => (await metric('running')) === 0);
    const after = await metric('tokens_total');
    expect(after - tokens).toBeLessThan(5000);
    await sleep(50);
    expect(await metric('tokens_total')).toBe(after);
    await generate({ prompt: 'a', characters: 1 }); // a step, after which all blocks are free
    expect(await metric('free_blocks')).toBe(16 * 2 * 2);
  });

  test('when the queue is full the rest is told when to come again, and nobody is lost', async () => {
    const small = await serve({ checkpoint, batch: 2, blocks: 4, limits: { waiting: 3 } });
    const bodies = Array.from({ length: 12 }, (_, seed) => ({
      prompt: 'a',
      characters: 300,
      seed,
    }));
    const responses = await Promise.all(bodies.map((body) => post('/generate', body, small.url)));
    const statuses = responses.map(({ status }) => status);
    expect(statuses.filter((status) => status === 200)).toHaveLength(5);
    expect(statuses.filter((status) => status === 503)).toHaveLength(7);
    for (const [seed, response] of responses.entries()) {
      if (response.status === 200) {
        const lines = (await response.text())
          .trim()
          .split('\n')
          .map((line) => JSON.parse(line));
        expect(textOf(lines)).toBe(written('a', BigInt(seed), 300));
      } else {
        expect((await response.json()).error.code).toBe('BUSY');
        expect(Number(response.headers.get('retry-after'))).toBeGreaterThanOrEqual(1);
      }
    }
    expect((await post('/generate', bodies[0], small.url)).status).toBe(200);
    await small.app.close();
  });

  test('questions are bounded too, and one that nobody waits for is given up', async () => {
    const small = await serve({ checkpoint, limits: { questions: 2 } });
    const body = { text: 'a'.repeat(SIZES.length), samples: 256 };
    const gone = new AbortController();
    const both = [0, 1].map(() => post('/uncertainty', body, small.url, gone.signal));
    await until(async () => (await (await fetch(`${small.url}/healthz`)).json()).questions === 2);
    const third = await post('/uncertainty', body, small.url);
    expect(third.status).toBe(503);
    expect(third.headers.get('retry-after')).toBe('1');
    gone.abort();
    await Promise.allSettled(both);
    await until(async () => (await (await fetch(`${small.url}/healthz`)).json()).questions === 0);
    expect((await post('/attention', { text: 'a' }, small.url)).status).toBe(200);
    await small.app.close();
  });

  test('an answer that takes too long is cut off', async () => {
    const small = await serve({ checkpoint, limits: { answerMs: 30, characters: 10_000 } });
    const response = await post('/generate', { prompt: 'a', characters: 10_000 }, small.url);
    await expect(response.text()).rejects.toThrow();
    await until(async () => (await (await fetch(`${small.url}/healthz`)).json()).running === 0);
    await small.app.close();
  });
});

test('a thread that ends fails what it was asked; blocks that are too few are refused before', async () => {
  await expect(createServer({ checkpoint, blocks: 3 })).rejects.toThrow(
    'blocks: expected at least 4, got 3',
  );
  const data = { model: sentModel(model), engine: { batch: 1, blocks: 1 } }; // too few
  const writing = { tokens: [0], count: 1, temperature: 1, seed: '1' };
  let failure: Error | undefined;
  const engine = new EngineThread(
    data,
    () => {},
    (error) => {
      failure = error;
    },
  );
  const end = await new Promise((ended) => {
    engine.write(writing, { begun: () => {}, written: () => {}, ended });
  });
  expect(end).toMatchObject({ status: 500, code: 'INTERNAL' });
  expect(failure?.message).toBe('blocks: expected at least 4, got 1');
});

test('told to stop, it finishes what it accepted, refuses the rest, and ends', async () => {
  const args = ['--import', 'tsx', 'examples/server/main.ts', '--port', '0', '--model', checkpoint];
  const child = spawn(process.execPath, [...args, '--batch', '1'], { cwd: ROOT });
  child.stdout.setEncoding('utf8');
  let output = '';
  child.stdout.on('data', (text) => {
    output += text;
  });
  child.stderr.pipe(process.stderr);
  const exit = once(child, 'exit');
  await until(() => output.includes('Listening'));
  const at = output.match(/http:\S+/)![0];
  const bodies = Array.from({ length: 4 }, (_, seed) => ({ prompt: 'a', characters: 1500, seed }));
  const responses = await Promise.all(bodies.map((body) => post('/generate', body, at)));
  child.kill('SIGTERM'); // one is being written, three wait
  await until(() => output.includes('Stopping'));
  await expect(post('/generate', bodies[0], at)).rejects.toThrow();
  for (const [seed, response] of responses.entries()) {
    const lines = (await response.text())
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line));
    expect(lines.at(-1)).toEqual({ type: 'end', characters: 1500 });
    expect(textOf(lines)).toBe(written('a', BigInt(seed), 1500));
  }
  expect(await exit).toEqual([0, null]);
  expect(output).toMatch(/Stopped\.\n$/);
});

test('the page and what it needs are served; nothing beside them is', async () => {
  const page = await fetch(url);
  expect(page.headers.get('content-type')).toMatch('text/html');
  expect(page.headers.get('content-security-policy')).toBe("default-src 'self'");
  const names = [...(await page.text()).matchAll(/(?:src|href)="([a-z.]+)"/g)].map(
    ([, name]) => name,
  );
  expect(names.sort()).toEqual(['icon.svg', 'page.css', 'page.mjs']);
  for (const name of names) expect((await fetch(`${url}/${name}`)).status).toBe(200);
  for (const path of ['/server.ts', '/..%2fserver.ts', '/%2e%2e/server.ts']) {
    expect((await fetch(url + path)).status).toBeGreaterThanOrEqual(400);
  }
});
