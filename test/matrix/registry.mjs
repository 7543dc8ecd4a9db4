// A package registry on the loopback interface that has this package, its one dependency, and
// nothing else.
import { spawn } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { root, run } from '../../tools/build-native.mjs';

/**
 * Starts verdaccio and publishes the tarball.
 * @param {{folder: string, node: string, modules: string, tarball: string}} options
 */
export async function startRegistry({ folder, node, modules, tarball }) {
  mkdirSync(folder, { recursive: true });
  const config = path.join(folder, 'config.yaml');
  writeFileSync(
    config,
    `storage: ${folder}/storage
auth: { htpasswd: { file: ${folder}/htpasswd } }
uplinks: {}
packages: { '**': { access: $all, publish: $anonymous } }
log: { type: stdout, level: error }
max_body_size: 50mb
web: { enable: false }
`,
  );
  const host = `127.0.0.1:${await freePort()}`;
  const program = path.join(modules, 'verdaccio/bin/verdaccio');
  const server = spawn(node, [program, '--config', config, '--listen', host], {
    stdio: 'inherit',
    env: { ...process.env, NODE_NO_WARNINGS: '1' }, // of being root
  });
  const url = `http://${host}/`;
  try {
    await waitFor(`${url}-/ping`);
    const npmrc = path.join(folder, '.npmrc');
    writeFileSync(npmrc, `registry=${url}\n//${host}/:_authToken=anyone\n`);
    for (const what of [tarball, path.join(root, 'node_modules/node-gyp-build')]) {
      const npm = path.join(modules, 'npm11/bin/npm-cli.js');
      const args = [npm, 'publish', what, '--userconfig', npmrc, '--ignore-scripts'];
      const { ok, output } = run(node, args, { cwd: folder });
      if (!ok) throw new Error(output);
    }
  } catch (error) {
    server.kill();
    throw error;
  }
  return { url, stop: () => server.kill() };
}

/** @returns {Promise<number>} */
function freePort() {
  return new Promise((resolve) => {
    const server = createServer().listen(0, '127.0.0.1', () => {
      const { port } = /** @type {import('node:net').AddressInfo} */ (server.address());
      server.close(() => resolve(port));
    });
  });
}

/** @param {string} url */
async function waitFor(url) {
  const end = Date.now() + 60_000;
  for (;;) {
    try {
      if ((await fetch(url)).ok) return;
    } catch {}
    if (Date.now() > end) throw new Error(`${url} does not answer`);
    await sleep(200);
  }
}
