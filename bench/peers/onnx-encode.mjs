// Writes tiny ONNX models: protobuf messages by hand, with the field numbers of onnx.proto.

const OPSET = 23; // the first with the operator Attention
const IR_VERSION = 11;
export const CONTRIB = 'com.microsoft';

/** @typedef {'float32' | 'int32'} Type */
/** @typedef {{name: string, dims: number[], type?: Type}} Value an input or output of a model */
/**
 * @typedef {object} Node
 * @property {string} type
 * @property {string[]} inputs '' leaves an optional one out
 * @property {string[]} outputs
 * @property {Record<string, number | number[]>} [attributes] whole numbers
 * @property {string} [domain]
 */

/** The numbers of TensorProto.DataType. */
const TYPES = { float32: 1, int32: 6 };
/** The numbers of AttributeProto.AttributeType. */
const INT = 2;
const INTS = 7;

/**
 * The bytes of a model.
 * @param {Node[]} nodes
 * @param {Value[]} inputs
 * @param {Value[]} outputs
 * @param {Record<string, number>} [constants] float32 scalars
 */
export function encodeModel(nodes, inputs, outputs, constants = {}) {
  const graph = message(
    ...nodes.map((node) => field(1, encodeNode(node))),
    field(2, 'attention'),
    ...Object.entries(constants).map(([name, value]) => field(5, encodeScalar(name, value))),
    ...inputs.map((value) => field(11, encodeValue(value))),
    ...outputs.map((value) => field(12, encodeValue(value))),
  );
  return message(
    field(1, IR_VERSION),
    field(7, graph),
    field(8, message(field(1, ''), field(2, OPSET))),
    field(8, message(field(1, CONTRIB), field(2, 1))),
  );
}

/** @param {Node} node */
function encodeNode({ type, inputs, outputs, attributes = {}, domain = '' }) {
  return message(
    ...inputs.map((name) => field(1, name)),
    ...outputs.map((name) => field(2, name)),
    field(4, type),
    ...Object.entries(attributes).map(([name, value]) => field(5, encodeAttribute(name, value))),
    field(7, domain),
  );
}

/** @param {string} name @param {number | number[]} value */
function encodeAttribute(name, value) {
  return Array.isArray(value)
    ? message(field(1, name), ...value.map((item) => field(8, item)), field(20, INTS))
    : message(field(1, name), field(3, value), field(20, INT));
}

/** @param {string} name @param {number} value */
function encodeScalar(name, value) {
  const data = Buffer.from(Float32Array.of(value).buffer);
  return message(field(2, TYPES.float32), field(8, name), field(9, data));
}

/** @param {Value} value */
function encodeValue({ name, dims, type = 'float32' }) {
  const shape = message(...dims.map((dim) => field(1, message(field(1, dim)))));
  const tensor = message(field(1, TYPES[type]), field(2, shape));
  return message(field(1, name), field(2, message(field(1, tensor))));
}

/** @param {...Buffer} fields */
function message(...fields) {
  return Buffer.concat(fields);
}

/**
 * A number as a varint, anything else with its length before it.
 * @param {number} number
 * @param {number | string | Buffer} content
 */
function field(number, content) {
  if (typeof content === 'number') return Buffer.concat([varint(number * 8), varint(content)]);
  const bytes = typeof content === 'string' ? Buffer.from(content) : content;
  return Buffer.concat([varint(number * 8 + 2), varint(bytes.length), bytes]);
}

/** @param {number} value not negative */
function varint(value) {
  const bytes = [];
  let rest = value;
  for (; rest > 127; rest = Math.floor(rest / 128)) bytes.push((rest % 128) | 128);
  return Buffer.from([...bytes, rest]);
}
