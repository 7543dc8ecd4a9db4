// Reads and writes safetensors files: a length, a header in JSON, and the numbers (format
// description: huggingface/safetensors, README, "Format").
import {
  closeSync,
  fsyncSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  writeSync,
} from 'node:fs';
import { endianness } from 'node:os';

export interface StoredTensor {
  readonly shape: readonly number[];
  readonly data: Float32Array;
}

export interface TensorFile {
  readonly tensors: ReadonlyMap<string, StoredTensor>;
  readonly metadata: Readonly<Record<string, string>>;
}

/** A file that is not a safetensors file, or holds something other than float32. */
export class SafetensorsError extends Error {
  override name = 'SafetensorsError';
}

/** No header is longer, says the format. */
const LONGEST_HEADER = 100_000_000;
const LENGTH_BYTES = 8;
/** Numbers begin at a multiple of this in a file. */
const ALIGNMENT = 8;
const METADATA = '__metadata__';

/** The file with these tensors, as bytes. */
export function encodeSafetensors({ tensors, metadata }: TensorFile): Buffer {
  checkByteOrder();
  const entries: [string, unknown][] = [[METADATA, metadata]];
  let end = 0;
  for (const [name, { shape, data }] of tensors) {
    const begin = end;
    end += data.byteLength;
    entries.push([name, { dtype: 'F32', shape, data_offsets: [begin, end] }]);
  }
  const json = Buffer.from(JSON.stringify(Object.fromEntries(entries)));
  const padding = -(LENGTH_BYTES + json.length) & (ALIGNMENT - 1);
  const header = Buffer.concat([json, Buffer.alloc(padding, ' ')]);
  const length = Buffer.alloc(LENGTH_BYTES);
  length.writeBigUInt64LE(BigInt(header.length));
  const parts = [...tensors.values()].map(({ data }) =>
    Buffer.from(data.buffer, data.byteOffset, data.byteLength),
  );
  return Buffer.concat([length, header, ...parts]);
}

/** The tensors of a file's bytes. @throws SafetensorsError where the bytes break the format */
export function decodeSafetensors(bytes: Buffer): TensorFile {
  checkByteOrder();
  const { header, numbers } = splitFile(bytes);
  const { [METADATA]: metadata = {}, ...entries } = header;
  if (!isRecord(metadata) || Object.values(metadata).some((value) => typeof value !== 'string')) {
    throw new SafetensorsError('__metadata__ is not a list of strings by name');
  }
  const tensors = new Map<string, StoredTensor>();
  const spans: [number, number][] = [];
  for (const [name, entry] of Object.entries(entries)) {
    const { shape, begin, end } = checkEntry(name, entry, numbers.length);
    const data = new Float32Array((end - begin) / Float32Array.BYTES_PER_ELEMENT);
    Buffer.from(data.buffer).set(numbers.subarray(begin, end));
    tensors.set(name, { shape, data });
    spans.push([begin, end]);
  }
  checkCoverage(spans, numbers.length);
  return { tensors, metadata: metadata as Record<string, string> };
}

/** Writes a file as a whole or not at all: whatever happens, the old or the new one is there. */
export function writeSafetensors(file: string, content: TensorFile): void {
  const temporary = `${file}.${process.pid}.tmp`;
  try {
    const descriptor = openSync(temporary, 'w');
    try {
      const bytes = encodeSafetensors(content);
      for (let at = 0; at < bytes.length; ) at += writeSync(descriptor, bytes, at);
      fsyncSync(descriptor);
    } finally {
      closeSync(descriptor);
    }
    renameSync(temporary, file);
  } catch (error) {
    rmSync(temporary, { force: true });
    throw error;
  }
}

export function readSafetensors(file: string): TensorFile {
  try {
    return decodeSafetensors(readFileSync(file));
  } catch (error) {
    if (!(error instanceof SafetensorsError)) throw error;
    throw new SafetensorsError(`${file}: ${error.message}`);
  }
}

function splitFile(bytes: Buffer): { header: Record<string, unknown>; numbers: Buffer } {
  if (bytes.length < LENGTH_BYTES) throw new SafetensorsError('the file is too short for a header');
  const length = bytes.readBigUInt64LE();
  if (length > LONGEST_HEADER || LENGTH_BYTES + Number(length) > bytes.length) {
    throw new SafetensorsError(`the header has ${length} bytes, the file ${bytes.length}`);
  }
  const end = LENGTH_BYTES + Number(length);
  let header: unknown;
  try {
    const text = new TextDecoder('utf-8', { fatal: true }).decode(bytes.subarray(8, end));
    if (!text.startsWith('{')) throw new SyntaxError('it does not begin with {');
    header = JSON.parse(text);
  } catch (error) {
    throw new SafetensorsError(`the header is not JSON: ${(error as Error).message}`);
  }
  return { header: header as Record<string, unknown>, numbers: bytes.subarray(end) };
}

/** Checks what a header says about one tensor. */
function checkEntry(name: string, entry: unknown, bytes: number) {
  const fail = (what: string) => new SafetensorsError(`tensor ${JSON.stringify(name)}: ${what}`);
  if (!isRecord(entry)) throw fail('its entry is not an object');
  const { dtype, shape, data_offsets: offsets } = entry;
  if (dtype !== 'F32') throw fail(`expected dtype F32, got ${JSON.stringify(dtype)}`);
  if (!isCounts(shape)) throw fail(`${JSON.stringify(shape)} is not a shape`);
  if (!isCounts(offsets) || offsets.length !== 2) throw fail('data_offsets are not two numbers');
  const [begin, end] = offsets;
  const size = shape.reduce((product, size) => product * size, Float32Array.BYTES_PER_ELEMENT);
  if (end - begin !== size || end > bytes) {
    throw fail(`[${shape}] needs ${size} bytes, data_offsets are [${offsets}] of ${bytes}`);
  }
  return { shape, begin, end };
}

/** The format allows neither gaps nor overlaps, so that nothing can hide in a file. */
function checkCoverage(spans: [number, number][], bytes: number): void {
  let covered = 0;
  for (const [begin, end] of spans.sort(([a, b], [c, d]) => a - c || b - d)) {
    if (begin !== covered) throw new SafetensorsError('tensors overlap or leave a gap');
    covered = end;
  }
  if (covered !== bytes) throw new SafetensorsError('bytes are left over behind the last tensor');
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function isCounts(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((n) => Number.isSafeInteger(n) && n >= 0);
}

/** The format is little-endian, as is every processor that Node's own builds support but one. */
function checkByteOrder(): void {
  if (endianness() !== 'LE') throw new SafetensorsError('this processor is big-endian');
}
