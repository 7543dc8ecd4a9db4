// The process, or a worker, comes to its end while calls run, in the way that the argument names;
// test/programs/exit.mjs has the plain ways.
import { Worker } from 'node:worker_threads';
import {
  attentionForward,
  scaledDotProductAttention,
  scaledDotProductAttentionSync,
} from 'node-sdpa';
import { DROPOUT, makeInputs } from '../inputs.mjs';

const how = /** @type {string} */ (process.argv[2]);
const inputs = makeInputs([1, 8, 512, 64]);
const small = makeInputs([1, 2, 33, 16]);

function start() {
  return Promise.all(
    Array.from({ length: 6 }, async () => {
      const result = await attentionForward(...inputs, DROPOUT);
      await result.backward(inputs[0]);
    }),
  );
}

/** A worker with calls on their way, which then runs `code`. @param {string} code */
function worker(code) {
  const program = `const { scaledDotProductAttention, scaledDotProductAttentionSync, Tensor } =
      require('node-sdpa');
    const data = Float32Array.from({ length: 8 * 512 * 64 }, (_, i) => Math.sin(i));
    const tensor = new Tensor('float32', data, [1, 8, 512, 64]);
    for (let i = 0; i < 6; i++) void scaledDotProductAttention(tensor, tensor, tensor);
    setTimeout(() => { ${code} }, 5);`;
  const started = new Worker(program, { eval: true });
  return new Promise((resolve) => {
    started.on('error', (error) => resolve(error.message));
    started.on('exit', (code) => resolve(`exit ${code}`));
  });
}

/** @type {Record<string, () => unknown>} */
const ENDINGS = {
  'an exception that is handled': () => {
    process.once('uncaughtException', ({ message }) => console.log(message));
    void start().then(() => console.log('computed'));
    setTimeout(() => {
      throw new Error('thrown on purpose');
    }, 5);
  },
  'a rejection that nobody handles': () => {
    void start();
    setTimeout(() => Promise.reject(new Error('rejected on purpose')), 5);
  },
  'a call that fails and nobody handles': () => {
    void start();
    const controller = new AbortController();
    void scaledDotProductAttention(...inputs, { signal: controller.signal });
    setTimeout(() => controller.abort(), 5);
  },
  SIGTERM: () => {
    void start();
    setTimeout(() => process.kill(process.pid, 'SIGTERM'), 5);
    setInterval(() => {}, 1000);
  },
  SIGKILL: () => {
    void start();
    setTimeout(() => process.kill(process.pid, 'SIGKILL'), 5);
    setInterval(() => {}, 1000);
  },
  'signals that are handled': async () => {
    const signals = /** @type {const} */ (['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR2', 'SIGCHLD']);
    let seen = 0;
    for (const signal of signals) process.on(signal, () => seen++);
    const computing = start();
    for (let i = 0; i < 200; i++) {
      process.kill(process.pid, signals[i % signals.length]);
      if (i % 20 === 0) scaledDotProductAttentionSync(...small);
      await new Promise(setImmediate);
    }
    await computing;
    console.log(seen > 0 ? 'computed' : 'no signal came');
    process.exitCode = 3;
  },
  'calls in exit handlers': () => {
    process.once('beforeExit', async () => {
      await scaledDotProductAttention(...inputs);
      console.log('computed');
    });
    process.on('exit', () => {
      scaledDotProductAttentionSync(...small);
      void scaledDotProductAttention(...inputs); // never comes to its end
      console.log('exit');
    });
  },
  'process.exit in a worker': async () => {
    const computing = start();
    console.log(await worker('process.exit(5)'));
    await computing;
  },
  'an exception in a worker': async () => {
    const computing = start();
    console.log(await worker('throw new Error("thrown on purpose")'));
    await computing;
  },
  'no memory in a worker': async () => {
    const computing = start();
    const program = `const { scaledDotProductAttention, Tensor } = require('node-sdpa');
      const data = Float32Array.from({ length: 8 * 512 * 64 }, (_, i) => Math.sin(i));
      const tensor = new Tensor('float32', data, [1, 8, 512, 64]);
      for (let i = 0; i < 6; i++) void scaledDotProductAttention(tensor, tensor, tensor);
      const hoard = [];
      setImmediate(() => { for (;;) hoard.push(Array.from({ length: 1e4 }, (_, i) => ({ i }))); });`;
    const started = new Worker(program, {
      eval: true,
      resourceLimits: { maxOldGenerationSizeMb: 24, maxYoungGenerationSizeMb: 2 },
    });
    console.log(
      await new Promise((resolve) =>
        started.on('error', (error) => resolve(/** @type {any} */ (error).code)),
      ),
    );
    await computing;
  },
  'process.exit with workers in synchronous calls': async () => {
    const code = `for (;;) scaledDotProductAttentionSync(tensor, tensor, tensor);`;
    void worker(code);
    void worker(code);
    void start();
    setTimeout(() => process.exit(4), 300);
  },
};

await ENDINGS[how]?.();
