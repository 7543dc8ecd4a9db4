// Runs the tests of backends on a GPU, where there is nothing but Node: tools/gpu-bundle.mjs packs
// this file, the tests, all that they import, and the binaries.
//
//   node dist/tests.cjs [--only TEXT]... [--list]
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { backendInfo } from '../../lib/index';
import { files } from './vitest';

const { values } = parseArgs({
  options: { only: { type: 'string', multiple: true }, list: { type: 'boolean' } },
});
process.env.SDPA_CONFORMANCE ??= join(__dirname, '../conformance');

/** Says in one line where there is none. */
export function hasGpu(): boolean {
  const cuda = backendInfo().tried.find(({ backend }) => backend === 'cuda');
  if (!cuda?.ok) console.log(`skipped: there is no GPU to test (${cuda?.reason})`);
  return cuda?.ok === true;
}

/** Runs the tests of all files that have been loaded. */
export async function runFiles(): Promise<void> {
  for (const { backend, name, memoryBytes } of backendInfo().gpus) {
    console.log(`${backend}: ${name}, ${(memoryBytes / 2 ** 30).toFixed(0)} GiB`);
  }
  let passed = 0;
  const failed: string[] = [];
  for (const [file, tests] of files) {
    const start = performance.now();
    const before = passed;
    for (const { name, run } of tests) {
      const full = `${file}: ${name}`;
      const isWanted = values.only?.some((text) => full.includes(text)) ?? true;
      if (!isWanted && name !== '') continue;
      if (values.list) {
        console.log(full);
        continue;
      }
      try {
        await run();
        if (name !== '') passed++;
      } catch (error) {
        failed.push(full);
        console.log(`FAILED ${full}\n${(error as Error).stack}`);
      }
    }
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    console.log(`${file}: ${passed - before} passed, ${seconds} s`);
  }
  console.log(`${passed} passed, ${failed.length} failed`);
  if (failed.length > 0 || (passed === 0 && !values.list)) process.exitCode = 1;
}
