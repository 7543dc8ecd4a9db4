// The tiny ONNX models that onnxruntime is measured with, encoded as protobuf by hand: one graph for
// each form in which attention can be written (onnx.proto gives the field numbers).

/** @typedef {import('../cases.mjs').Case} Case */
/** @typedef {{name: string, dims: (number | string)[], type?: number}} Value a graph's input */

const FLOAT = 1;
export const INT32 = 6;
const CONTRIB = 'com.microsoft';

/** @param {number} value */
function varint(value) {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) | 128);
  return Buffer.from([...bytes, value]);
}

/**
 * One field: numbers as varints, the rest with its length before it.
 * @param {number} number
 * @param {number | string | Buffer} content
 */
function field(number, content) {
  if (typeof content === 'number') return Buffer.concat([varint(number * 8), varint(content)]);
  const bytes = Buffer.from(/** @type {Buffer} */ (content));
  return Buffer.concat([varint(number * 8 + 2), varint(bytes.length), bytes]);
}

/** @param {number} number @param {number} content */
function float(number, content) {
  const bytes = Buffer.alloc(4);
  bytes.writeFloatLE(content);
  return Buffer.concat([varint(number * 8 + 5), bytes]);
}

/** Whole numbers become ints, a Float of ours is marked. @param {string} name @param {any} value */
function attribute(name, value) {
  const content = Array.isArray(value)
    ? [...value.map((item) => field(8, item)), field(20, 7)]
    : value instanceof Real
      ? [float(2, value.value), field(20, 1)]
      : [field(3, value), field(20, 2)];
  return Buffer.concat([field(1, name), ...content]);
}

class Real {
  /** @param {number} value */
  constructor(value) {
    this.value = value;
  }
}

/**
 * @param {string} type
 * @param {string[]} inputs '' leaves an optional one out
 * @param {string[]} outputs
 * @param {Record<string, number | number[] | Real>} [attributes]
 * @param {string} [domain]
 */
function node(type, inputs, outputs, attributes = {}, domain = '') {
  return Buffer.concat([
    ...inputs.map((name) => field(1, name)),
    ...outputs.map((name) => field(2, name)),
    field(4, type),
    ...Object.entries(attributes).map(([name, value]) => field(5, attribute(name, value))),
    field(7, domain),
  ]);
}

/** @param {Value} value */
function valueInfo({ name, dims, type = FLOAT }) {
  const shape = dims.map((dim) => field(1, typeof dim === 'number' ? field(1, dim) : field(2, dim)));
  const tensor = Buffer.concat([field(1, type), field(2, Buffer.concat(shape))]);
  return Buffer.concat([field(1, name), field(2, field(1, tensor))]);
}

/**
 * @param {Buffer[]} nodes
 * @param {Value[]} inputs
 * @param {Value[]} outputs
 * @param {Buffer[]} [initializers]
 */
function model(nodes, inputs, outputs, initializers = []) {
  const graph = Buffer.concat([
    ...nodes.map((bytes) => field(1, bytes)),
    field(2, 'attention'),
    ...initializers.map((bytes) => field(5, bytes)),
    ...inputs.map((value) => field(11, valueInfo(value))),
    ...outputs.map((value) => field(12, valueInfo(value))),
  ]);
  const opsets = [
    ['', 23],
    [CONTRIB, 1],
  ].map(([domain, version]) => Buffer.concat([field(1, domain), field(2, version)]));
  return Buffer.concat([field(1, 10), field(7, graph), ...opsets.map((bytes) => field(8, bytes))]);
}
export { field, float, node, model, Real, FLOAT, CONTRIB };
