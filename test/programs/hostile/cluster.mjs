// Processes that fork others while they compute (cluster, spawn), one of which is killed.
import { spawnSync } from 'node:child_process';
import cluster from 'node:cluster';
import { attentionForward, attentionForwardSync, scaledDotProductAttention } from 'node-sdpa';
import { DROPOUT, fingerprint, makeInputs } from '../inputs.mjs';

const inputs = makeInputs([1, 4, 300, 32]);
const compute = async () => fingerprint((await attentionForward(...inputs, DROPOUT)).output);

if (cluster.isPrimary) {
  const wanted = fingerprint(attentionForwardSync(...inputs, DROPOUT).output);
  const many = Array.from({ length: 40 }, compute);
  const [good, doomed] = [cluster.fork(), cluster.fork({ DOOMED: '1' })];
  const ends = [good, doomed].map((worker) => {
    return new Promise((resolve) => worker.on('exit', (code, signal) => resolve(signal ?? code)));
  });
  const print = new Promise((resolve) => good.once('message', resolve));
  doomed.once('message', () => doomed.process.kill('SIGKILL'));
  const { stdout } = spawnSync(process.execPath, ['-p', '6 * 7'], { encoding: 'utf8' });
  const prints = new Set(await Promise.all(many));
  process.stdout.write(
    JSON.stringify({
      isSame: prints.size === 1 && prints.has(wanted) && (await print) === wanted,
      spawned: stdout.trim(),
      ends: await Promise.all(ends),
    }),
  );
} else {
  const print = await compute();
  for (let i = 0; i < 100; i++) void scaledDotProductAttention(...inputs);
  process.send?.(print);
  if (!process.env.DOOMED) process.disconnect();
}
