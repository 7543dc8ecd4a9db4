// Runs the calls given as JSON on standard input, forward and backward, and prints what they gave.
import { readFileSync } from 'node:fs';
import { attentionForwardSync, backendInfo } from 'node-sdpa';

/** @typedef {{data: number[], dims: number[], type: 'float32' | 'float16' | 'bfloat16'}} Plain */

/** @type {(Record<'query' | 'key' | 'value' | 'gradOutput', Plain> & {options: object})[]} */
const calls = JSON.parse(readFileSync(0, 'utf8'));
const results = calls.map(({ query, key, value, gradOutput, options }) => {
  const result = attentionForwardSync(tensor(query), tensor(key), tensor(value), {
    ...options,
    outputs: ['droppedWeights'],
  });
  const { gradQuery, gradKey, gradValue } = result.backwardSync(tensor(gradOutput));
  const { backend, output, droppedWeights } = result;
  const tensors = { output, droppedWeights, gradQuery, gradKey, gradValue };
  const values = Object.entries(tensors).map(([name, t]) => [name, Array.from(t?.data ?? [])]);
  return { backend, ...Object.fromEntries(values) };
});
process.stdout.write(JSON.stringify({ info: backendInfo(), results }));

/** @param {Plain} plain */
function tensor({ data, dims, type }) {
  return {
    data: type === 'float32' ? Float32Array.from(data) : Uint16Array.from(data),
    dims,
    type,
  };
}
