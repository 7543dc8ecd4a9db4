// No thread can be made: first for the addon alone, by faults.c; with the argument 'limit' by the
// system itself, for this user (RLIMIT_NPROC).
import { spawnSync } from 'node:child_process';
import { scaledDotProductAttention, scaledDotProductAttentionSync, setNumThreads } from 'node-sdpa';
import { fingerprint, makeInputs } from '../inputs.mjs';
import { get, set, watchAddon } from './faults.mjs';

const byLimit = process.argv[2] === 'limit';
const inputs = makeInputs([1, 8, 256, 64]);
watchAddon();
setNumThreads(4);

/** @param {boolean} refuse */
function setRefused(refuse) {
  if (!byLimit) return set('refuseThreads', refuse ? 1 : 0);
  const limit = ['--pid', `${process.pid}`, `--nproc=${refuse ? 1 : 1000}:1000`];
  const { status, stderr } = spawnSync('prlimit', limit, { encoding: 'utf8' });
  if (status !== 0) throw new Error(`prlimit: ${stderr}`);
}

setRefused(true);
const sync = fingerprint(scaledDotProductAttentionSync(...inputs));
const codes = await Promise.all(
  [1, 2, 3].map(() => scaledDotProductAttention(...inputs).catch((error) => error.code)),
);
const threadsThen = get('threads');
if (byLimit) process.stdout.write(JSON.stringify({ sync, codes, uid: process.getuid?.() }));
else {
  setRefused(false);
  const later = fingerprint(await scaledDotProductAttention(...inputs));
  process.stdout.write(
    JSON.stringify({ sync, codes, threadsThen, later, threads: get('threads') }),
  );
}
