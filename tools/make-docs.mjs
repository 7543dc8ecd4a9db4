// Makes the reference pages of the public API out of the comments in lib/, in out/docs. A warning,
// such as a link to nothing or a name without a comment, is an error.
import path from 'node:path';
import { root, run } from './build-native.mjs';
import { installApart } from './install-apart.mjs';

const modules = installApart(path.join(root, 'tools/docs'));
const { status } = run(
  process.execPath,
  [
    path.join(modules, 'typedoc/bin/typedoc'),
    ...['lib/index.ts', '--tsconfig', 'tsconfig.json', '--out', 'out/docs'],
    ...['--treatWarningsAsErrors', '--validation.notDocumented', '--validation.invalidLink'],
    ...['--intentionallyNotExported', 'Float16ArrayLike'], // of runtimes that have it
    ...['--excludeInternal', '--excludePrivate', '--disableSources', '--name', 'node-sdpa'],
  ],
  { print: true },
);
process.exit(status);
