// What each dropout placement does to causal multi-head attention over a real text, on every
// backend of this machine: tables here, pictures in out/.
//
//   npm start               a passage of Moby-Dick
//   npm start -- FILE       your own text
import { arch, availableParallelism, platform } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { backendInfo, scaledDotProductAttentionSync } from 'node-sdpa';
import { attend, DROPOUT_P, decisions, PLACEMENTS, SEED, sizes } from './attention.mjs';
import { draw } from './drawing.mjs';
import { embed, HEAD_DIM, HEADS } from './embedding.mjs';
import { median, studySeeds } from './statistics.mjs';
import { printTable, say } from './table.mjs';
import { readPassage, UsageError } from './text.mjs';

const OUT = fileURLToPath(new URL('../../out', import.meta.url));
const SEEDS = 1000;
/** How many tokens are in the pictures, in the statistics, and timed; a short text has fewer. */
const TOKENS = { pictured: 28, studied: 96, timed: 512 };

/** @typedef {import('./attention.mjs').Placement} Placement */
/** @typedef {import('./attention.mjs').Inputs} Inputs */
/** @typedef {import('node-sdpa').BackendName} BackendName */

try {
  const [file, ...more] = process.argv.slice(2);
  if (more.length > 0) throw new UsageError('one FILE at most: npm start -- FILE');
  await demonstrate(readPassage(file));
} catch (error) {
  if (!(error instanceof UsageError)) throw error;
  console.error(error.message);
  process.exitCode = 1;
}

/** @param {{title: string, tokens: string[]}} passage */
async function demonstrate({ title, tokens }) {
  const backends = backendInfo().tried.flatMap(({ backend, ok }) => (ok ? [backend] : []));
  const studied = tokens.slice(0, TOKENS.studied);
  const inputs = embed(studied);
  introduce(title, studied, backends);
  showWhatIsDropped(inputs);
  const courses = showManySeeds(inputs);
  showEqualMasks(inputs, backends);
  showTimes(embed(tokens.slice(0, TOKENS.timed)), backends);
  const drawn = await draw(OUT, title, tokens.slice(0, TOKENS.pictured), courses);
  say.title(`5. Pictures in ${path.relative(process.cwd(), OUT)}${path.sep}, as .svg and .png`);
  say.line(drawn.join(', '));
}

/**
 * @param {string} title
 * @param {string[]} tokens
 * @param {BackendName[]} backends
 */
function introduce(title, tokens, backends) {
  const { version, threads, tried } = backendInfo();
  const missed = tried.filter(({ ok }) => !ok);
  say.title(`node-sdpa ${version} on Node.js ${process.versions.node}, ${platform()} ${arch()}`);
  say.line(`text      ${title}: "${tokens.slice(0, 9).join(' ')} ..."`);
  say.line(`shape     1 x ${HEADS.length} heads x ${tokens.length} tokens x ${HEAD_DIM}, causal`);
  say.line(`backends  ${backends.join(', ')}; ${threads} of ${availableParallelism()} threads`);
  for (const { reason } of missed) {
    say.line(`          not here: ${reason?.split('\n')[0]}`);
  }
  if (backends.every((name) => name === 'js')) {
    say.line('          There is no native addon here: everything runs in JavaScript.');
  }
}

/** @param {Inputs} inputs */
function showWhatIsDropped(inputs) {
  const { heads, tokens } = sizes(inputs);
  const meaning = {
    weights: 'tokens, after the softmax; the rest grow by 1/(1-p)',
    context: 'channels of the result; the rest grow by 1/(1-p)',
    scores: 'keys, before the softmax; the rest share their weight',
  };
  const rows = PLACEMENTS.map((placement) => {
    const keep = decisions(placement, tokens);
    const isContext = placement === 'context';
    // Of [tokens, keys], a causal call uses the lower triangle.
    const isUsed = (/** @type {number} */ at) =>
      isContext || at % tokens <= Math.floor(at / tokens) % tokens;
    const used = keep.filter((_, at) => isUsed(at));
    const dropped = used.filter((kept) => kept === 0).length;
    const share = `${dropped} of ${used.length} = ${percent(dropped / used.length)}`;
    return [placement, meaning[placement], share];
  });
  say.title(`1. What is dropped: p = ${DROPOUT_P}, seed ${SEED}, ${heads} heads`);
  printTable(['placement', 'drops', 'share'], rows);
}

