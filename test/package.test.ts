// The built package as its users load it: import and require, and what it keeps in memory.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import * as library from '../lib/index';
import { ROOT, runProgram } from './child';
import { BACKENDS } from './harness';

test('import and require give the same names, classes and state', async () => {
  const { imported, required, sameTensor, seed } = await runProgram('both');
  expect(required).toEqual(Object.keys(library).sort());
  expect(imported).toEqual(required);
  expect(sameTensor).toBe(true);
  expect(seed).toBe('11');
});

test('SECURITY.md has a review of each runtime dependency, in the version that is locked', () => {
  const read = (name: string) => readFileSync(join(ROOT, name), 'utf8');
  const { packages } = JSON.parse(read('package-lock.json'));
  const shipped = Object.entries<{ dev?: boolean; optional?: boolean; version: string }>(packages)
    .filter(([place, { dev }]) => place !== '' && !dev)
    .map(([place, { version }]) => `${place.replace('node_modules/', '')} ${version}`);
  const reviewed = [...read('SECURITY.md').matchAll(/^\| (\S+ \d+\.\d+\.\d+) \|/gm)];
  expect(reviewed.map(([, name]) => name)).toEqual(shipped);
});

describe.each(BACKENDS)('%s, memory', (backend) => {
  const env = { SDPA_BACKEND: backend };
  const MB = 2 ** 20;

  test('does not grow with the number of calls', async () => {
    const { growth } = await runProgram('memory', { env, args: ['many calls'] });
    expect(growth).toBeLessThan(400 * MB);
  });

  test('grows with the length, not with its square', async () => {
    const { growth } = await runProgram('memory', { env, args: ['long sequences'] });
    expect(growth).toBeLessThan(150 * MB);
  });
});

describe('memory of caches', () => {
  test('a cache that is forgotten gives its blocks back', async () => {
    const { freeBlocks } = await runProgram('caches', {
      args: ['forgotten'],
    });
    expect(freeBlocks).toEqual([0, 8]);
  });

  test('memory counts for the garbage collector, and is given back after dispose', async () => {
    const { bytes, most, kept } = await runProgram('caches', { args: ['disposed'] });
    expect(most).toBeLessThan(15 * bytes); // of 40 caches, one after the other
    expect(kept).toBeLessThan(bytes);
  });
});
