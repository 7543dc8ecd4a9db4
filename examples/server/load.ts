// What the server does under load, on loopback, each server in a process of its own: tokens/s of 8
// clients with and without continuous batching; load at 80 % and at 300 % of what it can do, while
// another client keeps asking for uncertainty; memory over many requests.
//
//   npm run bench:server -- [options]
//     --seconds COUNT   of each load (60)
//     --requests COUNT  over which memory is watched (100000)
//     --rounds COUNT    of batching against one at a time, in turns (3)
//     --out FILE        (default: bench/results/server.md)
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import autocannon from 'autocannon';
import { backendInfo } from 'node-sdpa';
import { describeMachine } from '../../bench/report.mjs';
import { median } from '../demo/statistics.mjs';
import { save } from '../gpt/checkpoint';
import { readCount, runCommand } from '../gpt/command';
import { readBook, splitText } from '../gpt/text';
import { Trainer } from '../gpt/trainer';

/** That of `npm run train`. */
const MODEL = { layers: 2, heads: 4, width: 64, length: 128 };
const CLIENTS = 8;
const BATCH = 16;
const WAITING = 64;
/** More clients than the server takes at once, so that it has to refuse some. */
const CROWD = 256;
const PROMPT = 'Call me Ishmael.';

runCommand(async () => {
  const { values: given } = parseArgs({
    options: {
      seconds: { type: 'string', default: '60' },
      requests: { type: 'string', default: '100000' },
      rounds: { type: 'string', default: '3' },
      out: { type: 'string', default: path.join(__dirname, '../../bench/results/server.md') },
    },
  });
  const seconds = readCount('seconds', given.seconds, 1, 600);
  const requests = readCount('requests', given.requests, 20, 1e6);
  const rounds = readCount('rounds', given.rounds, 1, 20);
  for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => process.exit(130));
  const folder = mkdtempSync(path.join(tmpdir(), 'node-sdpa-load-'));
  try {
    const checkpoint = createCheckpoint(path.join(folder, 'model.safetensors'));
    const report = [
      ...header(),
      ...(await compareBatching(checkpoint, 100, rounds, Math.min(10, seconds))),
      ...(await compareBatching(checkpoint, 200, rounds, Math.min(10, seconds))),
      ...(await holdLoad(checkpoint, seconds)),
      ...(await watchMemory(checkpoint, requests)),
    ];
    writeFileSync(path.resolve(given.out), `${report.join('\n')}\n`);
    console.log(`\nThis is in ${path.relative('', path.resolve(given.out))} now.`);
  } finally {
    rmSync(folder, { recursive: true });
  }
});

/** Prints a line of the report, and gives it back. */
function told(...lines: string[]): string[] {
  for (const line of lines) console.log(line);
  return lines;
}

function header(): string[] {
  const { cpu, cores, node, date } = describeMachine(backendInfo().version);
  const { layers, heads, width, length } = MODEL;
  return told(
    '# The server under load',
    '',
    `By \`npm run bench:server\` on ${date}: ${cpu}, ${cores} cores, Node.js ${node}, ` +
      `${backendInfo().selected}; clients and server share the machine. The model of ` +
      `\`npm run train\`: ${layers} layers, ${heads} heads, width ${width}, length ${length}.`,
  );
}

/** A model with the weights that it starts with: how fast it is does not depend on them. */
function createCheckpoint(file: string): string {
  const settings = {
    model: MODEL,
    ...{ batch: 1, steps: 1, rate: 0.002, warmup: 1, weightDecay: 0, clip: 1, seed: 1 },
    dropout: { placement: 'none', p: 0 },
  } as const;
  save(file, new Trainer(settings, splitText(readBook(), 0.1, 10_000, MODEL.length)));
  return file;
}

/** A server in a process of its own. */
class Served {
  private constructor(
    readonly url: string,
    readonly process: ChildProcess,
  ) {}

  static async start(checkpoint: string, batch: number): Promise<Served> {
    const program = path.join(__dirname, 'main.ts');
    const options = ['--model', checkpoint, '--port', '0', '--batch', `${batch}`];
    const child = spawn(
      process.execPath,
      ['--import', 'tsx', program, ...options, '--waiting', `${WAITING}`],
      { stdio: ['ignore', 'pipe', 'inherit'] },
    );
    process.once('exit', () => child.kill('SIGKILL')); // where this program ends before its time
    const [line] = await once(child.stdout.setEncoding('utf8'), 'data');
    return new Served(`${line}`.match(/http:\S+/)![0], child);
  }

