// The process ends while calls run, in the way that the first argument names.
import { attentionForward, scaledDotProductAttention } from 'node-sdpa';
import { DROPOUT, makeInputs, makeTensor } from './inputs.mjs';

/** @type {[number, number, number, number]} */
const DIMS = [1, 8, 512, 64];
const inputs = makeInputs(DIMS);
const result = await attentionForward(...makeInputs([1, 8, 64, 64]), DROPOUT);
for (let i = 0; i < 8; i++) void scaledDotProductAttention(...inputs, DROPOUT);
void result.backward(makeTensor([1, 8, 64, 64], 307));

switch (process.argv[2]) {
  case 'exit':
    setTimeout(() => process.exit(7), 5);
    break;
  case 'exit at once':
    process.exit(7);
    break;
  case 'throw':
    setTimeout(() => {
      throw new Error('thrown on purpose');
    }, 5);
    break;
  case 'wait':
    // Nothing else keeps the process alive: it ends once the calls are done, with status 0.
    break;
}
