// What the native binary asks of a system, how it is hardened and where it is looked for; and
// whether the check of the shipped ones would notice.
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { buildSync } from 'esbuild';
import { describe, expect, test } from 'vitest';
import { loadBinding } from '../lib/binding';
import { GLIBC_FLOOR, newerThan, requirementsOf, weaknessesOf } from '../tools/check-binaries.mjs';
import { ROOT, runNode } from './child';

test('versions are compared as versions, and libstdc++ is never taken from the system', () => {
  const versions = ['GLIBC_2.2.5', 'GLIBC_2.9', 'GLIBC_2.28', 'GLIBC_2.34', 'GLIBCXX_3.4'];
  expect(newerThan('2.28', versions)).toEqual(['GLIBC_2.34', 'GLIBCXX_3.4']);
});

describe.runIf(process.platform === 'linux')('this binary', () => {
  const { libraries, versions } = requirementsOf(loadBinding().path!, 'glibc');

  test('is read', () => {
    expect(libraries).toContain('libc.so.6');
    expect(newerThan('2.0', versions)).not.toEqual([]);
  });

  test('is hardened, and one that is built without our flags is not', () => {
    expect(weaknessesOf(loadBinding().path!)).toEqual([]);
    const folder = mkdtempSync(join(tmpdir(), 'node-sdpa-weak-'));
    try {
      const weak = join(folder, 'weak.so');
      const lax = ['-Wl,-z,norelro', '-Wl,-z,lazy', '-Wl,-z,execstack', '-Wl,-rpath,/tmp'];
      const flags = ['-shared', '-fPIC', '-fno-stack-protector', ...lax, '-x', 'c', '-'];
      const input =
        'void leak(char* to) { char own[64]; for (int i = 0; i < 64; i++) own[i] = to[i]; }';
      expect(spawnSync('cc', [...flags, '-o', weak], { input }).status).toBe(0);
      const found = weaknessesOf(weak).join('; ');
      for (const what of ['RELRO', 'BIND_NOW', 'executable', 'search path', 'guard', 'leak']) {
        expect(found).toContain(what);
      }
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  test('is not to be had from the current folder, nor is another in its place', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'node-sdpa-cwd-'));
    try {
      // What a search from here would find: a binary of a package of our name, and a prebuild.
      const trap = 'not a binary';
      const places = ['build/Release', 'node_modules/node-sdpa/build/Release', 'build/Debug'];
      for (const place of [...places, `prebuilds/${process.platform}-${process.arch}`]) {
        mkdirSync(join(folder, place), { recursive: true });
        writeFileSync(join(folder, place, 'node-sdpa.node'), trap);
      }
      writeFileSync(join(folder, 'package.json'), '{ "name": "node-sdpa" }');
      const cwd = join(folder, 'prebuilds');
      const code = `console.log(require(${JSON.stringify(ROOT)}).backendInfo().binary)`;
      const env = { LD_LIBRARY_PATH: folder, NODE_PATH: join(folder, 'node_modules') };
      const { stdout, stderr } = await runNode({ args: ['-e', code], cwd, env });
      expect(stdout.trim(), stderr).toBe(loadBinding().path);

      // A bundle for ES modules does not know its own folder; its program's is the next best.
      const app = mkdtempSync(join(tmpdir(), 'node-sdpa-app-'));
      const bundle = join(app, 'bundle.mjs');
      buildSync({
        stdin: {
          contents:
            "import { backendInfo } from './dist/index.js'; console.log(JSON.stringify(backendInfo()));",
          resolveDir: ROOT,
        },
        bundle: true,
        format: 'esm',
        platform: 'node',
        banner: {
          js: "import { createRequire } from 'node:module'; const require = createRequire(import.meta.url);",
        },
        outfile: bundle,
        logLevel: 'silent',
      });
      const bundled = await runNode({ args: [bundle], cwd: join(folder, 'prebuilds') });
      rmSync(app, { recursive: true });
      expect(bundled.status, bundled.stderr).toBe(0);
      // Beside the program there is none: it computes in JavaScript, and says where it has looked.
      const { selected, binary, tried } = JSON.parse(bundled.stdout);
      expect({ selected, binary }).toEqual({ selected: 'js', binary: null });
      expect(JSON.stringify(tried)).toContain(join(app, 'prebuilds'));
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  test(`needs nothing newer than glibc ${GLIBC_FLOOR}`, () => {
    expect(newerThan(GLIBC_FLOOR, versions)).toEqual([]);
  });
});