  async stop(): Promise<void> {
    const exit = once(this.process, 'exit');
    this.process.kill('SIGTERM');
    const [status] = await exit;
    if (status !== 0) throw new Error(`the server ended with ${status}`);
  }

  /** Numbers of /metrics by name. */
  async metrics(): Promise<(name: string) => number> {
    const text = await (await fetch(`${this.url}/metrics`)).text();
    return (name) => Number(text.match(new RegExp(`^${name} (\\S+)$`, 'm'))?.[1]);
  }

  /** Sends requests for texts. */
  cannon(characters: number, more: Partial<autocannon.Options>): Promise<autocannon.Result> {
    return autocannon({
      url: `${this.url}/generate`,
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ prompt: PROMPT, characters }),
      timeout: 60,
      // Whole texts and clear refusals; anything else is a mismatch.
      verifyBody: (body) => /"type":"end",|"code":"BUSY"/.test(`${body}`),
      ...more,
    });
  }
}

const format = (number: number, digits = 0) =>
  number.toLocaleString('en', { minimumFractionDigits: digits, maximumFractionDigits: digits });

/**
 * Tokens a second of 8 clients, with all of them in a batch and with one at a time. Where a text
 * outgrows the model's length, the half of it is read again, in one piece.
 */
async function compareBatching(
  checkpoint: string,
  characters: number,
  rounds: number,
  seconds: number,
) {
  const servers = [await Served.start(checkpoint, CLIENTS), await Served.start(checkpoint, 1)];
  const rates: number[][] = [[], []];
  const costs: number[][] = [[], []]; // milliseconds of processor time for a token
  for (let round = -1; round < rounds; round++) {
    for (const [i, server] of servers.entries()) {
      const before = await server.metrics();
      const start = performance.now();
      await server.cannon(characters, {
        connections: CLIENTS,
        duration: round < 0 ? 2 : seconds,
      });
      const time = performance.now() - start;
      const after = await server.metrics();
      const spent = (name: string) => after(name) - before(name);
      const tokens = spent('gpt_server_tokens_total');
      if (round < 0) continue; // the code was compiled meanwhile
      rates[i].push((1000 * tokens) / time);
      costs[i].push((1000 * spent('process_cpu_seconds_total')) / tokens);
    }
  }
  await Promise.all(servers.map((server) => server.stop()));
  const [batched, single] = rates.map(median);
  const row = (name: string, i: number) => {
    const all = rates[i];
    const numbers = [median(all), Math.min(...all), Math.max(...all)].map((rate) => format(rate));
    return `| ${[name, ...numbers, format(median(costs[i]), 3)].join(' | ')} |`;
  };
  return told(
    '',
    `## ${CLIENTS} clients, texts of ${characters} characters`,
    '',
    `Tokens/s, median of ${rounds} rounds of ${seconds} s in turns.`,
    '',
    '| | tokens/s | least | most | processor ms a token, all threads |',
    '| --- | --- | --- | --- | --- |',
    row('continuous batching', 0),
    row('one at a time', 1),
    '',
    `Batching gives ${format(batched / single, 2)} times as many.`,
  );
}

