// The backends that can compute a call, which of them 'auto' and 'cpu' mean, and how each is run.

import { availableParallelism } from 'node:os';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { wrongWord } from './arguments';
import { debug, loadBinding, type NativeBinding } from './binding';
import { mayPreferGpu, prefersGpu } from './cost-model';
import { deviceName, findGpu, HOST, openCuda, parseDevice } from './cuda';
import { invalidValue, type SdpaError, sdpaError, wrongLocation } from './errors';
import { jsBackward, jsForward, type TaskList } from './js-backend';
import { fillKeepMask } from './js-dropout';
import { readMostBytes } from './memory';
import type { BackwardTensors, ForwardOutputs, Inputs, Problem } from './problem-header';
import { encodeProblem, PROBLEM_FIELDS } from './problem-header';

/** What computes: the same operation everywhere, under the name that results carry. */
export interface Backend {
  readonly name: string;
  forwardSync(problem: Problem, inputs: Inputs, outputs: ForwardOutputs): void;
  backwardSync(problem: Problem, inputs: Inputs, tensors: BackwardTensors): void;
  /** `cancel`: null, or one element that stops the call when it becomes 1 */
  forward(
    problem: Problem,
    inputs: Inputs,
    outputs: ForwardOutputs,
    cancel: Int32Array | null,
  ): Promise<void>;
  backward(
    problem: Problem,
    inputs: Inputs,
    tensors: BackwardTensors,
    cancel: Int32Array | null,
  ): Promise<void>;
  dropoutMask(problem: Problem, mask: Uint8Array): void;
}

/** Synchronous calls share one header: it is read before the call returns. */
const sharedHeader = new Float64Array(PROBLEM_FIELDS.length);

/** One of the native addon's backends: of its list, or a GPU behind that. */
class NativeBackend implements Backend {
  constructor(
    readonly name: string,
    private readonly native: NativeBinding,
    private readonly index: number,
  ) {}

  static ofGpu(native: NativeBinding, device: number): NativeBackend {
    return new NativeBackend(deviceName(device), native, native.backends.length + device);
  }

  forwardSync(problem: Problem, inputs: Inputs, outputs: ForwardOutputs): void {
    this.native.forwardSync(
      encodeProblem(problem, sharedHeader),
      this.index,
      inputs.sequences?.queryStarts ?? null,
      inputs.sequences?.keyStarts ?? null,
      inputs.keyBlocks,
      inputs.query,
      inputs.key,
      inputs.value,
      inputs.mask,
      inputs.keepMask,
      inputs.causalOffsets,
      inputs.kvLengths,
      outputs.output,
      outputs.lse,
      outputs.scores,
      outputs.weights,
      outputs.droppedWeights,
      outputs.mean,
      outputs.variance,
    );
  }

  backwardSync(problem: Problem, inputs: Inputs, tensors: BackwardTensors): void {
    this.native.backwardSync(
      encodeProblem(problem, sharedHeader),
      this.index,
      inputs.sequences?.queryStarts ?? null,
      inputs.sequences?.keyStarts ?? null,
      inputs.keyBlocks,
      inputs.query,
      inputs.key,
      inputs.value,
      inputs.mask,
      inputs.keepMask,
      inputs.causalOffsets,
      inputs.kvLengths,
      tensors.output,
      tensors.lse,
      tensors.gradOutput,
      tensors.gradQuery,
      tensors.gradKey,
      tensors.gradValue,
      tensors.gradMask,
    );
  }

  forward(
    problem: Problem,
    inputs: Inputs,
    outputs: ForwardOutputs,
    cancel: Int32Array | null,
  ): Promise<void> {
    return this.native.forwardAsync(
      cancel,
      encodeProblem(problem),
      this.index,
      inputs.sequences?.queryStarts ?? null,
      inputs.sequences?.keyStarts ?? null,
      inputs.keyBlocks,
      inputs.query,
      inputs.key,
      inputs.value,
      inputs.mask,
      inputs.keepMask,
      inputs.causalOffsets,
      inputs.kvLengths,
      outputs.output,
      outputs.lse,
      outputs.scores,
      outputs.weights,
      outputs.droppedWeights,
      outputs.mean,
      outputs.variance,
    );
  }

