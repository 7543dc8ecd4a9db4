// What the test files use of vitest, in a few lines, for machines with a GPU and nothing but Node:
// describe and test run their bodies in order, and `expect` is vitest's own.
import {
  ASYMMETRIC_MATCHERS_OBJECT,
  customMatchers,
  GLOBAL_EXPECT,
  getState,
  JestAsymmetricMatchers,
  JestChaiExpect,
  JestExtend,
  setState,
} from '@vitest/expect';
import * as chai from 'chai';

type Body = (...values: never[]) => unknown;
interface Test {
  readonly name: string;
  readonly run: () => unknown;
}

/** What files have registered, by their names. */
export const files = new Map<string, Test[]>();
let current: Test[] = [];
const path: string[] = [];

/** Names the file whose tests are registered from now on. */
export function startFile(name: string): void {
  current = [];
  files.set(name, current);
}

function withEach<T>(register: (name: string, body: Body) => T) {
  const each = (rows: readonly unknown[]) => (name: string, body: Body) => {
    for (const row of rows) {
      const values = (Array.isArray(row) ? row : [row]) as never[];
      register(label(name, row, values), () => body(...values));
    }
  };
  return Object.assign(register, { each });
}

/** A title with its %s or $name filled in. */
function label(name: string, row: unknown, values: unknown[]): string {
  let next = 0;
  return name
    .replace(/%[sdio]/g, () => String(values[next++]))
    .replace(/\$(\w+)/g, (_, key) => String((row as Record<string, unknown>)[key]));
}

export const describe = withEach((name, body) => {
  path.push(name);
  body();
  path.pop();
});
export const test = withEach((name, body) => {
  current.push({ name: [...path, name].join(' > '), run: body as () => unknown });
});
export const beforeAll = (run: () => unknown) => current.push({ name: '', run });
export const afterAll = beforeAll; // files register theirs behind or before all of their tests

chai.use(JestExtend);
chai.use(JestChaiExpect);
chai.use(JestAsymmetricMatchers);
export const expect = ((value: unknown, message?: string) =>
  chai.expect(value, message)) as never as typeof import('vitest').expect;
Object.assign(expect, chai.expect);
Object.assign(expect, Reflect.get(globalThis, ASYMMETRIC_MATCHERS_OBJECT));
Reflect.set(globalThis, GLOBAL_EXPECT, expect);
setState({ ...getState(expect), assertionCalls: 0 }, expect);
(chai.expect as never as { extend(...args: unknown[]): void }).extend(expect, customMatchers);