/** Steady load below and far above what the server can do. */
async function holdLoad(checkpoint: string, seconds: number): Promise<string[]> {
  const characters = 50;
  const server = await Served.start(checkpoint, BATCH);
  await server.cannon(characters, { connections: 2 * BATCH, duration: 2 });
  const beside = askUntil(server);
  const busy = await server.cannon(characters, {
    connections: 2 * BATCH,
    duration: Math.min(10, seconds),
  });
  await beside.stop();
  const capacity = busy['2xx'] / busy.duration;
  const rows: string[] = [];
  for (const share of [0.8, 3]) {
    const rate = Math.max(1, Math.round(share * capacity));
    const amount = rate * seconds;
    const before = await server.metrics(); // and the delay of the event loop begins anew
    const asking = askUntil(server);
    const start = performance.now();
    const result = await server.cannon(characters, {
      connections: Math.min(CROWD, amount),
      overallRate: rate,
      amount,
    });
    const time = (performance.now() - start) / 1000;
    const asked = await asking.stop();
    const after = await server.metrics();
    const statuses = result.statusCodeStats ?? {};
    const count = (status: '200' | '503') => statuses[status]?.count ?? 0;
    const answered = Object.values(statuses).reduce((sum, { count = 0 }) => sum + count, 0);
    const other = answered - count('200') - count('503') + result.mismatches + asked.other;
    const tokens = after('gpt_server_tokens_total') - before('gpt_server_tokens_total');
    const cells = [
      `${format(100 * share)} %`,
      format(amount),
      format(answered / time, 1),
      format(count('200')),
      format(count('503')),
      format(other),
      format(amount - answered),
      format(tokens / time),
      `${format(result.latency.p50)} / ${format(result.latency.p99)}`,
      format(1000 * after('gpt_server_event_loop_delay_p99_seconds'), 1),
      format(asked.answers),
    ];
    rows.push(`| ${cells.join(' | ')} |`);
  }
  await server.stop();
  return told(
    '',
    `## Steady load, texts of ${characters} characters`,
    '',
    `Capacity: ${format(capacity, 1)} texts/s with ${2 * BATCH} clients, measured before. Each load ` +
      `lasts ${seconds} s, from ${CROWD} connections at a fixed rate, on a batch of ${BATCH} and a ` +
      `queue of ${WAITING}. All the time one more client asks for uncertainty (32 samples). Lost: ` +
      'sent and never answered, cut off and timed out ones included.',
    '',
    '| load | requests | answers/s | 200 | 503 | other | lost | tokens/s | latency p50 / p99, ms | ' +
      'event-loop delay p99, ms | uncertainties |',
    `|${' --- |'.repeat(11)}`,
    ...rows,
  );
}

/** Asks for uncertainty without a pause, until told to stop. */
function askUntil(server: Served) {
  let isOver = false;
  const counts = { answers: 0, other: 0 };
  const body = JSON.stringify({ text: PROMPT.repeat(6), samples: 32 });
  const headers = { 'content-type': 'application/json' };
  const work = (async () => {
    while (!isOver) {
      const response = await fetch(`${server.url}/uncertainty`, { method: 'POST', headers, body });
      await response.text();
      if (response.status === 200) counts.answers++;
      else counts.other++;
    }
    return counts;
  })();
  return {
    stop: () => {
      isOver = true;
      return work;
    },
  };
}

/** Memory of the server while many small requests pass. */
async function watchMemory(checkpoint: string, requests: number): Promise<string[]> {
  const server = await Served.start(checkpoint, BATCH);
  const samples: { answers: number; rss: number; heap: number }[] = [];
  const sample = async () => {
    const metrics = await server.metrics();
    samples.push({
      answers: metrics('gpt_server_answers_total\\{route="/generate",status="200"\\}') || 0,
      rss: metrics('process_resident_memory_bytes') / 2 ** 20,
      heap: metrics('nodejs_heap_size_used_bytes') / 2 ** 20,
    });
  };
  let isOver = false;
  const watching = (async () => {
    while (!isOver) {
      await sample();
      await sleep(200);
    }
  })();
  const start = performance.now();
  const result = await server.cannon(2, { connections: 2 * BATCH, amount: requests });
  const time = (performance.now() - start) / 1000;
  isOver = true;
  await watching;
  await sample();
  await server.stop();
  const row = (share: number) => {
    const at = samples.find(({ answers }) => answers >= share * requests) ?? samples.at(-1)!;
    return `| ${format(at.answers)} | ${format(at.rss, 1)} | ${format(at.heap, 1)} |`;
  };
  return told(
    '',
    `## Memory over ${format(requests)} requests`,
    '',
    `Texts of 2 characters, ${2 * BATCH} clients, ${format(requests / time)} requests/s; ` +
      `${format(result['2xx'])} answers of status 200, ${format(result.errors)} errors.`,
    '',
    '| answers | resident MiB | heap of the main thread MiB |',
    '| --- | --- | --- |',
    ...[0, 0.1, 0.25, 0.5, 0.75, 1].map(row),
  );
}
