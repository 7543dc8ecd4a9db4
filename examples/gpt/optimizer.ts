// AdamW (Loshchilov & Hutter, arXiv 1711.05101), gradient clipping, and the cosine schedule.
import type { Parameter } from './layers';
import { type Floats, zeros } from './matmul';

const BETA1 = 0.9;
const BETA2 = 0.99;
const EPSILON = 1e-8;

export class AdamW {
  /** How many steps were taken */
  step = 0;
  /** Running means of the gradients and of their squares, parameter by parameter */
  readonly means: readonly Floats[];
  readonly squares: readonly Floats[];

  constructor(
    readonly parameters: readonly Parameter[],
    readonly weightDecay: number,
  ) {
    this.means = parameters.map(({ value }) => zeros(value, value.length));
    this.squares = parameters.map(({ value }) => zeros(value, value.length));
  }

  /** One step against the gradients, which are 0 afterwards. Only matrices decay. */
  update(rate: number): void {
    this.step++;
    const correction1 = 1 - BETA1 ** this.step;
    const correction2 = 1 - BETA2 ** this.step;
    this.parameters.forEach(({ shape, value, gradient }, at) => {
      const [means, squares] = [this.means[at], this.squares[at]];
      const keep = 1 - rate * (shape.length > 1 ? this.weightDecay : 0);
      for (let i = 0; i < value.length; i++) {
        const g = gradient[i];
        means[i] = BETA1 * means[i] + (1 - BETA1) * g;
        squares[i] = BETA2 * squares[i] + (1 - BETA2) * g * g;
        const size = Math.sqrt(squares[i] / correction2) + EPSILON;
        value[i] = keep * value[i] - (rate * (means[i] / correction1)) / size;
      }
      gradient.fill(0);
    });
  }
}

/** Scales all gradients down to a common length of `longest` at most; returns their length. */
export function clipGradients(parameters: readonly Parameter[], longest: number): number {
  let squares = 0;
  for (const { gradient } of parameters) {
    for (let i = 0; i < gradient.length; i++) squares += gradient[i] * gradient[i];
  }
  const length = Math.sqrt(squares);
  if (length <= longest) return length;
  const factor = longest / length;
  for (const { gradient } of parameters) {
    for (let i = 0; i < gradient.length; i++) gradient[i] *= factor;
  }
  return length;
}

export interface Schedule {
  /** The highest rate, reached after `warmup` steps */
  readonly rate: number;
  readonly warmup: number;
  /** All steps; the rate ends at a tenth of its height */
  readonly steps: number;
}

/** The learning rate of a step, 0 to steps - 1: a linear rise, then half a cosine. */
export function rateAt(step: number, { rate, warmup, steps }: Schedule): number {
  if (step < warmup) return (rate * (step + 1)) / warmup;
  const progress = (step - warmup) / Math.max(1, steps - 1 - warmup);
  return rate * (0.1 + 0.45 * (1 + Math.cos(Math.PI * progress)));
}
