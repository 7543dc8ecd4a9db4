// Prints what becomes of the memory of caches that are forgotten or disposed. The first argument
// says which.
import { setImmediate as nextTurn } from 'node:timers/promises';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { KVCache, KVCachePool } from 'node-sdpa';

setFlagsFromString('--expose-gc');
const gc = runInNewContext('gc');

async function collect() {
  for (let i = 0; i < 5; i++) {
    gc();
    await nextTurn();
  }
}

/** @type {Record<string, () => Promise<object>>} */
const WORKS = {
  async forgotten() {
    const pool = new KVCachePool({ blocks: 8, kvHeads: 1, headDim: 1 });
    const fill = () => {
      const rows = { data: new Float32Array(512), dims: [1, 1, 512, 1] };
      new KVCache({ pool }).append(rows, rows);
    };
    fill();
    const before = pool.freeBlocks;
    await collect();
    return { freeBlocks: [before, pool.freeBlocks] };
  },
  async disposed() {
    const length = 8192;
    const rows = { data: new Float32Array(length * 1024), dims: [1, 8, length, 128] };
    const bytes = 2 * rows.data.byteLength;
    await collect();
    const before = process.memoryUsage.rss();
    for (let i = 0; i < 40; i++) {
      const cache = new KVCache({ kvHeads: 8, headDim: 128, maxLength: length });
      cache.append(rows, rows);
      cache.dispose();
      await nextTurn(); // no collection is asked for: V8 sees by itself that it is time
    }
    const most = process.resourceUsage().maxRSS * 1024 - before;
    await collect();
    return { bytes, most, kept: process.memoryUsage.rss() - before };
  },
};

process.stdout.write(JSON.stringify(await WORKS[process.argv[2]]()));
