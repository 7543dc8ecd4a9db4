// The demo's calls of the package, with the one dropout rate and seed that all of it uses.
import { attentionForwardSync, dropoutMask } from 'node-sdpa';
import { HEAD_DIM, HEADS } from './embedding.mjs';

export const PLACEMENTS = /** @type {const} */ (['weights', 'context', 'scores']);
export const DROPOUT_P = 0.25;
export const SEED = 1851; // the year of Moby-Dick

/** @typedef {(typeof PLACEMENTS)[number]} Placement */
/** @typedef {ReturnType<typeof import('./embedding.mjs').embed>} Inputs */

/**
 * One call of the package: causal attention of all heads, with everything it can give.
 * @param {Inputs} inputs
 * @param {Placement | 'none'} placement
 * @param {{seed?: number, backend?: import('node-sdpa').BackendName}} [choice]
 */
export function attend({ query, key, value }, placement, { seed = SEED, backend } = {}) {
  const dropout =
    placement === 'none'
      ? {}
      : { dropoutP: DROPOUT_P, dropoutPlacement: placement, training: true, seed };
  const result = attentionForwardSync(query, key, value, {
    isCausal: true,
    outputs: ['weights', 'droppedWeights'],
    ...(backend === undefined ? {} : { backend }),
    ...dropout,
  });
  return {
    backend: result.backend,
    output: dataOf(result.output),
    weights: dataOf(result.weights),
    droppedWeights: dataOf(result.droppedWeights),
  };
}

/** @param {{data: unknown} | undefined} tensor */
function dataOf(tensor) {
  return /** @type {Float32Array} */ (tensor?.data);
}

/** @param {Inputs} inputs */
export function sizes({ query }) {
  const [, heads = 0, tokens = 0] = query.dims;
  return { heads, tokens };
}

/**
 * The keep decisions of the package: [heads, tokens, keys or channels], 1 keeps.
 * @param {Placement} placement
 * @param {number} tokens
 */
export function decisions(placement, tokens) {
  const columns = placement === 'context' ? HEAD_DIM : tokens;
  const options = { p: DROPOUT_P, placement, seed: SEED, offset: 0 };
  return dropoutMask([1, HEADS.length, tokens, columns], options);
}
