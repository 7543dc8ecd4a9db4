// Prints the demo's headings, lines and tables.

const INDENT = '  ';

export const say = {
  /** @param {string} text */
  title(text) {
    console.log(`\n${text}`);
  },
  /** @param {string} text */
  line(text) {
    console.log(INDENT + text);
  },
  gap() {
    console.log();
  },
};

/**
 * @param {string[]} header
 * @param {string[][]} rows
 */
export function printTable(header, rows) {
  const all = [header, ...rows];
  const widths = header.map((_, i) => Math.max(...all.map((row) => row[i]?.length ?? 0)));
  const line = (/** @type {string[]} */ row) =>
    row
      .map((cell, i) => cell.padEnd(widths[i] ?? 0))
      .join('   ')
      .trimEnd();
  say.line(line(header));
  say.line(widths.map((width) => '-'.repeat(width)).join('   '));
  for (const row of rows) say.line(line(row));
}
