// Half and bfloat16 bit patterns to numbers and back: exact when reading, rounded once (to
// nearest, ties to even) when writing.

/** What tells one 16-bit format from another: sign, then exponent, then mantissa bits. */
interface Format {
  readonly mantissaBits: number;
  /** Bit pattern of infinity; anything above it is a NaN. */
  readonly infinity: number;
  /** Biased float64 exponent of the smallest normal number: all below share its spacing. */
  readonly lowestExponent: number;
  /** Indexed by the pattern's sign and exponent: value = scale * (hidden + mantissa). */
  readonly scale: Float64Array;
  readonly hidden: Float64Array;
  /** 1 / spacing of neighbouring numbers, indexed by float64 exponent - lowestExponent. */
  readonly inverseSpacing: Float64Array;
}

const HALF = defineFormat(5, 10);
const BFLOAT16 = defineFormat(8, 7);

/** Adding and taking away 2^52 rounds a smaller positive number to an integer, ties to even. */
const ROUNDER = 2 ** 52;

const float64View = new Float64Array(1);
/** The same eight bytes; the high word holds sign and exponent. */
const wordView = new Uint32Array(float64View.buffer);
const HIGH_WORD = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1 ? 1 : 0;

/** The number that a half-precision bit pattern stands for. */
export function halfToNumber(bits: number): number {
  return decode(HALF, bits);
}

/** The half-precision bit pattern nearest to a number; ties go to even, NaN to quiet NaN. */
export function numberToHalf(value: number): number {
  return encode(HALF, value);
}

/** The number that a bfloat16 bit pattern stands for. */
export function bfloat16ToNumber(bits: number): number {
  return decode(BFLOAT16, bits);
}

/** The bfloat16 bit pattern nearest to a number; ties go to even, NaN to quiet NaN. */
export function numberToBfloat16(value: number): number {
  return encode(BFLOAT16, value);
}

/** Reads half-precision patterns into as many numbers. */
export function halvesToFloats(source: Uint16Array, target: Float32Array | Float64Array): void {
  for (let i = 0; i < source.length; i++) target[i] = decode(HALF, source[i]);
}

/** Writes numbers as half-precision patterns. */
export function floatsToHalves(source: ArrayLike<number>, target: Uint16Array): void {
  for (let i = 0; i < source.length; i++) target[i] = encode(HALF, source[i]);
}

/** Reads bfloat16 patterns into as many numbers. */
export function bfloat16sToFloats(source: Uint16Array, target: Float32Array | Float64Array): void {
  for (let i = 0; i < source.length; i++) target[i] = decode(BFLOAT16, source[i]);
}

/** Writes numbers as bfloat16 patterns. */
export function floatsToBfloat16s(source: ArrayLike<number>, target: Uint16Array): void {
  for (let i = 0; i < source.length; i++) target[i] = encode(BFLOAT16, source[i]);
}

function decode(format: Format, bits: number): number {
  const magnitude = bits & 0x7fff;
  if (magnitude > format.infinity) return Number.NaN;
  const row = bits >> format.mantissaBits;
  return format.scale[row] * (format.hidden[row] + (bits & ((1 << format.mantissaBits) - 1)));
}

function encode(format: Format, value: number): number {
  float64View[0] = value;
  const high = wordView[HIGH_WORD];
  const sign = (high >>> 16) & 0x8000;
  const exponent = (high >>> 20) & 0x7ff;
  // Steps of the format's exponent above its lowest; below that, numbers are evenly spaced.
  const step = Math.max(0, exponent - format.lowestExponent);
  if (step >= format.inverseSpacing.length) {
    const quiet = Number.isNaN(value) ? 1 << (format.mantissaBits - 1) : 0;
    return sign | format.infinity | quiet;
  }
  const spacings = Math.abs(value) * format.inverseSpacing[step];
  const mantissa = spacings + ROUNDER - ROUNDER; // with the hidden bit; may carry up
  return sign | ((step << format.mantissaBits) + mantissa);
}

function defineFormat(exponentBits: number, mantissaBits: number): Format {
  const bias = 2 ** (exponentBits - 1) - 1;
  const exponents = 2 ** exponentBits;
  const scale = new Float64Array(2 * exponents);
  const hidden = new Float64Array(2 * exponents);
  for (let row = 0; row < 2 * exponents; row++) {
    const sign = row < exponents ? 1 : -1;
    const exponent = row % exponents;
    const isTop = exponent === exponents - 1; // infinity: NaN patterns never get here
    scale[row] = sign * (isTop ? Infinity : 2 ** (Math.max(1, exponent) - bias - mantissaBits));
    hidden[row] = exponent === 0 ? 0 : 2 ** mantissaBits;
  }
  const inverseSpacing = new Float64Array(exponents - 2);
  for (let step = 0; step < inverseSpacing.length; step++) {
    inverseSpacing[step] = 2 ** (mantissaBits - (step + 1 - bias));
  }
  return {
    mantissaBits,
    infinity: (exponents - 1) << mantissaBits,
    lowestExponent: 1023 + 1 - bias,
    scale,
    hidden,
    inverseSpacing,
  };
}
