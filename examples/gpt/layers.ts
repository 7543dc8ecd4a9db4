// The layers of the model but attention. Each keeps in `forward` what its `backward` needs;
// `backward` takes the gradient of the output, adds to the gradients of the parameters and returns
// the gradient of the input.
import { addProduct, type Floats, transpose, zeros } from './matmul';

/** Numbers that training changes. */
export interface Parameter {
  /** As in checkpoints, such as `blocks.0.attention.query.weight` */
  readonly name: string;
  readonly shape: readonly number[];
  readonly value: Floats;
  readonly gradient: Floats;
}

/** y = x · weight + bias. */
export class Linear {
  #input: Floats | undefined;

  constructor(
    readonly weight: Parameter, // [inputs, outputs]
    readonly bias: Parameter, // [outputs]
  ) {}

  /** x [rows, inputs] -> [rows, outputs] */
  forward(x: Floats): Floats {
    const [inputs, outputs] = this.weight.shape;
    const rows = x.length / inputs;
    const y = zeros(x, rows * outputs);
    for (let row = 0; row < rows; row++) y.set(this.bias.value, row * outputs);
    addProduct(y, x, this.weight.value, rows, inputs, outputs);
    this.#input = x;
    return y;
  }

  backward(gradY: Floats): Floats {
    const x = kept(this.#input);
    const [inputs, outputs] = this.weight.shape;
    const rows = x.length / inputs;
    const gradBias = this.bias.gradient;
    for (let i = 0; i < rows; i++) {
      for (let j = 0; j < outputs; j++) gradBias[j] += gradY[i * outputs + j];
    }
    addProduct(this.weight.gradient, transpose(x, rows, inputs), gradY, inputs, rows, outputs);
    const gradX = zeros(x, x.length);
    const transposed = transpose(this.weight.value, inputs, outputs);
    addProduct(gradX, gradY, transposed, rows, outputs, inputs);
    return gradX;
  }
}

/** Layer normalisation (Ba, Kiros & Hinton, arXiv 1607.06450). */
export class LayerNorm {
  static readonly #EPSILON = 1e-5;
  #normalised: Floats | undefined;
  #inverseDeviation: Floats | undefined;

  constructor(
    readonly gain: Parameter, // [width]
    readonly bias: Parameter, // [width]
  ) {}

