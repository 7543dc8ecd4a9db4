// Every example of the documentation runs, as a user would paste it; every public name has one.
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { ROOT, runNode } from './child';

interface Example {
  name: string;
  code: string;
}

const sources = readdirSync(join(ROOT, 'lib'))
  .filter((file) => file.endsWith('.ts'))
  .map((file) => ({ file, text: readFileSync(join(ROOT, 'lib', file), 'utf8') }));

const FENCE = /```(?:js|ts|javascript|typescript)\n([\s\S]*?)```/g;

/** The blocks after each `@example` of a comment, with the line where they begin. */
function examplesOf(file: string, text: string): Example[] {
  const found: Example[] = [];
  for (const comment of text.matchAll(/\/\*\*[\s\S]*?\*\//g)) {
    const line = text.slice(0, comment.index).split('\n').length;
    const plain = comment[0].replace(/^\s*\* ?/gm, '').replace(/\*\/$/, '');
    for (const [i, section] of plain.split('@example').slice(1).entries()) {
      for (const [, code] of section.matchAll(FENCE)) {
        found.push({ name: `lib/${file}:${line} example ${i + 1}`, code });
      }
    }
  }
  return found;
}

function readmeExamples(): Example[] {
  const file = join(ROOT, 'README.md');
  const text = existsSync(file) ? readFileSync(file, 'utf8') : '';
  return [...text.matchAll(FENCE)]
    .filter(([, code]) =>
      /from 'node-sdpa'|import\('node-sdpa'\)|require\('node-sdpa'\)/.test(code),
    )
    .map(({ index, 1: code }) => ({
      name: `README.md:${text.slice(0, index).split('\n').length}`,
      code,
    }));
}

const tsdoc = sources.flatMap(({ file, text }) => examplesOf(file, text));
const readme = readmeExamples();

test('examples are found', () => {
  expect(existsSync(join(ROOT, 'dist/index.mjs'))).toBe(true);
  expect(tsdoc.length).toBeGreaterThan(20);
  expect(readme.length).toBeGreaterThan(0);
});

describe('every example runs', () => {
  test.concurrent.each([...tsdoc, ...readme])('$name', async ({ code }) => {
    const kind = /\brequire\('node-sdpa'\)/.test(code) ? 'commonjs' : 'module';
    const finished = await runNode({ args: [`--input-type=${kind}`, '-'], input: code });
    expect(finished, finished.stderr).toMatchObject({ status: 0, signal: null });
  });
});

describe('every public name has an example', () => {
  const index = readFileSync(join(ROOT, 'lib/index.ts'), 'utf8');
  const names = [...index.matchAll(/export (?:type )?\{([^}]*)\}/g)]
    .flatMap(([, list]) => list.split(','))
    .map((entry) => entry.replace(/^\s*type\s/, '').trim())
    .filter((name) => name !== '');

  test('names are found', () => expect(names.length).toBeGreaterThan(20));

  test.each(names)('%s', (name) => {
    const declaration = new RegExp(
      `^export (?:async )?(?:function|class|interface|type|const) ${name}\\b`,
      'm',
    );
    const home = sources.find(({ text }) => declaration.test(text))!;
    const before = home.text.slice(0, home.text.search(declaration)).trimEnd();
    expect(before.endsWith('*/'), `${name} has a comment`).toBe(true);
    const comment = before.slice(before.lastIndexOf('/**'));
    expect(comment, `${name} in lib/${home.file}`).toContain('@example');
  });
});
