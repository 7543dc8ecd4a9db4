// Writes text with a model, character by character, over a cache of keys and values.
import { ArrayCache, cachedAttention } from './kv-cache';
import type { Gpt } from './model';
import { type Random, uniform } from './random';

export interface Taste {
  /** Below 1 prefers likely characters, above 1 unlikely ones; 0 takes the likeliest */
  readonly temperature: number;
  /** Only so many of the likeliest, and what is as likely as the last of them. Default: all */
  readonly topK?: number;
  readonly random: Random;
}

/**
 * The tokens that follow a prompt, without end.
 *
 * The model knows positions up to its length only. Where the text grows longer, its last half is
 * read again from position 0 on.
 */
export function* writeTokens(model: Gpt, prompt: Int32Array, taste: Taste): Generator<number> {
  const { length } = model.sizes;
  const text = [...prompt.slice(-length)];
  let decoder = new Decoder(model);
  let logits = decoder.read(Int32Array.from(text));
  for (;;) {
    const token = choose(logits, taste);
    yield token;
    text.push(token);
    if (decoder.position < length) {
      logits = decoder.read(Int32Array.of(token));
    } else {
      text.splice(0, text.length - Math.ceil(length / 2));
      decoder = new Decoder(model);
      logits = decoder.read(Int32Array.from(text));
    }
  }
}

/** Feeds a model with one text, piece by piece. */
export class Decoder {
  /** How many tokens were read */
  position = 0;
  readonly #attention;

  constructor(readonly model: Gpt) {
    const { layers, heads, width } = model.sizes;
    const caches = Array.from({ length: layers }, () => new ArrayCache(heads, width / heads));
    this.#attention = cachedAttention(caches);
  }

  /** Reads the next tokens of the text; returns the logits of the token after them. */
  read(tokens: Int32Array): Float32Array {
    const logits = this.model.forward(tokens, 1, this.#attention, this.position);
    this.position += tokens.length;
    return logits.subarray(logits.length - this.model.sizes.vocabulary) as Float32Array;
  }
}

/** A token by its probability. */
export function choose(logits: Float32Array, { temperature, topK, random }: Taste): number {
  const largest = logits.reduce((best, logit, i) => (logit > logits[best] ? i : best), 0);
  if (temperature === 0) return largest;
  const least =
    topK && topK < logits.length ? logits.slice().sort()[logits.length - topK] : -Infinity;
  const powers = new Float64Array(logits).map((logit) =>
    logit < least ? 0 : Math.exp((logit - logits[largest]) / temperature),
  );
  let left = uniform(random) * powers.reduce((sum, power) => sum + power);
  for (let i = 0; i < powers.length; i++) {
    left -= powers[i];
    if (left < 0) return i;
  }
  return largest; // only rounding leads here
}
