// The forms in which onnxruntime can be given attention, each as a model of one call: which inputs
// it takes, in which layout, and what it gives.
import { CONTRIB, encodeModel } from './onnx-encode.mjs';

/** @typedef {import('../cases.mjs').Case} Case */
/** @typedef {import('./onnx-encode.mjs').Value} Value */
/** @typedef {{bytes: Buffer, inputs: Value[], outputs: Value[]}} Model */

/**
 * The forms by name. Inputs named query, key and value with three axes are [batch, length, heads *
 * headDim], with four [batch, heads, length, headDim]; so is the first output.
 * @type {Record<string, (problem: Case) => Model>}
 */
export const FORMS = {
  MultiHeadAttention: (problem) => multiHead(problem, flat(problem)),
  'MultiHeadAttention 4-D': (problem) => multiHead(problem, apart(problem)),
  'Attention-23': attention,
  'MatMul + Softmax': decomposed,
  GroupQueryAttention: (problem) =>
    problem.queryLength === 1 ? groupQueryDecode(problem) : groupQuery(problem),
};

/** GroupQueryAttention is always causal, which a single query at the end does not notice. */
export function fits(/** @type {string} */ form, /** @type {Case} */ problem) {
  const { isCausal } = problem.options;
  return form !== 'GroupQueryAttention' || isCausal || problem.queryLength === 1;
}

/** Shapes of query and key with the heads side by side. @param {Case} problem */
function flat({ batch, heads, queryLength, keyLength, headDim }) {
  const width = heads * headDim;
  return { query: [batch, queryLength, width], key: [batch, keyLength, width] };
}

/** Shapes of query and key with the heads apart. @param {Case} problem */
function apart({ batch, heads, queryLength, keyLength, headDim }) {
  return {
    query: [batch, heads, queryLength, headDim],
    key: [batch, heads, keyLength, headDim],
  };
}

/**
 * @param {number[]} query shape of the query and the output
 * @param {number[]} key shape of the key and the value
 */
function values(query, key) {
  const inputs = [
    { name: 'query', dims: query },
    { name: 'key', dims: key },
    { name: 'value', dims: key },
  ];
  return { inputs, outputs: [{ name: 'output', dims: query }] };
}

/** Query with three axes always; key and value as given. */
function multiHead(/** @type {Case} */ problem, /** @type {{key: number[]}} */ { key }) {
  const { inputs, outputs } = values(flat(problem).query, key);
  const node = {
    type: 'MultiHeadAttention',
    inputs: ['query', 'key', 'value'],
    outputs: ['output'],
    attributes: { num_heads: problem.heads, unidirectional: problem.options.isCausal ? 1 : 0 },
    domain: CONTRIB,
  };
  return { inputs, outputs, bytes: encodeModel([node], inputs, outputs) };
}

/** @param {Case} problem */
function attention(problem) {
  const { query, key } = apart(problem);
  const { inputs, outputs } = values(query, key);
  const node = {
    type: 'Attention',
    inputs: ['query', 'key', 'value'],
    outputs: ['output'],
    attributes: { is_causal: problem.options.isCausal ? 1 : 0 },
  };
  return { inputs, outputs, bytes: encodeModel([node], inputs, outputs) };
}

/** Single operators, which onnxruntime fuses as it can; a causal mask is added. */
function decomposed(/** @type {Case} */ problem) {
  const { queryLength, keyLength, headDim, options } = problem;
  const { query, key } = apart(problem);
  const { inputs, outputs } = values(query, key);
  const perm = [0, 1, 3, 2];
  const nodes = [
    { type: 'Transpose', inputs: ['key'], outputs: ['keyT'], attributes: { perm } },
    { type: 'MatMul', inputs: ['query', 'keyT'], outputs: ['products'] },
    { type: 'Mul', inputs: ['products', 'scale'], outputs: ['scores'] },
  ];
  if (options.isCausal) {
    inputs.push({ name: 'mask', dims: [1, 1, queryLength, keyLength] });
    nodes.push({ type: 'Add', inputs: ['scores', 'mask'], outputs: ['masked'] });
  }
  const scores = options.isCausal ? 'masked' : 'scores';
  nodes.push(
    { type: 'Softmax', inputs: [scores], outputs: ['weights'] },
    { type: 'MatMul', inputs: ['weights', 'value'], outputs: ['output'] },
  );
  const scale = 1 / Math.sqrt(headDim);
  return { inputs, outputs, bytes: encodeModel(nodes, inputs, outputs, { scale }) };
}

/** Without a cache. @param {Case} problem */
function groupQuery(problem) {
  const { query, key } = flat(problem);
  const { inputs, outputs } = values(query, key);
  inputs.push(...lengths(problem));
  const names = ['query', 'key', 'value', '', '', 'lastKeys', 'totalLength'];
  const bytes = encodeModel([groupQueryNode(problem, names)], inputs, outputs);
  return { inputs, outputs, bytes };
}

/** With a cache that has room for the newest key and value, which are written into it in place. */
function groupQueryDecode(/** @type {Case} */ problem) {
  const { query } = flat(problem);
  const { key: cache } = apart(problem);
  const inputs = [
    { name: 'query', dims: query },
    { name: 'newKey', dims: query },
    { name: 'newValue', dims: query },
    { name: 'pastKey', dims: cache },
    { name: 'pastValue', dims: cache },
    ...lengths(problem),
  ];
  const outputs = [
    { name: 'output', dims: query },
    { name: 'presentKey', dims: cache },
    { name: 'presentValue', dims: cache },
  ];
  const node = groupQueryNode(
    problem,
    inputs.map(({ name }) => name),
  );
  return { inputs, outputs, bytes: encodeModel([node], inputs, outputs) };
}

/** @param {Case} problem @param {string[]} inputs */
function groupQueryNode({ heads }, inputs) {
  return {
    type: 'GroupQueryAttention',
    inputs,
    outputs: ['output', 'presentKey', 'presentValue'],
    attributes: { num_heads: heads, kv_num_heads: heads },
    domain: CONTRIB,
  };
}

/** @param {Case} problem @returns {Value[]} */
function lengths({ batch }) {
  return [
    { name: 'lastKeys', dims: [batch], type: 'int32' },
    { name: 'totalLength', dims: [1], type: 'int32' },
  ];
}
