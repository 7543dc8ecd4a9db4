// A library in a process of its own, which lives through all cases and stands still between turns.
import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';

/** @typedef {import('node:child_process').ChildProcessByStdio<any, any, null>} Child */

/** Processes that must not outlive this one. @type {Set<Child>} */
const alive = new Set();
process.on('exit', () => {
  for (const child of alive) child.kill('SIGKILL');
});
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => process.exit(1));

export class Library {
  /** @type {string[]} */
  #command;
  /** @type {Child | null} */
  #child = null;
  /** @type {AsyncIterator<string> | null} */
  #lines = null;

  /** @param {string[]} command program and arguments */
  constructor(command) {
    this.#command = command;
  }

  /**
   * Has the process do something, and gives its reply. A process that ends over it, for want of
   * memory perhaps, is replaced by a new one at the next call.
   * @param {string} action
   * @param {object} [request]
   * @returns {Promise<any>}
   */
  async ask(action, request) {
    if (this.#child === null) this.#start();
    this.#child?.kill('SIGCONT');
    this.#child?.stdin.write(`${JSON.stringify({ action, ...request })}\n`);
    const reply = await this.#lines?.next();
    if (reply === undefined || reply.done) {
      this.stop();
      throw new Error('its process has ended');
    }
    this.#child?.kill('SIGSTOP'); // whatever threads it has, they wait without a core
    const { error, ...rest } = JSON.parse(reply.value);
    if (error !== undefined) throw new Error(error);
    return rest;
  }

  #start() {
    const [program, ...args] = this.#command;
    const child = spawn(program, args, { stdio: ['pipe', 'pipe', 'inherit'] });
    child.on('error', () => {}); // the reply that does not come says it
    child.stdin.on('error', () => {});
    this.#lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
    this.#child = child;
    alive.add(child);
  }

  stop() {
    if (this.#child === null) return;
    this.#child.kill('SIGKILL');
    alive.delete(this.#child);
    this.#child = null;
  }
}
