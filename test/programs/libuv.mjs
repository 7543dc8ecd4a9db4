// Every thread of libuv's pool is busy: calls must finish all the same, before the pool is free
// again.
import { pbkdf2 } from 'node:crypto';
import { scaledDotProductAttention } from 'node-sdpa';
import { makeInputs } from './inputs.mjs';

const inputs = makeInputs([1, 4, 128, 64]);
let busy = 4;
const blocked = Array.from({ length: busy }, () => {
  return new Promise((resolve) => {
    pbkdf2('password', 'salt', 150_000, 64, 'sha512', () => {
      busy--;
      resolve(undefined);
    });
  });
});
await Promise.all([1, 2, 3].map(() => scaledDotProductAttention(...inputs)));
const busyAfterCalls = busy;
await Promise.all(blocked);
process.stdout.write(JSON.stringify({ busyAfterCalls }));
