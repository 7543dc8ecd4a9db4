// Reads vitest's JSON reports named on the command line, prints one closing line for all, and
// fails if of the first one, the whole suite, a test was skipped or a test file gave no test.
import { readdirSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { root } from './build-native.mjs';

const [main, ...others] = process.argv
  .slice(2)
  .map((file) => JSON.parse(readFileSync(file, 'utf8')));
const counts = { passed: 0, failed: 0, skipped: main.numPendingTests + main.numTodoTests };
for (const report of [main, ...others]) {
  counts.passed += report.numPassedTests;
  counts.failed += report.numFailedTests + report.numFailedTestSuites;
}

/** @type {{name: string, assertionResults: unknown[]}[]} */
const results = main.testResults;
const ran = new Set(
  results.filter((file) => file.assertionResults.length).map((file) => file.name),
);
const present = readdirSync(path.join(root, 'test'), { recursive: true, encoding: 'utf8' })
  .filter((name) => name.endsWith('.test.ts'))
  .map((name) => path.join(root, 'test', name));
const silent = present.filter((file) => !ran.has(file));
if (silent.length > 0) console.error(`These gave no test:\n  ${silent.join('\n  ')}`);
console.log(`${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped`);
process.exit(silent.length || counts.failed || counts.skipped || !counts.passed ? 1 : 0);
