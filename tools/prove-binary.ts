// After each test file: was the addon that NODE_SDPA_PREBUILD names in use, and no other one?
import { readFileSync } from 'node:fs';
import path from 'node:path';
import { afterAll, expect } from 'vitest';

afterAll(() => {
  const folder = path.resolve(process.env.NODE_SDPA_PREBUILD ?? '');
  const mapped = readFileSync('/proc/self/maps', 'utf8').match(/\/\S+\.node$/gm) ?? [];
  const addons = new Set(mapped.filter((file) => file.endsWith('node_sdpa.node')));
  expect([...addons], 'the addons in this process').toEqual([
    path.join(folder, 'build/Release/node_sdpa.node'),
  ]);
});
