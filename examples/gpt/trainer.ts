// One training run: batches, steps, evaluation, and the state that a checkpoint holds.
import { type BackendName, type DropoutPlacement, Generator } from 'node-sdpa';
import { type Attention, type Dropout, evaluationAttention, trainingAttention } from './attention';
import { crossEntropy } from './layers';
import { Gpt, type ModelSizes } from './model';
import { AdamW, clipGradients, rateAt, type Schedule } from './optimizer';
import { type Random, randomStreams } from './random';
import { type Corpus, consecutiveBatches, randomBatch } from './text';

export interface Settings extends Schedule {
  readonly model: Omit<ModelSizes, 'vocabulary'>;
  /** Pieces of text in a step */
  readonly batch: number;
  readonly weightDecay: number;
  /** The longest that the gradient of a step may be */
  readonly clip: number;
  /** Of attention, in all layers; there is no other dropout */
  readonly dropout: { readonly placement: DropoutPlacement | 'none'; readonly p: number };
  /** Decides on weights, batches and dropout, each by random numbers of its own */
  readonly seed: number;
}

/** How attention is computed, where that is not left to node-sdpa's choice. */
export interface Choice {
  readonly backend?: BackendName;
  readonly createAttention?: (dropout: Dropout | undefined, backend?: BackendName) => Attention;
}

export class Trainer {
  readonly model: Gpt;
  readonly optimizer: AdamW;
  /** Chooses the batches */
  batches: Random;
  /** Decides on dropout; the same steps are the same with any placement or none */
  readonly dropout: Generator;
  readonly #train: Attention;
  readonly #evaluate: Attention;

  constructor(
    readonly settings: Settings,
    readonly corpus: Corpus,
    { backend, createAttention = trainingAttention }: Choice = {},
  ) {
    const { seed, dropout, weightDecay } = settings;
    const [weights, batches] = randomStreams(seed, 2);
    const vocabulary = corpus.vocabulary.characters.length;
    this.model = new Gpt({ ...settings.model, vocabulary });
    this.model.initialize(weights);
    this.optimizer = new AdamW(this.model.parameters, weightDecay);
    this.batches = batches;
    this.dropout = new Generator({ seed });
    const { placement, p } = dropout;
    const chosen = placement === 'none' ? undefined : { placement, p, generator: this.dropout };
    this.#train = createAttention(chosen, backend);
    this.#evaluate = evaluationAttention(backend);
  }

  /** How many steps were done. */
  get step(): number {
    return this.optimizer.step;
  }

  get isFinished(): boolean {
    return this.step >= this.settings.steps;
  }

  /** How many tokens a step learns from. */
  get tokensPerStep(): number {
    return this.settings.batch * this.settings.model.length;
  }

  /** One step; returns the loss of its batch, in nats a character, before the step. */
  trainStep(): number {
    const { batch, model, clip } = this.settings;
    const { training } = this.corpus;
    const { tokens, targets } = randomBatch(training, batch, model.length, this.batches);
    const logits = this.model.forward(tokens, batch, this.#train);
    const { loss, gradLogits } = crossEntropy(logits, targets);
    this.model.backward(gradLogits);
    clipGradients(this.model.parameters, clip);
    this.optimizer.update(rateAt(this.step, this.settings));
    return loss;
  }

  /** The loss over the validation part, without dropout, in nats a character. */
  validate(): number {
    return this.#lossOf(this.corpus.validation);
  }

  /** The loss over the training part, without dropout, in nats a character. */
  trainingLoss(): number {
    return this.#lossOf(this.corpus.training);
  }

  #lossOf(text: Int32Array): number {
    const { batch, model } = this.settings;
    let sum = 0;
    let rows = 0;
    for (const { tokens, targets, count } of consecutiveBatches(text, batch, model.length)) {
      const logits = this.model.forward(tokens, count, this.#evaluate);
      sum += crossEntropy(logits, targets).loss * targets.length;
      rows += targets.length;
    }
    return sum / rows;
  }
}
