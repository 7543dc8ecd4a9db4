// The progress bar of a training run.
import { SingleBar } from 'cli-progress';
import type { Trainer } from './trainer';

/** The bar, with a loss and a speed that are smoothed over some 20 steps. */
export class Progress {
  validation = Number.NaN;
  #loss = Number.NaN;
  #seconds = Number.NaN;
  #last = performance.now();
  readonly #bar = new SingleBar({
    format:
      'step {value}/{total} [{bar}] loss {loss}, validation {validation}, ' +
      '{speed} tokens/s, {left} left',
    barsize: 20,
    stopOnComplete: true,
    gracefulExit: false, // Ctrl-C is the trainer's, who saves first
    noTTYOutput: true,
    notTTYSchedule: 10_000,
  });

  constructor(readonly trainer: Trainer) {
    const nothing = { loss: '-', validation: '-', speed: '-', left: '-' };
    this.#bar.start(trainer.settings.steps, trainer.step, nothing);
  }

  show(loss: number): void {
    const { step, settings, tokensPerStep } = this.trainer;
    const now = performance.now();
    this.#loss = smooth(this.#loss, loss);
    this.#seconds = smooth(this.#seconds, (now - this.#last) / 1000);
    this.#last = now;
    this.#bar.update(step, {
      loss: this.#loss.toFixed(3),
      validation: Number.isNaN(this.validation) ? '-' : this.validation.toFixed(3),
      speed: Math.round(tokensPerStep / this.#seconds),
      left: describeTime((settings.steps - step) * this.#seconds),
    });
  }

  stop(): void {
    this.#bar.stop();
  }
}

function smooth(before: number, now: number): number {
  return Number.isNaN(before) ? now : 0.95 * before + 0.05 * now;
}

function describeTime(seconds: number): string {
  const minutes = Math.floor(seconds / 60);
  return `${minutes}:${String(Math.floor(seconds % 60)).padStart(2, '0')}`;
}
