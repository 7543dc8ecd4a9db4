// Every 16-bit pattern, and the numbers around each rounding boundary, against arithmetic on
// doubles.
import { describe, expect, test } from 'vitest';
import {
  bfloat16sToFloats,
  bfloat16ToNumber,
  floatsToBfloat16s,
  floatsToHalves,
  halfToNumber,
  halvesToFloats,
  numberToBfloat16,
  numberToHalf,
} from '../lib/float16';
import { Tensor } from '../lib/index';
import { randomNormals, uniform } from './cases';
import { decodeHalf, encodeHalf } from './half';

const FORMATS = [
  {
    type: 'float16' as const,
    decode: halfToNumber,
    encode: numberToHalf,
    decodeAll: halvesToFloats,
    encodeAll: floatsToHalves,
    infinity: 0x7c00,
  },
  {
    type: 'bfloat16' as const,
    decode: bfloat16ToNumber,
    encode: numberToBfloat16,
    decodeAll: bfloat16sToFloats,
    encodeAll: floatsToBfloat16s,
    infinity: 0x7f80,
  },
];

const PATTERNS = Uint16Array.from({ length: 65536 }, (_, pattern) => pattern);

describe('the formats by known values', () => {
  test.each([
    ['float16', 0x3c00, 1],
    ['float16', 0xc000, -2],
    ['float16', 0x7bff, 65504],
    ['float16', 0x0001, 2 ** -24],
    ['float16', 0x0400, 2 ** -14],
    ['float16', 0x3555, 0.333251953125],
    ['float16', 0xfc00, -Infinity],
    ['bfloat16', 0x3f80, 1],
    ['bfloat16', 0x4049, 3.140625],
    ['bfloat16', 0x7f7f, 3.3895313892515355e38],
    ['bfloat16', 0x0001, 2 ** -133],
    ['bfloat16', 0x8000, -0],
  ] as const)('%s 0x%s', (type, pattern, value) => {
    const { decode, encode } = FORMATS.find((format) => format.type === type)!;
    expect(decode(pattern)).toBe(value);
    expect(encode(value)).toBe(pattern);
    expect(decodeHalf(type, pattern)).toBe(value);
    expect(encodeHalf(type, value)).toBe(pattern);
  });
});

describe.each(FORMATS)('$type', ({ type, decode, encode, decodeAll, encodeAll, infinity }) => {
  test('all 65536 patterns decode exactly', () => {
    const floats = new Float32Array(65536);
    decodeAll(PATTERNS, floats);
    const viaTensor = new Tensor(type, PATTERNS, [65536]).toFloat32Array();
    for (const pattern of PATTERNS) {
      const value = decodeHalf(type, pattern);
      const all = [decode(pattern), floats[pattern], viaTensor[pattern]];
      if (!all.every((x) => Object.is(x, value))) expect.fail(`0x${pattern.toString(16)}: ${all}`);
    }
  });

  test('all patterns but NaN survive the way to a number and back; NaN stays NaN', () => {
    for (const pattern of PATTERNS) {
      const back = encode(decodeHalf(type, pattern));
      const wasNaN = (pattern & 0x7fff) > infinity;
      const right = wasNaN ? (back & 0x7fff) > infinity : back === pattern;
      if (!right) expect.fail(`0x${pattern.toString(16)} came back as 0x${back.toString(16)}`);
    }
  });

  test('rounds to nearest, ties to even, at and beside every midpoint', () => {
    for (let pattern = 0; pattern < infinity - 1; pattern++) {
      const below = decodeHalf(type, pattern);
      const above = decodeHalf(type, pattern + 1);
      const middle = (below + above) / 2;
      const nudge = (above - below) * 2 ** -30;
      const even = pattern % 2 === 0 ? pattern : pattern + 1;
      for (const [x, wanted] of [
        [middle, even],
        [middle - nudge, pattern],
        [middle + nudge, pattern + 1],
      ]) {
        if (encode(x) !== wanted) expect.fail(`${x} became ${encode(x)}, not ${wanted}`);
        if (encode(-x) !== (wanted | 0x8000)) expect.fail(`${-x} became ${encode(-x)}`);
      }
    }
  });

  test('overflows to infinity from the last midpoint on', () => {
    const largest = decodeHalf(type, infinity - 1);
    const step = largest - decodeHalf(type, infinity - 2);
    expect(encode(largest + step / 2)).toBe(infinity);
    expect(encode(largest + step * 0.4999)).toBe(infinity - 1);
    for (const x of [1e300, Number.MAX_VALUE, Infinity]) {
      expect(encode(x)).toBe(infinity);
      expect(encode(-x)).toBe(infinity | 0x8000);
    }
  });

  test('what is too small becomes a zero of its sign', () => {
    for (const x of [Number.MIN_VALUE, 1e-310, 1e-300, decodeHalf(type, 1) / 2]) {
      expect(encode(x)).toBe(0);
      expect(encode(-x)).toBe(0x8000);
    }
  });

  test('random numbers of every size, seed 5', () => {
    const next = uniform(5);
    const values = randomNormals(5, 20000).map((x) => x * 2 ** (300 * next() - 150));
    const patterns = new Uint16Array(values.length);
    encodeAll(values, patterns);
    values.forEach((x, i) => {
      const wanted = encodeHalf(type, x);
      if (patterns[i] !== wanted || encode(x) !== wanted) expect.fail(`${x} became ${patterns[i]}`);
    });
  });
});
