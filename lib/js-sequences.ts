// Packed batches for the JavaScript backend: each sequence is computed as a call of its own, on
// parts of the batch's arrays. The twin of native/cpu/sequences.cpp.

import type { TaskList } from './js-backend';
import type {
  BackwardTensors,
  FloatArray,
  ForwardOutputs,
  Inputs,
  Problem,
  Sequences,
} from './problem-header';

type PassOf<Tensors> = (problem: Problem, inputs: Inputs, tensors: Tensors) => TaskList;

/** One entry of a batch: a call of its own, and where it lies in the batch. */
interface Entry {
  readonly problem: Problem;
  readonly inputs: Inputs;
  /** The part of a tensor with rows for queries, or for keys, that is the entry's */
  ofQueries<T extends FloatArray>(data: T, width: number): T;
  ofKeys<T extends FloatArray>(data: T, width: number): T;
}

function entryOf(p: Problem, inputs: Inputs, { queryStarts, keyStarts }: Sequences, b: number) {
  const ofQueries = <T extends FloatArray>(data: T, width: number): T =>
    part(data, queryStarts, b, p.queryHeads * width);
  const ofKeys = <T extends FloatArray>(data: T, width: number): T =>
    part(data, keyStarts, b, p.kvHeads * width);
  const entry: Entry = {
    problem: {
      ...p,
      batch: 1,
      batchOffset: p.batchOffset + b,
      queryLength: queryStarts[b + 1] - queryStarts[b],
      keyLength: keyStarts[b + 1] - keyStarts[b],
      causalOffset: inputs.causalOffsets ? inputs.causalOffsets[b] : p.causalOffset,
    },
    inputs: {
      ...inputs,
      query: ofQueries(inputs.query, p.headDim),
      key: ofKeys(inputs.key, p.headDim),
      value: ofKeys(inputs.value, p.valueDim),
      causalOffsets: null,
      kvLengths: inputs.kvLengths?.subarray(b, b + 1) ?? null,
      sequences: null,
    },
    ofQueries,
    ofKeys,
  };
  return entry;
}

/** Entry `b` of an array with `size` elements for each position of the packed batch. */
function part<T extends FloatArray>(data: T, starts: Int32Array, b: number, size: number): T {
  return data.subarray(starts[b] * size, starts[b + 1] * size) as T;
}

/** The tasks of a packed forward call; `pass` makes those of one sequence. */
export function forwardSequences(
  problem: Problem,
  inputs: Inputs,
  sequences: Sequences,
  outputs: ForwardOutputs,
  pass: PassOf<ForwardOutputs>,
): TaskList {
  return new SequenceTasks(problem.batch, (b) => {
    const entry = entryOf(problem, inputs, sequences, b);
    const { queryHeads, queryLength, keyLength, valueDim } = entry.problem;
    const lse = new Float32Array(queryHeads * queryLength);
    const output = entry.ofQueries(outputs.output as FloatArray, valueDim);
    const store = () => {
      eachHead(problem, sequences, b, outputs.lse, (head, rows) => {
        rows.set(lse.subarray(head * queryLength, (head + 1) * queryLength));
      });
    };
    if (queryLength === 0) return null;
    if (keyLength === 0) {
      output.fill(0);
      lse.fill(-Infinity);
      store();
      return null;
    }
    return then(pass(entry.problem, entry.inputs, { ...outputs, output, lse }), store);
  });
}

/** The tasks of a packed backward call. */
export function backwardSequences(
  problem: Problem,
  inputs: Inputs,
  sequences: Sequences,
  tensors: BackwardTensors,
  pass: PassOf<BackwardTensors>,
): TaskList {
  return new SequenceTasks(problem.batch, (b) => {
    const entry = entryOf(problem, inputs, sequences, b);
    const { queryHeads, queryLength, keyLength, headDim, valueDim } = entry.problem;
    const gradients = {
      gradQuery: entry.ofQueries(tensors.gradQuery, headDim),
      gradKey: entry.ofKeys(tensors.gradKey, headDim),
      gradValue: entry.ofKeys(tensors.gradValue, valueDim),
    };
    if (queryLength === 0 || keyLength === 0) {
      for (const gradient of Object.values(gradients)) gradient.fill(0);
      return null;
    }
    const lse = new Float32Array(queryHeads * queryLength);
    eachHead(problem, sequences, b, tensors.lse, (head, rows) => lse.set(rows, head * queryLength));
    return pass(entry.problem, entry.inputs, {
      output: entry.ofQueries(tensors.output, valueDim),
      gradOutput: entry.ofQueries(tensors.gradOutput, valueDim),
      lse,
      ...gradients,
      gradMask: null,
    });
  });
}

/** Visits each head's part of lse [Hq, totalQ] that belongs to sequence `b`. */
function eachHead(
  problem: Problem,
  { queryStarts }: Sequences,
  b: number,
  lse: Float32Array | null,
  visit: (head: number, rows: Float32Array) => void,
): void {
  if (lse === null) return;
  const total = queryStarts[problem.batch];
  for (let head = 0; head < problem.queryHeads; head++) {
    const first = head * total;
    visit(head, lse.subarray(first + queryStarts[b], first + queryStarts[b + 1]));
  }
}

/** A list with one more thing to do at the end of its last task. */
function then(tasks: TaskList, end: () => void): TaskList {
  return {
    count: tasks.count,
    run: (task) => {
      tasks.run(task);
      if (task === tasks.count - 1) end();
    },
  };
}

/** The tasks of all sequences; each one's scratch memory lives as long as its own tasks. */
class SequenceTasks implements TaskList {
  private current: TaskList | null = null;
  private next = 0;
  private done = 0; // tasks of the current sequence

  constructor(
    private readonly sequences: number,
    /** A sequence's tasks; null if there are none left to do */
    private readonly begin: (b: number) => TaskList | null,
  ) {}

  /** Known only at the end: until then, there is more. */
  get count(): number {
    return this.current === null && this.next === this.sequences ? 0 : Infinity;
  }

  run(): void {
    if (this.current === null) {
      this.current = this.begin(this.next++);
      this.done = 0;
    }
    if (this.current === null) return;
    this.current.run(this.done++);
    if (this.done === this.current.count) this.current = null;
  }
}
