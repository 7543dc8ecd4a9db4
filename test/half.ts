// float16 and bfloat16 by arithmetic on doubles, not by bit tricks: an independent check of
// lib/float16.ts.

/** How a 16-bit format is laid out: sign, `exponentBits`, `mantissaBits`. */
interface Format {
  readonly exponentBits: number;
  readonly mantissaBits: number;
}

const FORMATS = {
  float16: { exponentBits: 5, mantissaBits: 10 },
  bfloat16: { exponentBits: 8, mantissaBits: 7 },
} as const satisfies Record<string, Format>;

export type HalfType = keyof typeof FORMATS;

/** The number that a 16-bit pattern stands for. */
export function decodeHalf(type: HalfType, pattern: number): number {
  const { exponentBits, mantissaBits } = FORMATS[type];
  const sign = pattern & 0x8000 ? -1 : 1;
  const exponent = (pattern >> mantissaBits) & (2 ** exponentBits - 1);
  const mantissa = pattern & (2 ** mantissaBits - 1);
  const bias = 2 ** (exponentBits - 1) - 1;
  if (exponent === 2 ** exponentBits - 1) return mantissa ? Number.NaN : sign * Infinity;
  if (exponent === 0) return sign * mantissa * 2 ** (1 - bias - mantissaBits);
  return sign * (1 + mantissa / 2 ** mantissaBits) * 2 ** (exponent - bias);
}

/** 2^exponent, exactly; looked up, since tests ask for millions. */
const power = (exponent: number) => POWERS[exponent + POWERS_BELOW_1];
const POWERS_BELOW_1 = 200;
const POWERS = Float64Array.from(
  { length: 2 * POWERS_BELOW_1 },
  (_, i) => 2 ** (i - POWERS_BELOW_1),
);

const decoded: Partial<Record<HalfType, Float64Array>> = {};

/** The numbers of many patterns: each of the 65536 is decoded once. */
export function decodeHalves(type: HalfType, patterns: ArrayLike<number>): Float64Array {
  decoded[type] ??= Float64Array.from({ length: 65536 }, (_, pattern) => decodeHalf(type, pattern));
  const table = decoded[type];
  const values = new Float64Array(patterns.length);
  for (let i = 0; i < values.length; i++) values[i] = table[patterns[i]];
  return values;
}

/** The pattern nearest to `x`, ties to even; any NaN gives one quiet NaN. */
export function encodeHalf(type: HalfType, x: number): number {
  const { exponentBits, mantissaBits } = FORMATS[type];
  const bias = 2 ** (exponentBits - 1) - 1;
  const infinity = (2 ** exponentBits - 1) << mantissaBits;
  if (Number.isNaN(x)) return infinity | (1 << (mantissaBits - 1));
  const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0;
  const size = Math.abs(x);
  if (size === 0) return sign;
  if (size === Infinity) return sign | infinity;
  if (size >= power(bias + 1)) return sign | infinity;
  let exponent = Math.max(Math.floor(Math.log2(size)), 1 - bias);
  if (power(exponent) > size) exponent = Math.max(exponent - 1, 1 - bias);
  // Steps above zero at this exponent; a carry into the next exponent comes out right by addition.
  const steps = roundToEven(size / power(exponent - mantissaBits));
  const pattern = steps + (exponent - 1 + bias) * power(mantissaBits);
  return sign | Math.min(pattern, infinity);
}

/** The patterns of many numbers. */
export function encodeHalves(type: HalfType, values: ArrayLike<number>): Uint16Array {
  const patterns = new Uint16Array(values.length);
  for (let i = 0; i < patterns.length; i++) patterns[i] = encodeHalf(type, values[i]);
  return patterns;
}

/** `x` after storage as `type`. */
export function roundToHalf(type: HalfType, x: number): number {
  return decodeHalf(type, encodeHalf(type, x));
}

function roundToEven(x: number): number {
  const floor = Math.floor(x);
  const rest = x - floor;
  if (rest !== 0.5) return Math.round(x);
  return floor % 2 === 0 ? floor : floor + 1;
}
