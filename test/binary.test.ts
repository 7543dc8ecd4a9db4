// What the native binary asks of a system, and whether the check of the shipped ones would notice.
import { describe, expect, test } from 'vitest';
import { loadBinding } from '../lib/binding';
import { GLIBC_FLOOR, newerThan, requirementsOf } from '../tools/check-binaries.mjs';

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

  test(`needs nothing newer than glibc ${GLIBC_FLOOR}`, () => {
    expect(newerThan(GLIBC_FLOOR, versions)).toEqual([]);
  });
});
