// The package through import and through require in one process: one copy of classes and state.
import { createRequire } from 'node:module';
import * as imported from 'node-sdpa';

// What Node adds to the namespace of a CommonJS module.
const NOT_NAMES = ['default', 'module.exports', '__esModule'];
const required = createRequire(import.meta.url)('node-sdpa');
const names = Object.keys(required).sort();
const tensor = new required.Tensor('float32', new Float32Array(1), [1, 1, 1, 1]);
required.manualSeed(11);
const { rngState } = imported.attentionForwardSync(tensor, tensor, tensor, {
  dropoutP: 0.5,
  training: true,
});
process.stdout.write(
  JSON.stringify({
    imported: Object.keys(imported)
      .filter((name) => !NOT_NAMES.includes(name))
      .sort(),
    required: names,
    sameTensor: imported.Tensor === required.Tensor,
    seed: String(rngState?.seed),
  }),
);