  backward(
    problem: Problem,
    inputs: Inputs,
    tensors: BackwardTensors,
    cancel: Int32Array | null,
  ): Promise<void> {
    return this.native.backwardAsync(
      cancel,
      encodeProblem(problem),
      this.index,
      inputs.sequences?.queryStarts ?? null,
      inputs.sequences?.keyStarts ?? null,
      inputs.keyBlocks,
      inputs.query,
      inputs.key,
      inputs.value,
      inputs.mask,
      inputs.keepMask,
      inputs.causalOffsets,
      inputs.kvLengths,
      tensors.output,
      tensors.lse,
      tensors.gradOutput,
      tensors.gradQuery,
      tensors.gradKey,
      tensors.gradValue,
      tensors.gradMask,
    );
  }

  dropoutMask(problem: Problem, mask: Uint8Array): void {
    const device = Math.max(this.index - this.native.backends.length, HOST);
    this.native.dropoutMask(encodeProblem(problem, sharedHeader), device, mask);
  }
}

/** Plain TypeScript, on the calling thread. */
const jsBackend: Backend = {
  name: 'js',
  forwardSync: (problem, inputs, outputs) => runAtOnce(jsForward(problem, inputs, outputs)),
  backwardSync: (problem, inputs, tensors) => runAtOnce(jsBackward(problem, inputs, tensors)),
  forward: (problem, inputs, outputs, cancel) =>
    runInSlices(jsForward(problem, inputs, outputs), cancel),
  backward: (problem, inputs, tensors, cancel) =>
    runInSlices(jsBackward(problem, inputs, tensors), cancel),
  dropoutMask: fillKeepMask,
};

function runAtOnce(tasks: TaskList): void {
  for (let task = 0; task < tasks.count; task++) tasks.run(task);
}

/** How long asynchronous JavaScript computes before it lets the event loop turn. */
const SLICE_MS = 5;

async function runInSlices(tasks: TaskList, cancel: Int32Array | null): Promise<void> {
  let task = 0;
  while (task < tasks.count) {
    await nextTurn();
    if (cancel !== null && cancel[0] !== 0) {
      throw sdpaError('ERR_SDPA_ABORTED', 'The attention call was aborted');
    }
    const end = performance.now() + SLICE_MS;
    do tasks.run(task++);
    while (task < tasks.count && performance.now() < end);
  }
}

/** One backend, and whether it can run here. */
export interface Candidate {
  /** 'cuda', 'cuda:1', 'cpu:avx2', ..., 'js'; 'cpu' for all native ones where no binary loads */
  readonly name: string;
  readonly backend: Backend | null;
  /** Why there is no backend */
  readonly error: SdpaError | null;
}

/** All candidates but GPUs, best first, and what the short names mean. */
interface Selection {
  readonly candidates: readonly Candidate[];
  readonly auto: Candidate;
  readonly cpu: Candidate;
  /** Whether 'auto' may go to a GPU instead */
  readonly isFree: boolean;
}

const ISA_NAMES = ['avx2', 'avx512', 'amx', 'neon', 'portable'];
const BACKEND_NAMES = ['auto', 'cpu', 'cuda', 'js', ...ISA_NAMES.map((isa) => `cpu:${isa}`)];
export const MOST_THREADS = 256;

let selection: Selection | undefined;

/** The backend that a name means, 'auto' the one without a GPU; throws where it cannot run here, with the reason. */
export function selectBackend(name: unknown): Backend {
  const { backend, error } = findCandidate(name);
  if (backend === null) throw error;
  return backend;
}

