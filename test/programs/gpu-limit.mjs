// Asks for more memory of a GPU than SDPA_CUDA_MEMORY_LIMIT leaves, and then for what fits.
import { backendInfo, Tensor } from 'node-sdpa';

const make = (/** @type {number} */ length) =>
  new Tensor('float32', new Float32Array(length), [length]);

const first = await make(100_000).to('cuda');
let refused = {};
try {
  await make(200_000).to('cuda');
} catch (error) {
  const { code, message } = /** @type {NodeJS.ErrnoException} */ (error);
  refused = { code, message };
}
first.dispose(); // stays cached: there is room for the second only once that is given back
const second = await make(200_000).to('cuda');
const [{ cachedBytes: cached, limitBytes: limit }] = backendInfo().gpus;
process.stdout.write(JSON.stringify({ refused, next: second.location, cached, limit }));
