// What bundlers start from.
import * as sdpa from 'node-sdpa';
import { check } from './checks.mjs';

check(sdpa).then((found) => console.log(JSON.stringify(found)));
