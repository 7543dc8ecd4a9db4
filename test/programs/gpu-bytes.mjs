// Calls on a GPU whose results are within SDPA_MAX_BYTES, and beyond it.
import { attentionForwardSync, backendInfo, Tensor } from 'node-sdpa';

const dims = [1, 1, 64, 8];
const query = await new Tensor('float32', new Float32Array(512).fill(0.5), dims).to('cuda');
const result = attentionForwardSync(query, query, query); // 2048 bytes of output, 256 of lse
const held = backendInfo().gpus[0].usedBytes;
let refused = {};
try {
  attentionForwardSync(query, query, query, { outputs: ['weights'] }); // 16384 more
} catch (error) {
  const { code, message } = /** @type {NodeJS.ErrnoException} */ (error);
  refused = { code, message };
}
const grows = backendInfo().gpus[0].usedBytes - held;
process.stdout.write(JSON.stringify({ backend: result.backend, refused, grows }));
