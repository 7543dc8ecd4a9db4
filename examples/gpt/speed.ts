// Training speed with native attention against attention by the js backend: tokens/s, and the time
// of a step that attention takes. The other layers are the same TypeScript in both.
//
//   npm run bench:gpt -- [--lengths 64,128,...] [--rounds COUNT]
import { parseArgs } from 'node:util';
import { type BackendName, backendInfo } from 'node-sdpa';
import { describeMachine } from '../../bench/report.mjs';
import { median } from '../demo/statistics.mjs';
import { type Attention, type Dropout, trainingAttention } from './attention';
import { readCount, runCommand } from './command';
import { readBook, splitText } from './text';
import { Trainer } from './trainer';

const TOKENS_PER_STEP = 1024;
const MODEL = { layers: 2, heads: 4, width: 64 };
/** So many steps come before the first that is timed: by then all code is compiled. */
const WARM_UP = 3;

runCommand(() => {
  const { values: given } = parseArgs({
    options: {
      lengths: { type: 'string', default: '64,128,256,512,1024' },
      rounds: { type: 'string', default: '15' },
    },
  });
  const lengths = given.lengths.split(',').map((text) => readCount('lengths', text, 2, 1024));
  const rounds = readCount('rounds', given.rounds, 1);
  const { cpu, cores, node, date } = describeMachine(backendInfo().version);
  const { selected, threads } = backendInfo();
  const { layers, heads, width } = MODEL;
  console.log(
    `${cpu}, ${cores} cores, Node.js ${node}, ${date}. ${layers} layers, width ${width}, ` +
      `${heads} heads, ${TOKENS_PER_STEP} tokens a step, dropout of weights at p = 0.1; ` +
      `native: ${selected}, ${threads} thread(s). Medians of ${rounds} steps, in turns.\n`,
  );
  console.log('| length | tokens/s native | tokens/s js | attention, ms a step: native | js |');
  console.log('| --- | --- | --- | --- | --- |');
  for (const length of lengths) console.log(compareAt(length, rounds));
});

function compareAt(length: number, rounds: number): string {
  const runs = (['auto', 'js'] as const).map((backend) => new TimedRun(backend, length));
  for (let round = -WARM_UP; round < rounds; round++) {
    for (const run of runs) run.step(round >= 0);
  }
  const [native, js] = runs.map((run) => run.summary());
  const cells = [native.speed, js.speed].map((speed) => Math.round(speed).toLocaleString('en'));
  const times = [native.attention, js.attention].map((ms) => ms.toFixed(1));
  return `| ${[length, ...cells, ...times].join(' | ')} |`;
}

/** A training run whose steps, and the attention in them, are timed. */
class TimedRun {
  readonly #trainer: Trainer;
  readonly #steps: number[] = [];
  readonly #attention: number[] = [];
  #spent = 0;

  constructor(backend: BackendName, length: number) {
    const corpus = splitText(readBook(), 0.1, 10_000, length);
    const settings = {
      model: { ...MODEL, length },
      batch: TOKENS_PER_STEP / length,
      ...{ steps: 1000, rate: 0.002, warmup: 100, weightDecay: 0.1, clip: 1, seed: 1 },
      dropout: { placement: 'weights', p: 0.1 },
    } as const;
    const createAttention = (dropout?: Dropout) => this.#timed(trainingAttention(dropout, backend));
    this.#trainer = new Trainer(settings, corpus, { backend, createAttention });
  }

  step(isCounted: boolean): void {
    this.#spent = 0;
    const ms = timeOf(() => this.#trainer.trainStep());
    if (!isCounted) return;
    this.#steps.push(ms);
    this.#attention.push(this.#spent);
  }

  summary(): { speed: number; attention: number } {
    return {
      speed: (1000 * TOKENS_PER_STEP) / median(this.#steps),
      attention: median(this.#attention),
    };
  }

  #timed(attention: Attention): Attention {
    return (...call) => {
      let attended = {} as ReturnType<Attention>;
      this.#spent += timeOf(() => {
        attended = attention(...call);
      });
      const { output, backward } = attended;
      return {
        output,
        backward: (gradOutput) => {
          let gradients = {} as ReturnType<NonNullable<typeof backward>>;
          this.#spent += timeOf(() => {
            gradients = backward!(gradOutput);
          });
          return gradients;
        },
      };
    };
  }
}

function timeOf(work: () => void): number {
  const start = performance.now();
  work();
  return performance.now() - start;
}
