// A worker of a cluster: computes dropout samples for servers that have the same Redis.
//
//   npm run serve:worker -- --redis redis://HOST:PORT [options]
//     --redis ADDRESS  redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE], or rediss:// for TLS;
//                      default: the variable REDIS_URL
//     --model FILE     the server's (default: out/gpt.safetensors)
//     --lock SECONDS   a worker that is not heard of for so long has lost its shard (10)
import { existsSync } from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { CHECKPOINT, readNumber, runCommand } from '../../gpt/command';
import { UsageError } from '../../gpt/text';
import { describe } from './shards';
import { startWorker } from './worker';

runCommand(() => {
  const { values: given } = parseArgs({
    options: {
      redis: { type: 'string', default: process.env.REDIS_URL },
      model: { type: 'string', default: CHECKPOINT },
      lock: { type: 'string', default: '10' },
    },
  });
  if (given.redis === undefined) throw new UsageError('--redis is missing');
  const checkpoint = path.resolve(process.env.INIT_CWD ?? '', given.model);
  if (!existsSync(checkpoint)) {
    throw new UsageError(`${checkpoint} is not there yet: npm run train makes it`);
  }
  const lockMs = 1000 * readNumber('lock', given.lock, 0.5, 3600);
  const worker = startWorker({ checkpoint, redis: given.redis, lockMs, log: console.log });
  console.log(`Computing for ${describe(worker.identity)}`);
  const stop = async () => {
    console.log('Stopping after this shard.');
    await worker.close();
    process.exit();
  };
  process.once('SIGTERM', stop).once('SIGINT', stop); // a second one ends the process at once
});
