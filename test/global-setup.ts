// Before any test: dist/ is there and not older than lib/, for the tests that run child processes.
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const ROOT = fileURLToPath(new URL('..', import.meta.url));

export default function setup(): void {
  const built = join(ROOT, 'dist/index.js');
  const sources = readdirSync(join(ROOT, 'lib')).map((name) => join(ROOT, 'lib', name));
  const newest = Math.max(...sources.map((file) => statSync(file).mtimeMs));
  if (existsSync(built) && statSync(built).mtimeMs >= newest) return;
  const compiler = join(ROOT, 'node_modules/typescript/bin/tsc');
  const result = spawnSync(process.execPath, [compiler], { cwd: ROOT, encoding: 'utf8' });
  if (result.status !== 0) throw new Error(`dist/ does not build:\n${result.stdout}`);
}