function findCandidate(name: unknown): Candidate {
  selection ??= readSelection();
  if (isAuto(name)) return selection.auto;
  return findNamed('backend', name, selection.candidates, selection.cpu);
}

function isAuto(name: unknown): boolean {
  return name === undefined || name === 'auto';
}

/** What computes a call, and what does where that fails. */
interface Chosen {
  readonly backend: Backend;
  readonly fallback: Backend | null;
}

/**
 * The backend for a call: a name's, or for 'auto' the GPU that its tensors are on, or the one that
 * gives the result soonest.
 *
 * @param device - where its tensors are: HOST, or the number of a GPU
 * @param mayCopy - whether 'auto' may take it to a GPU: not with all that a cache holds
 */
export function selectForCall(
  name: unknown,
  problem: Problem,
  device: number,
  mayCopy: boolean,
): Chosen {
  if (device !== HOST) return { backend: gpuOfTensors(name, device), fallback: null };
  selection ??= readSelection();
  if (isAuto(name) && selection.isFree && mayCopy) {
    const gpu = gpuWorthTheWay(problem, selection.auto);
    if (gpu !== null) return { backend: gpu, fallback: selection.auto.backend };
  }
  return { backend: selectBackend(name), fallback: null };
}

function gpuOfTensors(name: unknown, device: number): Backend {
  if (!isAuto(name) && name !== 'cuda' && parseDevice(name) !== device) {
    findCandidate(name); // an unknown name is the greater mistake
    const expected = `"${deviceName(device)}" or "auto" for tensors that are there`;
    throw wrongLocation('backend', expected, JSON.stringify(name));
  }
  const { backend, error } = gpuCandidate(device);
  if (backend === null) throw error;
  return backend;
}

/** The largest head dim that GPUs have a backward pass for: 'auto' does not begin what it cannot end. */
const LARGEST_GPU_DIM = 256;

function gpuWorthTheWay(problem: Problem, { name }: Candidate): Backend | null {
  if (Math.max(problem.headDim, problem.valueDim) > LARGEST_GPU_DIM) return null;
  const threads = loadBinding().native?.getNumThreads() ?? 1;
  if (!mayPreferGpu(problem, name, threads)) return null;
  const { backend } = gpuCandidate(0);
  return backend !== null && prefersGpu(problem, name, threads) ? backend : null;
}

/** Reads the environment where no call has done so yet. */
export function applyEnvironment(): void {
  selection ??= readSelection();
}

/** Every backend there is, best first, and the one that 'auto' means for a call not worth a GPU. */
export function listCandidates(): { candidates: readonly Candidate[]; auto: Candidate } {
  selection ??= readSelection();
  const gpus = openCuda().gpus.map((_, device) => gpuCandidate(device));
  const cuda = gpus.length > 0 ? gpus : [gpuCandidate(0)];
  return { candidates: [...cuda, ...selection.candidates], auto: selection.auto };
}

const gpuBackends = new Map<number, Backend>();

function gpuCandidate(device: number): Candidate {
  const name = deviceName(device);
  const { error } = findGpu(device);
  const { native } = loadBinding();
  if (error !== null || native === null) return { name, backend: null, error };
  const backend = gpuBackends.get(device) ?? NativeBackend.ofGpu(native, device);
  gpuBackends.set(device, backend);
  return { name, backend, error: null };
}

/** Reads the environment, once: SDPA_BACKEND, SDPA_CPU_ISA, SDPA_NUM_THREADS, SDPA_MAX_BYTES. */
function readSelection(): Selection {
  const { SDPA_BACKEND, SDPA_CPU_ISA, SDPA_NUM_THREADS } = process.env;
  applyThreadCount(SDPA_NUM_THREADS);
  const mostBytes = readMostBytes();
  if (Number.isFinite(mostBytes)) loadBinding().native?.setMostBytes(mostBytes);
  const candidates = listAll();
  const cpu = chooseCpu(SDPA_CPU_ISA, candidates);
  const auto = chooseAuto(SDPA_BACKEND, candidates, cpu);
  debug('auto is %s', auto.backend?.name ?? auto.error?.message);
  const isFree = isUnset(SDPA_BACKEND) && auto.name.startsWith('cpu:');
  return { candidates, auto, cpu, isFree };
}

