// The ESM door to the same module: import and require share one copy of its state.

export * from './index.js';
