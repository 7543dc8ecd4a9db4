// Loses the first emulated GPU by a fault in a call, and prints what each later use of it gives.
import {
  attentionForward,
  attentionForwardSync,
  scaledDotProductAttention,
  Tensor,
} from 'node-sdpa';

const [how] = process.argv.slice(2);
const make = (/** @type {number[]} */ dims) =>
  new Tensor('float32', new Float32Array(dims.reduce((a, b) => a * b)).fill(1), dims);
const small = make([1, 1, 4, 4]);
const large = make([1, 12, 1024, 64]); // worth a GPU to 'auto'
const there = await small.to('cuda');

const codeOf = async (/** @type {() => unknown} */ work) => {
  try {
    return await work();
  } catch (error) {
    return /** @type {{code: string}} */ (error).code;
  }
};
const run = () =>
  how === 'sync'
    ? attentionForwardSync(small, small, small, { backend: 'cuda' })
    : attentionForward(small, small, small, { backend: 'cuda' });

process.env.SDPA_EMULATED_FAULT = '9:700';
let message = '';
const first = await codeOf(async () => {
  try {
    await run();
  } catch (error) {
    message = /** @type {Error} */ (error).message;
    throw error;
  }
});
process.stdout.write(
  JSON.stringify({
    first,
    message,
    later: await codeOf(run),
    tensor: await codeOf(() => scaledDotProductAttention(there, there, there)),
    copy: await codeOf(() => there.getData()),
    other: (await attentionForward(small, small, small, { backend: 'cuda:1' })).backend,
    auto: (await attentionForward(large, large, large)).backend,
  }),
);
