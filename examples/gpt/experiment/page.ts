// The words and tables of the report's page. Every number comes from the result files, and every
// claim about them is made, or not made, by its interval.
import type { NoiseCase, NoiseFile } from './noise';
import { PLACEMENTS } from './plan';
import type { Header, Row } from './results';
import { CONFIDENCE, deviationOf, type Interval, isClear, meanOf } from './statistics';
import {
  againstEachOther,
  againstNone,
  bestGroups,
  type Difference,
  differences,
  type Group,
  type Measure,
  pairsOf,
  type Summary,
} from './summary';

export function writeReport(
  header: Header,
  rows: readonly Row[],
  summary: Summary,
  noise: NoiseFile,
): string {
  const sections = [
    '# Where does dropout belong?',
    '<!-- Written by `npm run report` from docs/placement/*.json*; do not edit by hand. -->',
    describeQuestion(summary),
    '## In short',
    describeFindings(summary, noise),
    '## The terms',
    TERMS,
    '![Scores, weights and context of one head, with dropped elements](placement/terms.png)',
    '## The experiment',
    describeExperiment(header, rows, summary),
    '## Validation loss while training',
    '![Validation loss against the step](placement/curves.png)',
    '## Best and final loss',
    describeLosses(summary),
    lossTable(summary),
    '![Paired differences from no dropout](placement/differences.png)',
    '## One placement against another at equal p',
    describeContrasts(summary),
    contrastTable(summary),
    '## The noise of each placement',
    describeNoise(noise),
    '![Size of the noise and correlation of channels](placement/noise.png)',
    describeBias(noise),
    '![Mean weight of the heaviest key under dropout of scores](placement/bias.png)',
    '## What can be concluded, and what cannot',
    describeLimits(summary),
    '## Sources',
    SOURCES,
    '## To repeat this',
    describeCommands(header),
  ];
  return `${sections.join('\n\n')}\n`;
}

const loss = (x: number) => x.toFixed(3);
const CONFIDENCE_TEXT = `${100 * CONFIDENCE} %`;
const signed = (x: number) => `${x < 0 ? '−' : '+'}${Math.abs(x).toFixed(3)}`;
const spread = (numbers: readonly number[]) =>
  `${loss(meanOf(numbers))} ± ${loss(deviationOf(numbers))}`;
const range = ({ low, high }: Interval) => `[${signed(low)}, ${signed(high)}]`;
const list = (names: readonly string[]) =>
  names.length < 2 ? names.join('') : `${names.slice(0, -1).join(', ')} and ${names.at(-1)}`;

