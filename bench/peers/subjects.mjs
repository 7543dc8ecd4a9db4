// What is compared: each library in each form and setting that can compute a case.
import { spawnSync } from 'node:child_process';
import { platform } from 'node:os';
import { fileURLToPath } from 'node:url';
import { backendInfo } from 'node-sdpa';
import { countFlops } from '../cases.mjs';
import { FORMS, fits } from './onnx-models.mjs';

/** @typedef {import('../cases.mjs').Case} Case */
/** @typedef {'highest' | 'high' | 'medium'} Precision */
/**
 * @typedef {object} Subject
 * @property {string} library
 * @property {string} setting '' for the usual ones; each has a process of its own
 * @property {string} form a backend, or a way to write attention down
 * @property {Precision} precision
 * @property {number} threads
 * @property {boolean} reusesOutput writes each result into the same array
 */
/** @typedef {Omit<Subject, 'threads' | 'reusesOutput'> & {fits: (c: Case) => boolean}} Kind */

export const OURS = 'node-sdpa';
export const ONNXRUNTIME = 'onnxruntime';
export const TFJS = 'tfjs wasm';
export const PYTORCH = 'PyTorch';
const DENORMALS = 'denormals as zero';

/** Kinds with one thread and few operations a second are left out of larger cases. */
const MOST_FLOPS_OF_SLOW = 20e9;
const isSmall = (/** @type {Case} */ problem) => countFlops(problem) <= MOST_FLOPS_OF_SLOW;
const isForward = (/** @type {Case} */ problem) => !problem.isBackward;
/** Whether memory is measured too: in the longest cases, by what Linux tells of a process. */
export const asksMemory = (/** @type {Case} */ problem) =>
  platform() === 'linux' && problem.keyLength >= 8192 && isForward(problem);

/** The kinds of subject that can run here, this package's best first. @returns {Kind[]} */
export function listKinds() {
  const ours = { library: OURS, setting: '', precision: /** @type {const} */ ('highest') };
  const usable = backendInfo().tried.flatMap(({ backend, ok }) => (ok ? [backend] : []));
  return [
    ...usable.flatMap((form) => {
      const fits = form === 'js' ? isSmall : () => true;
      return precisionsOf(form).map((precision) => ({ ...ours, form, precision, fits }));
    }),
    ...['', DENORMALS].flatMap((setting) =>
      Object.keys(FORMS).map((form) => ({
        ...ours,
        ...{ library: ONNXRUNTIME, setting, form },
        fits: (/** @type {Case} */ problem) => isForward(problem) && fits(form, problem),
      })),
    ),
    {
      ...ours,
      ...{ library: TFJS, form: 'operators' },
      fits: (problem) => isForward(problem) && isSmall(problem),
    },
    { ...ours, library: PYTORCH, form: 'SDPA', fits: () => true },
  ];
}

/** @param {string} backend @returns {Precision[]} those that differ */
function precisionsOf(backend) {
  return backend.endsWith('amx') ? ['highest', 'high', 'medium'] : ['highest'];
}

/** Whether more than one thread can compute. @param {{library: string, form: string}} kind */
export function isThreaded({ library, form }) {
  return library !== TFJS && form !== 'js';
}

/**
 * Says all about a subject but its number of threads.
 * @param {Pick<Subject, 'library' | 'setting' | 'form' | 'precision'>} subject
 */
export function nameSubject({ library, setting, form, precision }) {
  const more = [precision === 'highest' ? '' : precision, setting].filter(Boolean);
  return `${library} ${form}${more.length > 0 ? ` (${more.join(', ')})` : ''}`;
}

/**
 * The command of a library's process; null where the library is not there.
 * @param {string} library
 * @returns {string[] | null}
 */
export function commandOf(library) {
  if (library === PYTORCH) {
    const python = findPython();
    return python === null ? null : [python, filePath('torch_child.py')];
  }
  const module = library === TFJS ? 'tfjs' : library;
  return [process.execPath, '--expose-gc', filePath('child.mjs'), `./${module}`];
}

/** A Python that can import torch: TORCH_PYTHON, or the one on the path. */
function findPython() {
  const candidates = [process.env.TORCH_PYTHON, 'python3', 'python'].filter(Boolean);
  const works = (/** @type {string} */ program) =>
    spawnSync(program, ['-c', 'import torch'], { stdio: 'ignore' }).status === 0;
  return candidates.map(String).find(works) ?? null;
}

/** @param {string} name */
function filePath(name) {
  return fileURLToPath(new URL(name, import.meta.url));
}