/**
 * The pool serves the whole process: whoever comes first sets its size, and workers that come
 * later leave it as it is.
 */
function applyThreadCount(text: string | undefined): void {
  const count = text === undefined || text === '' ? defaultThreads() : Number(text);
  if (!Number.isInteger(count) || count < 1 || count > MOST_THREADS) {
    const expected = `an integer from 1 to ${MOST_THREADS}`;
    throw invalidValue('SDPA_NUM_THREADS', expected, JSON.stringify(text));
  }
  const { native } = loadBinding();
  if (native !== null && native.getNumThreads() === 0) native.setNumThreads(count);
}

function defaultThreads(): number {
  return Math.min(availableParallelism(), MOST_THREADS);
}

function listAll(): Candidate[] {
  const { native, error } = loadBinding();
  const js = { name: 'js', backend: jsBackend, error: null };
  if (native === null) return [{ name: 'cpu', backend: null, error }, js];
  const cpus = native.backends.map(({ name, available, reason }, index) => ({
    name,
    backend: available ? new NativeBackend(name, native, index) : null,
    error: available ? null : unavailable(`${name}: ${reason}`),
  }));
  return [...cpus, js];
}

function unavailable(message: string, cause?: Error): SdpaError {
  return sdpaError('ERR_SDPA_BACKEND_UNAVAILABLE', message, cause);
}

/** 'cpu': the best native backend that runs here, or the one that SDPA_CPU_ISA names. */
function chooseCpu(isa: string | undefined, candidates: readonly Candidate[]): Candidate {
  if (isa !== undefined && isa !== '') {
    if (!ISA_NAMES.includes(isa)) throw wrongWord('SDPA_CPU_ISA', isa, ISA_NAMES);
    return findExact(`cpu:${isa}`, candidates);
  }
  const isCpu = ({ name, backend }: Candidate) => name.startsWith('cpu:') && backend !== null;
  return candidates.find(isCpu) ?? findExact('cpu', candidates);
}

/** 'auto': what SDPA_BACKEND names, or 'cpu', or 'js' where no native binary loads. */
function chooseAuto(
  name: string | undefined,
  candidates: readonly Candidate[],
  cpu: Candidate,
): Candidate {
  if (!isUnset(name)) {
    return findNamed('SDPA_BACKEND', name, candidates, cpu);
  }
  return loadBinding().native === null ? findExact('js', candidates) : cpu;
}

function isUnset(name: string | undefined): boolean {
  return name === undefined || name === '' || name === 'auto';
}

function findNamed(
  argument: string,
  name: unknown,
  candidates: readonly Candidate[],
  cpu: Candidate,
): Candidate {
  if (name === 'cpu') return cpu;
  const device = parseDevice(name);
  if (device !== undefined) return gpuCandidate(device);
  if (typeof name !== 'string' || !BACKEND_NAMES.includes(name)) {
    throw wrongWord(argument, name, BACKEND_NAMES);
  }
  return findExact(name, candidates);
}

function findExact(name: string, candidates: readonly Candidate[]): Candidate {
  const found = candidates.find((candidate) => candidate.name === name);
  if (found !== undefined && found.name !== 'cpu') return found;
  const { error } = loadBinding();
  const built = candidates.map((candidate) => candidate.name).join(', ');
  const reason =
    error === null ? `not in this binary, which has ${built}` : lowerFirst(error.message);
  return { name, backend: null, error: unavailable(`${name}: ${reason}`, error ?? undefined) };
}

function lowerFirst(text: string): string {
  return text.charAt(0).toLowerCase() + text.slice(1);
}
