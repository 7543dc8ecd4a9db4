// The operation in plain TypeScript: what runs where no native binary loads, and what the native
// backends are measured against. A call is a list of short tasks, so that an asynchronous caller
// can give the event loop its turn between them.

export { jsBackward } from './js-backward';
export { jsForward } from './js-samples';

/** The work of one call. Tasks share scratch memory: each runs once, in order. */
export interface TaskList {
  readonly count: number;
  run(task: number): void;
}
