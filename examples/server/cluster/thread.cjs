// Where a thread of this folder begins: Node 20 takes no TypeScript there.
// @ts-expect-error: it has no types
require('tsx/cjs');
module.exports = require('./thread.ts');
