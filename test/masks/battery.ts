// Statistical tests of dropout masks: rates, independence along every axis and between the masks
// of neighbouring seeds, offsets and lattices, and the distribution of the 16-bit numbers behind
// them. Under a good generator, each test's p-value is uniform in [0, 1].
import jStat from 'jstat';
import type { DropoutMaskOptions } from '../../lib/index';

type Dims = readonly [batch: number, heads: number, queries: number, columns: number];

/** Makes a mask: dropoutMask, or something worse that has to be found out. */
export type MaskMaker = (dims: Dims, spec: DropoutMaskOptions) => Uint8Array;

export interface TestResult {
  readonly name: string;
  /** Chance of a value this far off, or further, if there is nothing to find. */
  readonly p: number;
}

export interface Report {
  readonly bits: number;
  readonly results: readonly TestResult[];
  readonly smallest: TestResult;
  /** Whether the smallest p-value, times the number of tests (Bonferroni), is below ALPHA. */
  readonly isRejected: boolean;
}

/** The chance that a perfect generator is rejected, over all tests of a report together. */
export const ALPHA = 1e-4;

const RATES = [0.5, 0.1, 0.25, 0.9, 1 / 65536];
const AXES = ['batch', 'head', 'query', 'key'] as const;
const LAGS = [
  [1, 2],
  [1, 2, 3],
  [1, 2, 3, 4, 8, 16, 32],
  [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32, 64],
];
const DECISIONS_A_CALL = 8;

/** What two masks with the same drop rate have in common, as one sum for each. */
class Covariance {
  private pairs = 0;
  private both = 0;
  private left = 0;
  private right = 0;

  constructor(
    readonly name: string,
    private readonly rate: number,
  ) {}

  /** Elements [from, from + count) of `a` beside those of `b` from `at`. */
  add(a: Uint8Array, from: number, b: Uint8Array, at: number, count: number): void {
    let both = 0;
    let left = 0;
    let right = 0;
    for (let i = 0; i < count; i++) {
      const x = a[from + i];
      const y = b[at + i];
      both += x & y;
      left += x;
      right += y;
    }
    this.pairs += count;
    this.both += both;
    this.left += left;
    this.right += right;
  }

  get hasPairs(): boolean {
    return this.pairs > 0;
  }

  /**
   * Of independent decisions with mean m, (x - m)(y - m) has mean 0 and the variance (m (1 - m))^2,
   * and two such products are uncorrelated even where they share an element.
   */
  result(): TestResult {
    const mean = 1 - this.rate;
    const sum = this.both - mean * (this.left + this.right) + this.pairs * mean * mean;
    const deviation = mean * this.rate * Math.sqrt(this.pairs);
    return { name: this.name, p: twoSided(sum / deviation) };
  }
}

/** The chance that a standard normal number is this far from 0 or further. */
function twoSided(z: number): number {
  return jStat.erfc(Math.abs(z) / Math.SQRT2);
}

function chiSquare(name: string, counts: ArrayLike<number>): TestResult {
  const total = Array.from(counts).reduce((sum, n) => sum + n, 0);
  const wanted = total / counts.length;
  const value = Array.from(counts).reduce((sum, n) => sum + (n - wanted) ** 2 / wanted, 0);
  return { name, p: 1 - jStat.lowRegGamma((counts.length - 1) / 2, value / 2) };
}

/** Rates and pairs along the axes of one mask after the other, of one drop probability. */
class RateTests {
  private readonly lags: { covariance: Covariance; axis: number; lag: number }[];
  private readonly neighbours: { covariance: Covariance; change: Partial<DropoutMaskOptions> }[];
  private kept = 0;
  private count = 0;

  constructor(private readonly rate: number) {
    const of = (what: string) => new Covariance(`p = ${rate}: ${what}`, rate);
    this.lags = AXES.flatMap((axis, i) =>
      LAGS[i].map((lag) => ({ covariance: of(`${axis}, ${lag} apart`), axis: i, lag })),
    );
    const changes: [string, Partial<DropoutMaskOptions>][] = [
      ['the context', { placement: 'context' }],
      ['shared by the batch', { broadcast: ['batch'] }],
      ['shared by the heads', { broadcast: ['head'] }],
    ];
    this.neighbours = changes.map(([name, change]) => ({ covariance: of(name), change }));
    for (const name of ['seed', 'offset'] as const) {
      for (const bit of [0n, 1n, 31n, 32n, 63n]) {
        const covariance = of(`${name} with bit ${bit} the other way`);
        this.neighbours.push({ covariance, change: { [name]: bit } });
      }
      this.neighbours.push({ covariance: of(`the next ${name}`), change: { [name]: -1n } });
    }
  }

