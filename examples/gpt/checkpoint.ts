// All of a training run in one safetensors file, so that a rerun goes on to the bit.
import { createHash } from 'node:crypto';
import { mkdirSync } from 'node:fs';
import path from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { Gpt } from './model';
import { randomFromState } from './random';
import { readSafetensors, type StoredTensor, writeSafetensors } from './safetensors';
import { type Corpus, UsageError, Vocabulary } from './text';
import type { Settings, Trainer } from './trainer';

/** The model's weights by their own names, the optimizer's means and squares by these. */
const MEANS = 'optimizer.means.';
const SQUARES = 'optimizer.squares.';

/** What the file says besides the numbers; everything in it is JSON. */
interface State {
  readonly settings: Settings;
  readonly characters: readonly string[];
  readonly title: string;
  /** SHA-256 of the tokens: a run goes on with its own text only */
  readonly text: string;
  readonly step: number;
  readonly batches: readonly number[];
  readonly dropout: { readonly seed: string; readonly offset: string };
}

/** Writes all that `restore` needs. */
export function save(file: string, trainer: Trainer): void {
  const { model, optimizer, corpus, settings, step } = trainer;
  const tensors = new Map<string, StoredTensor>();
  const put = (name: string, shape: readonly number[], data: unknown) =>
    tensors.set(name, { shape, data: data as Float32Array });
  model.parameters.forEach(({ name, shape, value }, i) => {
    put(name, shape, value);
    put(MEANS + name, shape, optimizer.means[i]);
    put(SQUARES + name, shape, optimizer.squares[i]);
  });
  const { seed, offset } = trainer.dropout.getState();
  const state: State = {
    settings,
    characters: corpus.vocabulary.characters,
    title: corpus.title,
    text: hashOf(corpus),
    step,
    batches: trainer.batches.getState(),
    dropout: { seed: `${seed}`, offset: `${offset}` },
  };
  const metadata = Object.fromEntries(
    Object.entries(state).map(([name, value]) => [name, JSON.stringify(value)]),
  );
  mkdirSync(path.dirname(file), { recursive: true });
  writeSafetensors(file, { tensors, metadata });
}

/**
 * Puts a trainer where `save` was called.
 * @throws UsageError where the file is of a run with another text or other settings
 */
export function restore(file: string, trainer: Trainer): void {
  const { tensors, state } = read(file);
  if (state.text !== hashOf(trainer.corpus)) {
    throw new UsageError(`${file}: this run learned another text, ${state.title}`);
  }
  const different = Object.entries(trainer.settings).filter(
    ([name, value]) => !isDeepStrictEqual(state.settings[name as keyof Settings], value),
  );
  if (different.length > 0) {
    const [name, value] = different[0];
    const was = JSON.stringify(state.settings[name as keyof Settings]);
    const now = JSON.stringify(value);
    throw new UsageError(`${file}: this run has another ${name}, ${was} and not ${now}`);
  }
  const { model, optimizer } = trainer;
  model.parameters.forEach(({ name, shape, value }, i) => {
    value.set(take(file, tensors, name, shape));
    optimizer.means[i].set(take(file, tensors, MEANS + name, shape));
    optimizer.squares[i].set(take(file, tensors, SQUARES + name, shape));
  });
  optimizer.step = state.step;
  trainer.batches = randomFromState(state.batches);
  const { seed, offset } = state.dropout;
  trainer.dropout.setState({ seed: BigInt(seed), offset: BigInt(offset) });
}

/** The model of a checkpoint and its vocabulary, to write text with. */
export function loadModel(file: string) {
  const { tensors, state } = read(file);
  const vocabulary = new Vocabulary(state.characters);
  const model = new Gpt({ ...state.settings.model, vocabulary: state.characters.length });
  for (const { name, shape, value } of model.parameters) {
    value.set(take(file, tensors, name, shape));
  }
  return { model, vocabulary, step: state.step, title: state.title };
}

function read(file: string): { tensors: ReadonlyMap<string, StoredTensor>; state: State } {
  const { tensors, metadata } = readSafetensors(file);
  const names = ['settings', 'characters', 'title', 'text', 'step', 'batches', 'dropout'];
  const state = Object.fromEntries(
    names.map((name) => {
      if (metadata[name] === undefined) {
        throw new UsageError(`${file}: not a checkpoint of this program, "${name}" is missing`);
      }
      return [name, JSON.parse(metadata[name])];
    }),
  );
  return { tensors, state: state as unknown as State };
}

function take(
  file: string,
  tensors: ReadonlyMap<string, StoredTensor>,
  name: string,
  shape: readonly number[],
): Float32Array {
  const tensor = tensors.get(name);
  if (tensor === undefined || !isDeepStrictEqual(tensor.shape, shape)) {
    const found = tensor === undefined ? 'none' : `one of [${tensor.shape}]`;
    throw new UsageError(`${file}: expected a tensor ${name} of [${shape}], found ${found}`);
  }
  return tensor.data;
}

function hashOf({ training, validation }: Corpus): string {
  const hash = createHash('sha256');
  for (const part of [training, validation]) {
    hash.update(new Uint8Array(part.buffer, part.byteOffset, part.byteLength));
  }
  return hash.digest('hex');
}
