// A Redis, hosts with a network of their own, and workers on them, for the tests of
// examples/server/cluster.
import { type ChildProcess, execFileSync, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { connect, createServer } from 'node:net';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { ROOT } from '../child';

const PASSWORD = 'open sesame';

export function hasRedis(): boolean {
  return spawnSync('redis-server', ['--version']).status === 0;
}

/** Waits until something is so. */
export async function until(isSo: () => Promise<boolean> | boolean, seconds = 15): Promise<void> {
  for (const end = Date.now() + 1000 * seconds; Date.now() < end; await sleep(5)) {
    if (await isSo()) return;
  }
  throw new Error(`not so in ${seconds} s: ${isSo}`);
}

/** Processes run on it by `command`, and reach the test's machine at `address`. */
export interface Host {
  readonly command: readonly string[];
  readonly address: string;
  /** Cuts its network off, or mends it; absent where the host is only another process. */
  readonly setLink?: (state: 'up' | 'down') => void;
}

/**
 * Two hosts, each a network namespace with a cable to this one; processes of this machine where
 * that is not allowed.
 */
export function createHosts(): { hosts: Host[]; isApart: boolean; remove: () => void } {
  const ip = (...args: string[]) => execFileSync('ip', args, { stdio: ['ignore', 'pipe', 'pipe'] });
  const names = [0, 1].map((i) => `sdpa${process.pid}-${i}`);
  const remove = () => {
    for (const name of names) spawnSync('ip', ['netns', 'del', name]); // its cable goes with it
  };
  try {
    const hosts = names.map((name, i) => {
      // Of the range for tests between networks (RFC 2544)
      const network = `198.${18 + ((process.pid >> 8) % 2)}.${process.pid % 256}`;
      const [here, there] = [1, 2].map((end) => `${network}.${4 * i + end}`);
      ip('netns', 'add', name);
      ip('link', 'add', name, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', name);
      ip('addr', 'add', `${here}/30`, 'dev', name);
      ip('link', 'set', name, 'up');
      ip('-n', name, 'addr', 'add', `${there}/30`, 'dev', 'eth0');
      ip('-n', name, 'link', 'set', 'eth0', 'up');
      return {
        command: ['ip', 'netns', 'exec', name],
        address: here,
        setLink: (state: 'up' | 'down') => void ip('link', 'set', name, state),
      };
    });
    return { hosts, isApart: true, remove };
  } catch {
    remove();
    const here = { command: [], address: '127.0.0.1' };
    return { hosts: [here, here], isApart: false, remove: () => {} };
  }
}

/** A Redis that forgets everything when it ends. */
export class Redis {
  readonly #addresses: readonly string[];
  #port = 0;
  #process: ChildProcess | undefined;

  constructor(hosts: readonly Host[]) {
    this.#addresses = [...new Set(['127.0.0.1', ...hosts.map(({ address }) => address)])];
  }

  /** For a process of a host, or of the test's. */
  url(address = '127.0.0.1'): string {
    return `redis://:${encodeURIComponent(PASSWORD)}@${address}:${this.#port}`;
  }

  /** On the port that it had before; does nothing where it runs. */
  async start(): Promise<void> {
    if (this.#process !== undefined) return;
    this.#port ||= await freePort();
    const options = { port: `${this.#port}`, requirepass: PASSWORD, save: '', appendonly: 'no' };
    const args = Object.entries(options).flatMap(([name, value]) => [`--${name}`, value]);
    this.#process = spawn('redis-server', [...args, '--bind', ...this.#addresses], {
      stdio: 'ignore',
    });
    await until(() => this.#answers());
  }

  async stop(): Promise<void> {
    const running = this.#process;
    this.#process = undefined;
    if (running?.kill()) await once(running, 'exit');
  }

  #answers(): Promise<boolean> {
    return new Promise((resolve) => {
      const socket = connect(this.#port, '127.0.0.1');
      socket.on('connect', () => resolve(true)).on('error', () => resolve(false));
      socket.on('connect', () => socket.destroy());
    });
  }
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as { port: number };
  server.close();
  await once(server, 'close');
  return port;
}

/** A worker in a process of its own. */
export class WorkerProcess {
  output = '';
  readonly #process: ChildProcess;

  constructor(
    redis: Redis,
    readonly host: Host,
    checkpoint: string,
    env: Record<string, string> = {},
  ) {
    const program = join(ROOT, 'examples/server/cluster/main.ts');
    const options = ['--redis', redis.url(host.address), '--model', checkpoint, '--lock', '1'];
    const command = [...host.command, process.execPath, '--import', 'tsx', program, ...options];
    this.#process = spawn(command[0], command.slice(1), {
      cwd: ROOT,
      env: { ...process.env, SDPA_NUM_THREADS: '1', ...env },
    });
    for (const stream of [this.#process.stdout, this.#process.stderr]) {
      stream?.setEncoding('utf8').on('data', (text) => {
        this.output += text;
      });
    }
  }

  /** As Redis has it with the shards that a worker has taken. */
  get pid(): number | undefined {
    return this.#process.pid;
  }

  /** How many shards it has finished. */
  get shards(): number {
    return this.output.match(/: \d+ from \d+ on$/gm)?.length ?? 0;
  }

  ready(): Promise<void> {
    return until(() => this.output.includes('Redis is there'));
  }

  signal(name: NodeJS.Signals): void {
    this.#process.kill(name);
  }

  /** @returns its exit status */
  async stop(name: NodeJS.Signals = 'SIGTERM'): Promise<number | null> {
    if (this.#process.exitCode === null && this.#process.signalCode === null) {
      this.#process.kill(name);
      await once(this.#process, 'exit');
    }
    return this.#process.exitCode;
  }
}
