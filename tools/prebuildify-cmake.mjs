#!/usr/bin/env node
// Lets prebuildify package the CMake build: prebuildify runs this as it would run node-gyp, in the
// folder to build in. Of its arguments none concerns a build that is for every version of Node.
import { buildWithCmake } from './build-native.mjs';

const { SDPA_TOOLCHAIN: toolchain, SDPA_CUDA: cuda } = process.env;
const settings = toolchain ? [`CMAKE_TOOLCHAIN_FILE=${toolchain}`] : [];
if (cuda) settings.push(`SDPA_CUDA=${cuda}`); // the plugin is left beside the addon, and taken too
const build = buildWithCmake(process.cwd(), settings);
if (!build.ok) console.error(build.output);
process.exit(build.status);
