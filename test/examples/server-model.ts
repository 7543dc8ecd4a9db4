// A small model in a checkpoint, and a server on it, for the tests of examples/server.
import { mkdtempSync, rmSync } from 'node:fs';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { save } from '../../examples/gpt/checkpoint';
import { readBook, splitText } from '../../examples/gpt/text';
import { Trainer } from '../../examples/gpt/trainer';
import { createServer, type ServerOptions } from '../../examples/server/server';

export const SIZES = { layers: 2, heads: 2, width: 16, length: 96 };

/** Trains for a moment; returns the checkpoint, and what removes it. */
export function createCheckpoint(): { file: string; remove: () => void } {
  const { title, text } = readBook();
  const trainer = new Trainer(
    {
      model: SIZES,
      ...{ batch: 2, steps: 5, rate: 0.01, warmup: 1, weightDecay: 0, clip: 1, seed: 1 },
      dropout: { placement: 'none', p: 0 },
    },
    splitText({ title, text: text.slice(0, 5000) }, 0.2, 5000, SIZES.length),
  );
  for (let i = 0; i < 5; i++) trainer.trainStep();
  const folder = mkdtempSync(join(tmpdir(), 'node-sdpa-server-'));
  const file = join(folder, 'model.safetensors');
  save(file, trainer);
  return { file, remove: () => rmSync(folder, { recursive: true }) };
}

/** A server on a free port, and its address. */
export async function serve(options: ServerOptions) {
  const app = await createServer({ logLevel: 'silent', ...options });
  await app.listen({ host: '127.0.0.1', port: 0 });
  const { port } = app.server.address() as AddressInfo;
  return { app, port, url: `http://127.0.0.1:${port}` };
}
