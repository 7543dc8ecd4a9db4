// A stream of JSON, line by line (NDJSON), to one client.
import { Readable } from 'node:stream';

/** Lines that come so close together leave in one piece: each costs a write to the socket. */
const GATHER_MS = 10;

export class Lines {
  readonly stream: Readable;
  #gathered = '';
  #timer: NodeJS.Timeout | undefined;

  constructor() {
    this.stream = new Readable({
      read() {},
      destroy: (error, callback) => {
        clearTimeout(this.#timer);
        callback(error);
      },
    });
  }

  send(line: object): void {
    this.#gathered += `${JSON.stringify(line)}\n`;
    this.#timer ??= setTimeout(() => this.#flush(), GATHER_MS);
  }

  end(): void {
    clearTimeout(this.#timer);
    this.#flush();
    this.stream.push(null);
  }

  #flush(): void {
    this.#timer = undefined;
    if (!this.stream.destroyed) this.stream.push(this.#gathered);
    this.#gathered = '';
  }
}
