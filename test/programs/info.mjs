// Prints what was loaded and what a call and its mask gave: run with environment variables set.
import { attentionForwardSync, backendInfo } from 'node-sdpa';
import { DROPOUT, fingerprint, makeInputs } from './inputs.mjs';

const { backend, output } = attentionForwardSync(...makeInputs([1, 2, 33, 16]), DROPOUT);
const info = backendInfo();
const values = Array.from(output.data);
const result = { info, backend, values, hash: fingerprint(output) };
process.stdout.write(JSON.stringify(result));
