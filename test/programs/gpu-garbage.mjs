// Leaves tensors on a GPU to the garbage collector, and prints what is held before and after.

import { setTimeout as pause } from 'node:timers/promises';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { attentionForward, backendInfo, Tensor } from 'node-sdpa';

setFlagsFromString('--expose-gc');
const collect = runInNewContext('gc');
const used = () => backendInfo().gpus[0].usedBytes;

async function leave() {
  const home = new Tensor('float32', new Float32Array(4096), [1, 1, 64, 64]);
  const there = await home.to('cuda');
  const result = await attentionForward(there, there, there);
  await result.backward(result.output);
  return used();
}

const before = await leave();
for (let i = 0; i < 50 && used() > 0; i++) {
  collect();
  await pause(10);
}
process.stdout.write(JSON.stringify({ before, after: used() }));
