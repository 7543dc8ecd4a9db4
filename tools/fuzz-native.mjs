// Builds test/native/fuzz_boundary.cpp with clang's libFuzzer, AddressSanitizer and
// UndefinedBehaviorSanitizer, and runs it: any bytes at the boundary that calls cross give a Status.
//
//   npm run fuzz:native -- --seconds 30 --seed 7   (the seed is drawn and printed by default)
//                          --replay FILE           an input that failed
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { buildWithClang, root, run, writeCounts } from './build-native.mjs';

const { values: flags } = parseArgs({
  options: {
    seconds: { type: 'string', default: '30' },
    seed: { type: 'string' },
    replay: { type: 'string' },
  },
});

/** Bytes enough for every choice that the target makes. */
const INPUT_BYTES = 1024;
const SEEDS = 64;
/** Fewer would say that the kernels were hardly entered. */
const FEWEST_EXECUTIONS_A_SECOND = 5;

const report = path.join(root, 'out/fuzz-native.json');
rmSync(report, { force: true });
const program = buildWithClang('fuzz_boundary');
const env = { ...process.env, ASAN_OPTIONS: 'detect_leaks=1', UBSAN_OPTIONS: 'print_stacktrace=1' };
const seed = Number(flags.seed ?? Math.floor(Math.random() * 2 ** 31));

if (flags.replay) {
  process.exit(run(program, [path.resolve(flags.replay)], { env, print: true }).status);
}

const corpus = path.join(root, 'out/fuzz-native');
mkdirSync(corpus, { recursive: true });
for (let i = 0; i < SEEDS; i++) writeFileSync(path.join(corpus, `seed-${i}`), bytes(i + 1));
console.log(`libFuzzer, seed ${seed}`);
const { ok, output } = run(
  program,
  [
    `-max_total_time=${flags.seconds}`,
    `-seed=${seed}`,
    `-max_len=${INPUT_BYTES}`,
    '-len_control=0',
    '-timeout=20',
    '-rss_limit_mb=2048',
    '-print_final_stats=1',
    '-verbosity=0',
    `-artifact_prefix=${corpus}${path.sep}`,
    corpus,
  ],
  { env },
);
const executions = Number(output.match(/number_of_executed_units: (\d+)/)?.[1] ?? 0);
const enough = executions >= FEWEST_EXECUTIONS_A_SECOND * Number(flags.seconds);
if (!ok) {
  console.log(output.slice(-20_000));
  const file = output.match(/Test unit written to (\S+)/)?.[1];
  if (file) console.log(`replay: npm run fuzz:native -- --replay ${file}`);
} else {
  console.log(`${executions} inputs, no failure${enough ? '' : ': too few'}`);
}
writeCounts(report, ok && enough ? 1 : 0, ok && enough ? 0 : 1);
process.exit(ok && enough ? 0 : 1);

/** Bytes without a pattern (xorshift32). @param {number} seed */
function bytes(seed) {
  let x = seed * 0x9e3779b9;
  return Uint8Array.from({ length: INPUT_BYTES }, () => {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    return x >>> 24;
  });
}
