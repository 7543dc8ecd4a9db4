// npx node-sdpa info: what computes on this machine, and why. For people, and for reports of bugs.
import { arch, availableParallelism, cpus, platform, release } from 'node:os';
import { parseArgs } from 'node:util';
import { backendInfo } from 'node-sdpa';

parseArgs({ options: {} }); // there are none

const info = backendInfo();
const { binary, selected, threads, tried, version } = info;
const { node, v8, napi, bun, deno } = process.versions;
const runtime = bun ? `Bun ${bun}` : deno ? `Deno ${deno}` : `Node.js ${node}`;
const environment = Object.entries(process.env).filter(([name]) => /^(NODE_)?SDPA_/.test(name));
const cuda = tried.find(({ backend }) => backend === 'cuda');

print('node-sdpa', version);
print('runtime', `${runtime} (V8 ${v8}, Node-API ${napi})`);
print('system', `${platform()} ${arch()} ${release()}, ${describeLibc()}`);
print('processor', `${cpus()[0]?.model ?? 'unknown'}, ${availableParallelism()} usable cores`);
print('GPU', cuda?.ok ? 'used' : `not used (${cuda?.reason})`);
print('binary', binary ?? 'none');
print('computes', `${selected}, up to ${threads} thread${threads > 1 ? 's' : ''} a call`);
for (const [name, value] of environment) print(name, String(value));
console.log('\nbackends, best first:');
for (const { backend, ok, code, reason } of tried) {
  print(`  ${backend}`, ok ? 'can run' : `${code}: ${reason}`);
}

/** @param {string} name @param {string} value */
function print(name, value) {
  console.log(`${name.padEnd(16)} ${value}`);
}

function describeLibc() {
  if (platform() !== 'linux') return 'system C library';
  const report = /** @type {any} */ (process.report?.getReport());
  const version = report?.header?.glibcVersionRuntime;
  return version ? `glibc ${version}` : 'musl';
}
