// Serves the model that `npm run train` left.
//
//   npm run serve -- [options]
//     --model FILE     (default: out/gpt.safetensors)
//     --host ADDRESS   (127.0.0.1)
//     --port NUMBER    (8080; 0 takes a free one)
//     --batch COUNT    texts that are written at once (16)
//     --blocks COUNT   of the cache, 64 positions of one layer each (default: what the batch needs)
//     --waiting COUNT  texts that wait while the batch is full (64)
//     --redis ADDRESS  of the cluster that computes uncertainty (the variable REDIS_URL; without
//                      either this machine does; see cluster/README.md)
//     --log LEVEL      trace, debug, info, warn, error or silent (warn)
import { existsSync } from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { CHECKPOINT, readCount, runCommand } from '../gpt/command';
import { UsageError } from '../gpt/text';
import { createServer } from './server';

runCommand(async () => {
  const { values: given } = parseArgs({
    options: {
      model: { type: 'string', default: CHECKPOINT },
      host: { type: 'string', default: '127.0.0.1' },
      port: { type: 'string', default: '8080' },
      batch: { type: 'string', default: '16' },
      blocks: { type: 'string' },
      waiting: { type: 'string', default: '64' },
      redis: { type: 'string', default: process.env.REDIS_URL },
      log: { type: 'string', default: 'warn' },
    },
  });
  const checkpoint = path.resolve(process.env.INIT_CWD ?? '', given.model);
  if (!existsSync(checkpoint)) {
    throw new UsageError(`${checkpoint} is not there yet: npm run train makes it`);
  }
  const app = await createServer({
    checkpoint,
    batch: readCount('batch', given.batch, 1, 1024),
    blocks: given.blocks === undefined ? undefined : readCount('blocks', given.blocks, 1),
    limits: { waiting: readCount('waiting', given.waiting, 0) },
    redis: given.redis,
    logLevel: given.log,
  });
  const port = readCount('port', given.port, 0, 65_535);
  console.log(`Listening on ${await app.listen({ host: given.host, port })}`);
  const stop = async () => {
    console.log('Stopping: no new requests; those accepted are finished.');
    await app.close();
    console.log('Stopped.');
  };
  process.once('SIGTERM', stop).once('SIGINT', stop); // a second one ends the process at once
});