  /** x [rows, width] -> [rows, width] */
  forward(x: Floats): Floats {
    const width = this.gain.value.length;
    const rows = x.length / width;
    const y = zeros(x, x.length);
    const normalised = zeros(x, x.length);
    const inverse = zeros(x, rows);
    for (let row = 0; row < rows; row++) {
      const first = row * width;
      let mean = 0;
      for (let i = first; i < first + width; i++) mean += x[i] / width;
      let variance = 0;
      for (let i = first; i < first + width; i++) variance += (x[i] - mean) ** 2 / width;
      inverse[row] = 1 / Math.sqrt(variance + LayerNorm.#EPSILON);
      for (let j = 0; j < width; j++) {
        normalised[first + j] = (x[first + j] - mean) * inverse[row];
        y[first + j] = normalised[first + j] * this.gain.value[j] + this.bias.value[j];
      }
    }
    this.#normalised = normalised;
    this.#inverseDeviation = inverse;
    return y;
  }

  backward(gradY: Floats): Floats {
    const normalised = kept(this.#normalised);
    const inverse = kept(this.#inverseDeviation);
    const gain = this.gain.value;
    const width = gain.length;
    const gradX = zeros(gradY, gradY.length);
    for (let row = 0; row < inverse.length; row++) {
      const first = row * width;
      // What the mean and the deviation of the row take away again.
      let mean = 0;
      let slope = 0;
      for (let j = 0; j < width; j++) {
        const grad = gradY[first + j];
        this.gain.gradient[j] += grad * normalised[first + j];
        this.bias.gradient[j] += grad;
        mean += (grad * gain[j]) / width;
        slope += (grad * gain[j] * normalised[first + j]) / width;
      }
      for (let j = 0; j < width; j++) {
        const grad = gradY[first + j] * gain[j];
        gradX[first + j] = (grad - mean - normalised[first + j] * slope) * inverse[row];
      }
    }
    return gradX;
  }
}

/** GELU in its tanh form, as in GPT-2 (Hendrycks & Gimpel, arXiv 1606.08415). */
export class Gelu {
  static readonly #SCALE = Math.sqrt(2 / Math.PI);
  static readonly #CUBIC = 0.044715;
  #input: Floats | undefined;
  #tanh: Floats | undefined;

  forward(x: Floats): Floats {
    const y = zeros(x, x.length);
    const tanh = zeros(x, x.length);
    for (let i = 0; i < x.length; i++) {
      tanh[i] = Math.tanh(Gelu.#SCALE * x[i] * (1 + Gelu.#CUBIC * x[i] * x[i]));
      y[i] = 0.5 * x[i] * (1 + tanh[i]);
    }
    this.#input = x;
    this.#tanh = tanh;
    return y;
  }

  backward(gradY: Floats): Floats {
    const x = kept(this.#input);
    const tanh = kept(this.#tanh);
    const gradX = zeros(x, x.length);
    for (let i = 0; i < x.length; i++) {
      const inner = Gelu.#SCALE * (1 + 3 * Gelu.#CUBIC * x[i] ** 2);
      const slope = 0.5 * (1 + tanh[i]) + 0.5 * x[i] * (1 - tanh[i] ** 2) * inner;
      gradX[i] = gradY[i] * slope;
    }
    return gradX;
  }
}

/** A row of a table for each token, plus a row for each position. */
export class Embedding {
  #tokens: Int32Array | undefined;
  #positions: Int32Array | undefined;

  constructor(
    readonly tokens: Parameter, // [vocabulary, width]
    readonly positions: Parameter, // [longest text, width]
  ) {}

  /** tokens [rows] and where each stands in its text -> [rows, width] */
  forward(tokens: Int32Array, positions: Int32Array): Floats {
    const width = this.tokens.shape[1];
    const y = zeros(this.tokens.value, tokens.length * width);
    for (let i = 0; i < tokens.length; i++) {
      const token = tokens[i] * width;
      const position = positions[i] * width;
      for (let j = 0; j < width; j++) {
        y[i * width + j] = this.tokens.value[token + j] + this.positions.value[position + j];
      }
    }
    this.#tokens = tokens;
    this.#positions = positions;
    return y;
  }

  backward(gradY: Floats): void {
    const tokens = kept(this.#tokens);
    const positions = kept(this.#positions);
    const width = this.tokens.shape[1];
    for (let i = 0; i < tokens.length; i++) {
      const token = tokens[i] * width;
      const position = positions[i] * width;
      for (let j = 0; j < width; j++) {
        this.tokens.gradient[token + j] += gradY[i * width + j];
        this.positions.gradient[position + j] += gradY[i * width + j];
      }
    }
  }
}

/**
 * The mean cross entropy, in nats, of logits [rows, classes] against the right class of each row,
 * and its gradient.
 */
export function crossEntropy(logits: Floats, targets: Int32Array) {
  const rows = targets.length;
  const classes = logits.length / rows;
  const gradLogits = zeros(logits, logits.length);
  let loss = 0;
  for (let row = 0; row < rows; row++) {
    const first = row * classes;
    let max = Number.NEGATIVE_INFINITY;
    for (let j = 0; j < classes; j++) max = Math.max(max, logits[first + j]);
    let sum = 0;
    for (let j = 0; j < classes; j++) {
      const power = Math.exp(logits[first + j] - max);
      gradLogits[first + j] = power;
      sum += power;
    }
    for (let j = 0; j < classes; j++) gradLogits[first + j] /= sum * rows;
    gradLogits[first + targets[row]] -= 1 / rows;
    loss += (Math.log(sum) + max - logits[first + targets[row]]) / rows;
  }
  return { loss, gradLogits };
}

/** What `forward` left for `backward`. */
export function kept<T>(value: T | undefined): T {
  if (value === undefined) throw new Error('backward comes after forward');
  return value;
}
