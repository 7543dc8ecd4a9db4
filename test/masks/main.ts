// npm run masks:statistics: the tests of battery.ts on many decisions, by default 10^9.
//
//   npm run masks:statistics -- --bits 1e9 --seed 7   (the seed is drawn and printed by default)
//                               --dieharder           and tests of Debian's package dieharder
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { parseArgs } from 'node:util';
import { dropoutMask } from '../../lib/index';
import { ALPHA, evenness, testMasks } from './battery';

const { values: flags } = parseArgs({
  options: {
    bits: { type: 'string', default: '1e9' },
    seed: { type: 'string' },
    dieharder: { type: 'boolean', default: false },
  },
});
const seed = BigInt(flags.seed ?? Math.floor(Math.random() * 2 ** 48));

main().then((isGood) => process.exit(isGood ? 0 : 1));

async function main(): Promise<boolean> {
  console.log(`seed ${seed}`);
  const start = performance.now();
  const report = testMasks(dropoutMask, Number(flags.bits), seed, [3, 4, 256, 512]);
  const { results, smallest, bits, isRejected } = report;
  const seconds = ((performance.now() - start) / 1000).toFixed(0);
  console.log(`${results.length} tests of ${bits.toExponential(2)} decisions in ${seconds} s`);
  console.log(`smallest p-value ${smallest.p.toPrecision(3)} (${smallest.name})`);
  console.log(`times the number of tests ${(smallest.p * results.length).toPrecision(3)}`);
  console.log(`evenness of the p-values ${evenness(results).toPrecision(3)}`);
  console.log(isRejected ? `REJECTED at ${ALPHA}` : `not rejected at ${ALPHA}`);
  return !isRejected && (!flags.dieharder || (await dieharder()));
}

/** Tests that need at most some 10^9 bits each, by their numbers. */
const DIEHARDER_TESTS = [0, 1, 2, 3, 8, 10, 12, 13, 15, 16, 100, 101, 102];

/** Decisions at p = 0.5 as a stream of bits. "WEAK" comes in one test of a hundred by chance. */
async function dieharder(): Promise<boolean> {
  let isGood = true;
  for (const number of DIEHARDER_TESTS) {
    const child = spawn('dieharder', ['-g', '200', '-d', `${number}`], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    let output = '';
    child.stdout.on('data', (text) => {
      output += text;
    });
    child.stdin.on('error', () => {}); // it has read enough
    const closed = once(child, 'close');
    for (let block = 0n; child.exitCode === null && child.stdin.writable; block++) {
      const mask = dropoutMask([1, 8, 128, 1024], { p: 0.5, seed, offset: block });
      const isFree = child.stdin.write(packed(mask));
      if (!isFree) await Promise.race([once(child.stdin, 'drain').catch(() => {}), closed]);
    }
    await closed;
    const rows = output.split('\n').filter((line) => /PASSED|WEAK|FAILED/.test(line));
    for (const row of rows) console.log(row);
    if (rows.length === 0 || rows.some((row) => row.includes('FAILED'))) isGood = false;
  }
  return isGood;
}

/** Eight decisions a byte. */
function packed(mask: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(mask.length / 8);
  for (let i = 0; i < mask.length; i++) bytes[i >> 3] |= mask[i] << (i & 7);
  return bytes;
}
