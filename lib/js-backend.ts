// The operation in plain TypeScript: what runs where no native binary loads, and what the native
// backends are measured against. A call is a list of short tasks, so that an asynchronous caller
// can give the event loop its turn between them.

import { ForwardPass } from './js-forward';
import { SampledCall } from './js-samples';
import { forwardSequences } from './js-sequences';
import type { FloatArray, ForwardOutputs, Inputs, Problem } from './problem-header';

export { jsBackward } from './js-backward';

/** The work of one call. Tasks share scratch memory: each runs once, in order. */
export interface TaskList {
  readonly count: number;
  run(task: number): void;
}

/** The tasks of a forward call: of each sequence, of all samples, or of the one call that it is. */
export function jsForward(problem: Problem, inputs: Inputs, outputs: ForwardOutputs): TaskList {
  const { sequences } = inputs;
  if (sequences) return forwardSequences(problem, inputs, sequences, outputs, jsForward);
  if (problem.samples > 0) return new SampledCall(problem, inputs, outputs);
  const sample = { problem, output: outputs.output as FloatArray };
  const pass = new ForwardPass(problem, inputs, outputs, [sample]);
  return { count: pass.count, run: (task) => pass.run(task) };
}
