// The short form of `npm run soak`, and that it would notice a leak.
import { expect, test } from 'vitest';
import { runNode } from './child';

const soak = (...more: string[]) =>
  runNode({ args: ['--expose-gc', 'tools/soak/main.mjs', '--calls', '12000', ...more] });

test('12,000 calls of all kinds: memory, handles, files and threads are flat', async () => {
  const { status, signal, stdout, stderr } = await soak();
  expect({ status, signal }, stdout + stderr).toEqual({ status: 0, signal: null });
  expect(stdout.match(/: flat$/gm)).toHaveLength(6);
});

test('calls whose results are kept are not', async () => {
  const { status, stdout } = await soak('--leak');
  expect(status).toBe(1);
  expect(stdout).toMatch(/^rss .*GROWS$/m);
});