function table(head: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`;
  return [line(head), line(head.map(() => '---')), ...rows.map(line)].join('\n');
}

const MEASURE_NAMES: Record<Measure, string> = { best: 'best', final: 'final' };

function describeQuestion({ seeds, none }: Summary): string {
  const [best, final] = [none.best, none.final].map((losses) => loss(meanOf(losses)));
  return `Attention has three places for dropout, and libraries, papers and books differ in the one
they use, and in what they call it. Here the same small GPT is trained with each of them,
${seeds.length} times with each setting, on a text that it can learn by heart: without dropout its
validation loss is lowest after some ${Math.round(none.bestStep)} steps, at ${best} nats a
character, and ${final} at the end.`;
}

function describeFindings(summary: Summary, noise: NoiseFile): string {
  const best = bestGroups(summary, 'best');
  const contrasts = differences(pairsOf(best), 'best');
  const clear = contrasts.filter(({ joint }) => isClear(joint));
  const findings = [
    ...(['final', 'best'] as const).map((measure) => describeAgainstNone(summary, measure)),
    `The best setting of each placement is ${list(
      best.map((group) => `${group.name} (${loss(meanOf(group.best))})`),
    )}, by the mean of the best losses. ${
      clear.length === 0
        ? 'No difference between these three is clear.'
        : `Between these, clear differences: ${describeClear(clear)}.`
    }`,
    describeEqualP(summary),
    `What each placement does to one row of attention, against theory. ${describeAgreement(noise)}`,
  ];
  return `${findings.map((finding) => `- ${finding}`).join('\n')}

"Clear" means that the ${CONFIDENCE_TEXT} confidence intervals of the whole comparison, taken
together (Bonferroni), leave out 0.`;
}

function describeAgainstNone(summary: Summary, measure: Measure): string {
  const all = againstNone(summary, measure);
  const name = measure === 'best' ? 'best loss of a run' : 'loss at the end';
  const better = all.filter(({ joint }) => joint.high < 0);
  const worse = all.filter(({ joint }) => joint.low > 0);
  const [first] = [...all].sort((a, b) => a.interval.mean - b.interval.mean);
  return (
    `The ${name}: of ${all.length} settings, ${better.length} are clearly better than no dropout ` +
    `and ${worse.length} clearly worse. The lowest mean is that of ${first.first.name}, ` +
    `${signed(first.interval.mean)} ${range(first.interval)} nats against no dropout.`
  );
}

function describeEqualP(summary: Summary): string {
  const clear = againstEachOther(summary, 'best').filter(({ joint }) => isClear(joint));
  if (clear.length === 0) return 'At equal p, no two placements differ clearly in their best loss.';
  return `At equal p, clear differences in the best loss: ${describeClear(clear)}.`;
}

function describeClear(clear: readonly Difference[]): string {
  const sentences = clear.map(({ first, second, interval }) => {
    const [winner, loser] = interval.mean < 0 ? [first, second] : [second, first];
    return `${winner.name} is better than ${loser.name} by ${loss(Math.abs(interval.mean))}`;
  });
  return sentences.join('; ');
}

const TERMS = `For one row of queries:

- **scores** are \`scale * query · keyᵀ\`, before the softmax (with softcap, bias and masks).
  Dropout of scores makes a score −∞: the key is out, and the rest share all of its weight. Nothing is
  rescaled.
- **weights** are \`softmax(scores)\`; a row sums to 1. Dropout of weights makes a weight 0 and
  multiplies the others by 1/(1−p): the row sums to 1 on average only. This is "attention dropout"
  in PyTorch, GPT and most books, some of which call the weights "scores".
- **context** is \`weights · value\`, the output of a head. Dropout of context makes single channels
  0 and multiplies the others by 1/(1−p).`;

function describeExperiment(
  { run, text, machine }: Header,
  rows: readonly Row[],
  summary: Summary,
) {
  const { model } = run;
  const untrained = text.characters * text.validationShare;
  const trained = text.characters - untrained;
  const backends = [...new Set(rows.map(({ backend }) => String(backend)))];
  const minutes = rows.reduce((sum, { seconds }) => sum + seconds, 0) / 60;
  const facts = [
    ['model', `${model.layers} layers, width ${model.width}, ${model.heads} heads, pre-norm, GELU`],
    ['text', `${trained} characters of Moby-Dick to learn, and the next ${untrained} to validate`],
    ['a step', `${run.batch} pieces of ${model.length} characters; ${run.steps} steps`],
    [
      'optimizer',
      `AdamW, rate ${run.rate} after ${run.warmup} steps, then a cosine to a tenth; ` +
        `weight decay ${run.weightDecay}; gradients clipped at ${run.clip}`,
    ],
    [
      'dropout',
      'in attention alone, in all layers: three placements at four probabilities, or none',
    ],
    [
      'seeds',
      `${summary.seeds.length}; a seed decides on weights and batches, the same for all settings`,
    ],
    ['evaluation', 'without dropout, over all of both parts; losses in nats a character'],
    ['all', `${rows.length} runs, ${minutes.toFixed(0)} minutes of one core`],
    [
      'machine',
      `${machine.cpu}, ${machine.cores} cores, Node.js ${machine.node}, ` +
        `attention by ${list(backends)}, ${machine.date}`,
    ],
  ];
  return table(['', ''], facts);
}

function describeLosses({ none, groups }: Summary): string {
  const training = meanOf(none.finalTraining);
  const highest = groups.reduce((a, b) =>
    meanOf(b.finalTraining) > meanOf(a.finalTraining) ? b : a,
  );
  return `The best loss is the lowest of a run, as stopping early would keep it; the final one is that
of its last step. Means ± standard deviations over seeds; differences are paired by seed, with their
${CONFIDENCE_TEXT} confidence intervals (Student's t), **bold** where clear. Less is better. The
training loss shows how much is learned by heart: ${loss(training)} at the end without dropout, and at most
${loss(meanOf(highest.finalTraining))}, with ${highest.name}.`;
}

function lossTable(summary: Summary): string {
  const columns = (['best', 'final'] as const).map((measure) => againstNone(summary, measure));
  const row = (group: Group, cells: readonly string[]) => [
    group.placement,
    group.placement === 'none' ? '' : `${group.p}`,
    ...[spread(group.best), cells[0], `${Math.round(group.bestStep)}`],
    ...[spread(group.final), cells[1], loss(meanOf(group.finalTraining))],
  ];
  return table(
    ['placement', 'p', 'best', 'difference', 'at step', 'final', 'difference', 'training, final'],
    [
      row(summary.none, ['', '']),
      ...summary.groups.map((group, i) =>
        row(
          group,
          columns.map((all) => describeDifference(all[i])),
        ),
      ),
    ],
  );
}

function describeDifference({ interval, joint }: Difference): string {
  const text = `${signed(interval.mean)} ${range(interval)}`;
  return isClear(joint) ? `**${text}**` : text;
}

function describeContrasts(summary: Summary): string {
  const counts = (['best', 'final'] as const).map((measure) => {
    const all = againstEachOther(summary, measure);
    const clear = all.filter(({ joint }) => isClear(joint)).length;
    return `${clear} of ${all.length} in the ${MEASURE_NAMES[measure]} loss`;
  });
  return `The first placement minus the second: below 0, the first is better. Clear differences:
${counts.join(', ')}.`;
}

function contrastTable(summary: Summary): string {
  const [best, final] = (['best', 'final'] as const).map((m) => againstEachOther(summary, m));
  return table(
    ['p', 'first − second', 'best', 'final'],
    best.map((difference, i) => [
      `${difference.first.p}`,
      `${difference.first.placement} − ${difference.second.placement}`,
      describeDifference(difference),
      describeDifference(final[i]),
    ]),
  );
}

function describeNoise(noise: NoiseFile): string {
  const { keys, channels, draws } = noise;
  return `One row of ${keys} keys and ${channels} channels is drawn ${draws} times with each
placement, from flat rows to peaked ones, with values independent of each other or half in common. With weights w, values v
and context o, theory says:

- weights: covariance p/(1−p) Σⱼ wⱼ² vⱼ vⱼᵀ. A lost token takes all its channels along, so channels
  move together, the more the fewer tokens a row looks at. What values have in common is noise too,
  because the sum of a row's weights changes.
- context: variance p/(1−p) o² in each channel, whatever the weights are; channels are independent.
- scores: to first order p/(1−p) Σⱼ wⱼ² (vⱼ−o)(vⱼ−o)ᵀ. What values have in common is no noise, since
  a row still sums to 1. The lines in the charts are not this but exact sums over all ${2 ** keys}
  sets of kept keys.

${describeAgreement(noise)}`;
}

function describeAgreement({ cases }: NoiseFile): string {
  const z = cases.flatMap((each) => each.z);
  const far = z.filter((x) => Math.abs(x) > 3).length;
  const largest = Math.max(...z.map(Math.abs));
  return (
    `Of ${z.length} means and variances of single channels, ${far} are more than three standard ` +
    `errors from exact theory, where chance alone gives ${(z.length * 0.0027).toFixed(0)}; the ` +
    `farthest is ${largest.toFixed(1)} away.`
  );
}

function describeBias({ cases }: NoiseFile): string {
  const scores = cases.filter(
    ({ placement, commonShare, p }) =>
      placement === 'scores' && commonShare === 0 && Math.abs(p - 0.3) < 0.001,
  );
  const flat = scores.reduce((a, b) => (b.topWeight < a.topWeight ? b : a));
  const peaked = scores.reduce((a, b) => (b.topWeight > a.topWeight ? b : a));
  const middle = scores.reduce((a, b) => (distance(b) < distance(a) ? b : a));
  const rows = [flat, middle, peaked].map(({ p, topWeight, meanTopWeight, approximation }) => [
    p.toFixed(1),
    loss(topWeight),
    loss(meanTopWeight.measured),
    loss(meanTopWeight.theory),
    loss(approximation?.meanTopWeight ?? Number.NaN),
  ]);
  return `Dropout of weights and of context leave the mean as it is. Dropout of scores does not: to
first order it takes p/(1−p) wⱼ (wⱼ − Σᵢ wᵢ²) from a key's mean weight, so that heavy keys lose,
light ones gain, and a flat row stays as it is. In a peaked row, where this approximation ends, the heaviest key
keeps about 1−p of its weight, for it is dropped with probability p:

${table(['p', 'heaviest weight', 'its mean, measured', 'exact', 'first order'], rows)}`;
}

const distance = ({ topWeight }: NoiseCase) => Math.abs(topWeight - 0.5);

function describeLimits(summary: Summary): string {
  const seeds = summary.seeds.length;
  return `- **Equal p is not equal strength.** p is a probability per element, and elements are tokens
  in one placement and channels in another. Which placement puts in more noise at equal p depends on how
  peaked a row is and on what its values have in common, as the charts above show. A difference at
  equal p may be one of strength alone; compare the best p of each placement, or the course over p.
- One small model, one short text, one optimizer, ${seeds} seeds: this shows what happens here,
  where overfitting is strong. It says nothing about large models on large texts, which hardly overfit and
  are often trained without any dropout.
- No other dropout was on (of embeddings, residuals or the MLP). Beside it, effects may differ.
- The best loss of a run is chosen on the text that it is stated for, and the best p likewise: both
  look a little better than new text would. All placements have this advantage alike; no dropout has
  no p to choose.
- The rate, the number of steps and all else were chosen so that a run without dropout overfits
  within a minute, and not for any placement.
- Intervals are over seeds: another text is not covered by them. With ${seeds} seeds they take the
  differences for normally distributed.`;
}

const SOURCES = `- Srivastava, Hinton, Krizhevsky, Sutskever & Salakhutdinov 2014,
  [Dropout: A Simple Way to Prevent Neural Networks from Overfitting](https://jmlr.org/papers/v15/srivastava14a.html)
- Vaswani et al. 2017, [Attention Is All You Need](https://arxiv.org/abs/1706.03762)
- Li et al., CVPR 2023, [DropKey](https://arxiv.org/abs/2208.02646): dropout of scores
- The readers' discussion behind this page: whether dropout comes after the scores, the weights or
  the context, and what each is called, at
  [LLMs-from-scratch #280](https://github.com/rasbt/LLMs-from-scratch/issues/280), and on the factor
  1/(1−p) at [#431](https://github.com/rasbt/LLMs-from-scratch/issues/431)`;

function describeCommands({ run }: Header): string {
  return `\`\`\`sh
npm run experiment   # all runs of ${run.steps} steps, and the noise; goes on where it was stopped
npm run report       # this page and its charts, from the result files
\`\`\`

The files behind this page: [runs.jsonl](placement/runs.jsonl), [noise.json](placement/noise.json).
In your own code, \`dropoutPlacement\` takes ${list(PLACEMENTS.map((name) => `\`'${name}'\``))}.`;
}
