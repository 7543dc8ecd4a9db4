// Starts and ends workers, as many as the argument says, four at a time: some end by themselves,
// some are terminated at odd moments of their calls. Prints how the process has grown over the last
// three quarters of them.
import { fileURLToPath } from 'node:url';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { attentionForward, attentionForwardSync, scaledDotProductAttention } from 'node-sdpa';
import { DROPOUT, fingerprint, makeInputs } from '../inputs.mjs';

const inputs = makeInputs([1, 2, 160, 32]);

if (isMainThread) {
  const cycles = Number(process.argv[2]);
  const wanted = fingerprint(attentionForwardSync(...inputs, DROPOUT).output);
  const ends = { finished: 0, terminated: 0, wrong: 0 };
  /** @type {number[]} */
  const sizes = [];
  let started = 0;
  /** @param {number} number */
  const cycle = async (number) => {
    const worker = new Worker(fileURLToPath(import.meta.url), { workerData: number });
    let isDone = false;
    worker.on('message', (print) => {
      isDone = true;
      if (print !== wanted) ends.wrong++;
    });
    const ended = new Promise((resolve, reject) => worker.on('exit', resolve).on('error', reject));
    if (number % 2 === 1) {
      await new Promise((resolve) => setTimeout(resolve, 10 + ((number * 7) % 40)));
      await worker.terminate();
    }
    await ended;
    if (isDone) ends.finished++;
    else if (number % 2 === 1) ends.terminated++;
    else ends.wrong++;
  };
  const lane = async () => {
    while (started < cycles) {
      await cycle(started++);
      if (started % 8 === 0) sizes.push(process.memoryUsage.rss());
    }
  };
  await Promise.all([lane(), lane(), lane(), lane()]);
  const quarter = sizes.length >> 2;
  const middle = (/** @type {number[]} */ list) =>
    list.sort((a, b) => a - b)[list.length >> 1] ?? 0;
  const growth = middle(sizes.slice(-quarter)) - middle(sizes.slice(quarter, 2 * quarter));
  const again = fingerprint((await attentionForward(...inputs, DROPOUT)).output);
  process.stdout.write(JSON.stringify({ ...ends, growth, isSame: again === wanted }));
} else {
  for (let i = 0; i < 4; i++) void scaledDotProductAttention(...inputs, DROPOUT);
  const { output } = await attentionForward(...inputs, DROPOUT);
  if (workerData % 4 === 0) void scaledDotProductAttention(...inputs, DROPOUT);
  parentPort?.postMessage(fingerprint(output));
}