  add(make: MaskMaker, dims: Dims, spec: { p: number; seed: bigint; offset: bigint }): void {
    const mask = make(dims, spec);
    this.count += mask.length;
    for (let i = 0; i < mask.length; i++) this.kept += mask[i];
    for (const { covariance, axis, lag } of this.lags) {
      const stride = dims.slice(axis + 1).reduce((product, n) => product * n, 1);
      const [block, shift] = [dims[axis] * stride, lag * stride];
      for (let at = 0; at < mask.length && lag < dims[axis]; at += block) {
        covariance.add(mask, at, mask, at + shift, block - shift);
      }
    }
    // Pairs of masks are many: a part of each is enough.
    const [batch, heads, queries, columns] = dims;
    const part: Dims = [1, heads, Math.ceil(queries / 4), columns];
    const own = batch === 1 && part[2] === queries ? mask : make(part, spec);
    for (const { covariance, change } of this.neighbours) {
      const other = make(part, { ...spec, ...moved(spec, change) });
      covariance.add(own, 0, other, 0, own.length);
    }
  }

  results(): TestResult[] {
    const expected = this.count * (1 - this.rate);
    const deviation = Math.sqrt(expected * this.rate);
    const rate = {
      name: `p = ${this.rate}: rate`,
      p: twoSided((this.kept - expected) / deviation),
    };
    const pairs = [...this.lags, ...this.neighbours]
      .filter(({ covariance }) => covariance.hasPairs) // an axis may be shorter than the lag
      .map(({ covariance }) => covariance.result());
    // Where hardly anything is dropped, pairs are too few for the normal distribution.
    const isRare = this.count * this.rate * this.rate < 1000;
    return isRare ? [rate] : [rate, ...pairs];
  }
}

/** A seed or offset with one bit the other way, or (for -1) the next one. */
function moved(
  spec: { seed: bigint; offset: bigint },
  change: Partial<DropoutMaskOptions>,
): Partial<DropoutMaskOptions> {
  const result = { ...change };
  for (const name of ['seed', 'offset'] as const) {
    const bit = change[name] as bigint | undefined;
    if (bit === undefined) continue;
    result[name] = BigInt.asUintN(64, bit < 0n ? spec[name] + 1n : spec[name] ^ (1n << bit));
  }
  return result;
}

/** How often each pattern of the decisions of one Philox call comes, at p = 0.5. */
class Patterns {
  private readonly counts = new Float64Array(2 ** DECISIONS_A_CALL);

  add(mask: Uint8Array): void {
    for (let at = 0; at < mask.length; at += DECISIONS_A_CALL) {
      let pattern = 0;
      for (let i = 0; i < DECISIONS_A_CALL; i++) pattern = 2 * pattern + mask[at + i];
      this.counts[pattern]++;
    }
  }
  result(): TestResult {
    return chiSquare('patterns of the 8 decisions of a call', this.counts);
  }
}

/**
 * The numbers behind the decisions: an element is kept at p if its number is p * 65536 or more, so
 * masks of one seed at p = 1/16 to 15/16 tell the upper four bits of each.
 */
class Numbers {
  private readonly counts = new Float64Array(16);

  add(make: MaskMaker, dims: Dims, spec: { seed: bigint; offset: bigint }): void {
    let atLeast = dims.reduce((product, n) => product * n, 1);
    for (let k = 0; k < 16; k++) {
      let next = 0;
      if (k < 15) for (const x of make(dims, { ...spec, p: (k + 1) / 16 })) next += x;
      this.counts[k] += atLeast - next;
      atLeast = next;
    }
  }
  result(): TestResult {
    return chiSquare('upper bits of the numbers', this.counts);
  }
}

/** Runs all tests on about `bits` decisions that `make` makes, from consecutive seeds. */
export function testMasks(make: MaskMaker, bits: number, seed: bigint, dims: Dims): Report {
  const size = dims.reduce((product, n) => product * n, 1);
  const rounds = Math.max(1, Math.round(bits / size / RATES.length));
  const rates = RATES.map((rate) => new RateTests(rate));
  const patterns = new Patterns();
  const numbers = new Numbers();
  for (let round = 0; round < rounds; round++) {
    const spec = { seed: seed + BigInt(round), offset: BigInt(round % 3) };
    for (const [i, p] of RATES.entries()) rates[i].add(make, dims, { ...spec, p });
    patterns.add(make(dims, { ...spec, p: 0.5 }));
    if (round % 16 === 0) numbers.add(make, dims, spec);
  }
  const results = [...rates.flatMap((r) => r.results()), patterns.result(), numbers.result()];
  const smallest = results.reduce((a, b) => (b.p < a.p ? b : a));
  return {
    bits: rounds * RATES.length * size,
    results,
    smallest,
    isRejected: smallest.p * results.length < ALPHA,
  };
}

/** Whether p-values are spread evenly: the p-value of Kolmogorov and Smirnov (asymptotic). */
export function evenness(results: readonly TestResult[]): number {
  const sorted = results.map(({ p }) => p).sort((a, b) => a - b);
  const n = sorted.length;
  const gaps = sorted.map((p, i) => Math.max((i + 1) / n - p, p - i / n));
  const distance = Math.max(...gaps) * (Math.sqrt(n) + 0.12 + 0.11 / Math.sqrt(n));
  let sum = 0;
  for (let k = 1; k <= 100; k++) sum += (-1) ** (k - 1) * Math.exp(-2 * (k * distance) ** 2);
  return Math.min(1, Math.max(0, 2 * sum));
}
