// Prints by how many bytes the process grew: over many calls whose results are dropped, or in one
// call between long sequences. The first argument says which.
import { attentionForward, scaledDotProductAttention } from 'node-sdpa';
import { DROPOUT, makeInputs, makeTensor } from './inputs.mjs';

/** @type {Record<string, () => Promise<void>>} */
const WORKS = {
  async 'many calls'() {
    const inputs = makeInputs([1, 8, 256, 64]);
    const gradOutput = makeTensor([1, 8, 256, 64], 307);
    for (let i = 0; i < 400; i++) {
      // About 3 MB a round, and little work: 1.2 GB if nothing were given back.
      const result = await attentionForward(...inputs, { ...DROPOUT, windowSize: [1, 0] });
      await result.backward(gradOutput);
    }
  },
  async 'long sequences'() {
    // One [Lq, Lk] array of float32 would be 1 GB.
    const inputs = makeInputs([1, 1, 16384, 8]);
    const gradOutput = makeTensor([1, 1, 16384, 8], 307);
    const result = await attentionForward(...inputs, { ...DROPOUT, windowSize: [64, 0] });
    await result.backward(gradOutput);
    await scaledDotProductAttention(...inputs, { windowSize: [64, 0] });
  },
};

await scaledDotProductAttention(...makeInputs([1, 1, 64, 8]));
const before = process.memoryUsage.rss();
await WORKS[process.argv[2]]();
const peak = process.resourceUsage().maxRSS * 1024;
process.stdout.write(JSON.stringify({ growth: peak - before }));
