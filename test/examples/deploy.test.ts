// The image of examples/server/deploy holds what the server and its workers import, and no more.
import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { expect, test } from 'vitest';
import { ROOT } from '../child';

const SERVER = join(ROOT, 'examples/server');
/** Where processes and threads begin. */
const ENTRIES = ['main.ts', 'engine-thread.ts', 'analysis-thread.ts', 'cluster/main.ts'];

/** The packages that a file and what it imports need at run time. */
function packagesOf(file: string, seen = new Set<string>()): string[] {
  if (seen.has(file)) return [];
  seen.add(file);
  const text = readFileSync(file, 'utf8');
  const imports = text.matchAll(/^(?:import (?!type ).*|\} )from '(.+)';|\brequire\('(.+?)'\)/gm);
  return [...imports].flatMap(([, from, required]) => {
    const name = from ?? required;
    if (name.startsWith('.')) {
      const target = ['', '.ts'].map((end) => join(dirname(file), name + end)).find(existsSync);
      return packagesOf(target!, seen);
    }
    if (name.startsWith('node:') || name === 'node-sdpa') return [];
    return [/^@[^/]+\/[^/]+|^[^/]+/.exec(name)![0]];
  });
}

test('the packages of the image are those that the server and its workers import', () => {
  const wanted = ENTRIES.flatMap((entry) => packagesOf(join(SERVER, entry)));
  wanted.push(...packagesOf(join(SERVER, 'cluster/thread.cjs')));
  const script = join(SERVER, 'deploy/dependencies.mjs');
  const given = JSON.parse(execFileSync(process.execPath, [script], { encoding: 'utf8' }));
  expect(Object.keys(given).sort()).toEqual([...new Set(wanted)].sort());
  for (const version of Object.values(given)) expect(version).toMatch(/^[\^~]\d/);
});
