#!/usr/bin/env node
// Lets prebuildify package the CMake build: prebuildify runs this as it would run node-gyp, in the
// folder to build in. Of its arguments none concerns a build that is for every version of Node.
import { buildWithCmake } from './build-native.mjs';

const toolchain = process.env.SDPA_TOOLCHAIN;
const build = buildWithCmake(process.cwd(), toolchain ? [`CMAKE_TOOLCHAIN_FILE=${toolchain}`] : []);
if (!build.ok) console.error(build.output);
process.exit(build.status);
