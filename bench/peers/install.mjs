// The packages that the benchmark compares with: installed on first use, apart from all others.
import { createRequire } from 'node:module';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { installApart } from '../../tools/install-apart.mjs';

/** Does nothing where what the lockfile names is there; gives the folder of the packages. */
export function installPeers() {
  return installApart(fileURLToPath(new URL('peers', import.meta.url)));
}

/** An installed package. @param {string} name @returns {any} */
export function loadPeer(name) {
  return createRequire(installPeers() + path.sep)(name);
}