/** @param {Inputs} inputs */
function showManySeeds(inputs) {
  const { tokens } = sizes(inputs);
  const plain = attend(inputs, 'none');
  const studies = PLACEMENTS.map((placement) => {
    const study = studySeeds(
      (seed) => {
        const { output, droppedWeights } = attend(inputs, placement, { seed });
        return { output, weights: droppedWeights };
      },
      plain.output,
      tokens,
      SEEDS,
    );
    return { placement, study };
  });
  say.title(`2. ${SEEDS} seeds against the undropped output, on ${plain.backend}`);
  printTable(
    ['placement', 'a row of weights sums to', 'spread', 'error of the mean', 'by chance'],
    studies.map(({ placement, study }) => [
      placement,
      describeRows(study.rows),
      percent(study.spread),
      percent(study.meanError),
      percent(study.chanceError),
    ]),
  );
  say.line('spread: how far one seed is from the mean of all. by chance: the error that 1,000');
  say.line('seeds of this spread leave in an unbiased mean. All relative to the undropped output.');
  say.gap();
  printTable(
    ['placement', 'bias (99.9 % interval)', 'z', 'so it is', 'theory says'],
    studies.map(({ placement, study: { shift, isUnbiased } }) => [
      placement,
      `${percent(shift.mean, true)} +- ${percent(shift.margin)}`,
      shift.z.toFixed(1),
      isUnbiased ? 'unbiased' : 'biased',
      placement === 'scores' ? 'biased' : 'unbiased',
    ]),
  );
  say.line('bias: the length that the mean output gains along the undropped one. An unbiased');
  say.line('placement has 0 in the interval (z-test over independent seeds).');
  return Object.fromEntries(studies.map(({ placement, study }) => [placement, study.course]));
}

/** @param {import('./statistics.mjs').Summary} rows */
function describeRows({ mean, deviation, min, max }) {
  if (max - min < 1e-5) return '1, always';
  const range = `${min.toFixed(2)} to ${max.toFixed(2)}`;
  return `${mean.toFixed(3)} +- ${deviation.toFixed(3)}  (${range})`;
}

/**
 * @param {Inputs} inputs
 * @param {BackendName[]} backends
 */
function showEqualMasks(inputs, backends) {
  const plain = attend(inputs, 'none');
  const rows = backends.map((backend) => {
    const cells = PLACEMENTS.map((placement) => {
      const result = attend(inputs, placement, { backend });
      const { equal, seen } = compareMask(inputs, placement, plain, result);
      const isSame = equal === seen && result.backend === backend;
      return isSame ? `all ${seen} equal` : `${seen - equal} of ${seen} differ`;
    });
    return [backend, ...cells];
  });
  say.title('3. What each backend dropped, element by element, against dropoutMask()');
  printTable(['backend', ...PLACEMENTS], rows);
}

/**
 * Reads from the numbers what a backend dropped: something where the undropped call has something
 * and this one has 0.
 * @param {Inputs} inputs
 * @param {Placement} placement
 * @param {ReturnType<typeof attend>} plain
 * @param {ReturnType<typeof attend>} result
 */
function compareMask(inputs, placement, plain, result) {
  const keep = decisions(placement, sizes(inputs).tokens);
  const isContext = placement === 'context';
  const before = isContext ? plain.output : plain.weights;
  const after = isContext ? result.output : result.droppedWeights;
  let seen = 0;
  let equal = 0;
  before.forEach((x, at) => {
    if (x === 0) return; // a masked key: nothing there to drop
    seen++;
    if ((after[at] !== 0) === (keep[at] === 1)) equal++;
  });
  return { equal, seen };
}

/**
 * @param {Inputs} inputs
 * @param {BackendName[]} backends
 */
function showTimes(inputs, backends) {
  const { heads, tokens } = sizes(inputs);
  const times = new Map(backends.map((backend) => [backend, timeOf(inputs, backend)]));
  const js = times.get('js') ?? Number.NaN;
  const shape = `1 x ${heads} heads x ${tokens} tokens x ${HEAD_DIM}, causal`;
  say.title(`4. Time of one call: ${shape}, no dropout, ${backendInfo().threads} thread(s)`);
  printTable(
    ['backend', 'median', 'against js'],
    [...times].map(([backend, time]) => [
      backend,
      `${time.toFixed(3)} ms`,
      `${(js / time).toFixed(1)} x`,
    ]),
  );
}

/**
 * @param {Inputs} inputs
 * @param {BackendName} backend
 */
function timeOf({ query, key, value }, backend) {
  const options = { isCausal: true, backend };
  const call = () => {
    const start = performance.now();
    scaledDotProductAttentionSync(query, key, value, options);
    return performance.now() - start;
  };
  for (let i = 0; i < 5; i++) call(); // until V8 has compiled what there is to compile
  return median(Array.from({ length: 21 }, call));
}

/**
 * @param {number} share
 * @param {boolean} [isSigned]
 */
function percent(share, isSigned = false) {
  const sign = isSigned && share > 0 ? '+' : '';
  return `${sign}${(100 * share).toFixed(2)} %`;
}
