// Calls at every depth near the end of the stack, the first ones before anything is loaded: each
// gives the right bits or a RangeError, and afterwards all is as if nothing had been.
import { KVCache, scaledDotProductAttention, scaledDotProductAttentionSync } from 'node-sdpa';
import { DROPOUT, fingerprint } from '../inputs.mjs';

const data = Float32Array.from({ length: 64 }, (_, i) => Math.sin(i));
const plain = { data, dims: [1, 2, 4, 8] };
/** @type {unknown[]} */
const errors = [];
/** @type {Promise<void>[]} */
const promises = [];
/** @type {Set<string>} */
const prints = new Set();

/** @param {() => void} work */
function dive(work) {
  let left = 8000; // tries, from the deepest frame upwards
  const deeper = () => {
    try {
      deeper();
    } catch {}
    if (left-- <= 0) return;
    try {
      work();
    } catch (error) {
      errors[errors.length] = error;
    }
  };
  deeper();
}

const call = () =>
  prints.add(fingerprint(scaledDotProductAttentionSync(plain, plain, plain, DROPOUT)));
dive(call); // the first calls of the process
dive(() => {
  promises.push(
    scaledDotProductAttention(plain, plain, plain, DROPOUT).then((output) => {
      prints.add(fingerprint(output));
    }),
  );
});
dive(() => {
  const cache = new KVCache({ kvHeads: 2, headDim: 8, maxLength: 8 });
  cache.append(plain, plain);
  cache.attendSync(plain);
});
for (const settled of await Promise.allSettled(promises)) {
  if (settled.status === 'rejected') errors.push(settled.reason);
}
call();
const { backendInfo } = await import('node-sdpa');
const { selected } = backendInfo();
const texts = errors.map(
  (/** @type {any} */ { name, code, message }) => `${name} ${code ?? message}`,
);
const seen = Object.fromEntries(
  [...new Set(texts)].map((text) => [text, texts.filter((other) => other === text).length]),
);
process.stdout.write(JSON.stringify({ seen, prints: [...prints], selected }));
