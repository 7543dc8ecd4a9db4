// The report's charts, as vega-lite descriptions: terms, loss curves, differences, noise.
import { attentionForwardSync, type DropoutPlacement, dropoutMask } from 'node-sdpa';
import { embed, HEAD_DIM, HEADS } from '../../demo/embedding.mjs';
import { PLACEMENT_COLORS } from '../../demo/pictures.mjs';
import type { NoiseCase } from './noise';
import { PLACEMENTS, PROBABILITIES } from './plan';
import { intervalOf } from './statistics';
import { againstNone, type Group, type Measure, type Summary } from './summary';

/** Pale, so that numbers and crosses on them can be read. */
const WEIGHT_COLORS = ['#eef3f8', '#9cc0de'];
const CHANNEL_COLORS = ['#ecd6b0', '#f4f1ea', '#a9d3c8'];
const GRID = { grid: true, gridColor: '#e5e9ef' };
const P_COLORS = ['#a9c7e3', '#6fa3cc', '#2b6ca3', '#0d2f57'];
const NONE_COLOR = '#d9481c';
const INK = '#1f2933';
const LEGEND = { orient: 'bottom', title: null, labelFontSize: 12, symbolOpacity: 1 };
const COLOR_BY_PLACEMENT = {
  field: 'placement',
  type: 'nominal',
  scale: { domain: Object.keys(PLACEMENT_COLORS), range: Object.values(PLACEMENT_COLORS) },
  legend: LEGEND,
};

/** Scores, weights and context of a few tokens, crossed out where dropout of each would drop. */
export function termsChart(): object {
  const tokens = 'Call me Ishmael Some years ago'.split(' ');
  const { query, key, value } = embed(tokens);
  const result = attentionForwardSync(query, key, value, {
    isCausal: true,
    outputs: ['scores', 'weights'],
  });
  const head = 0;
  const stages = [
    {
      ...{
        name: 'scores' as const,
        subtitle: 'scale × query · key, each with each',
        columns: tokens,
      },
      ...{ data: result.scores?.data, width: tokens.length, isCausal: true },
    },
    {
      ...{
        name: 'weights' as const,
        subtitle: 'softmax of the scores; rows sum to 1',
        columns: tokens,
      },
      ...{ data: result.weights?.data, width: tokens.length, isCausal: true },
    },
    {
      name: 'context' as const,
      subtitle: 'weights × value: 6 of its channels',
      columns: tokens.map((_, i) => `${i}`),
      ...{ data: result.output.data, width: HEAD_DIM, isCausal: false },
    },
  ];
  const panels = stages.map(({ name, subtitle, columns, data, width, isCausal }) => {
    const dims = [1, HEADS.length, tokens.length, width];
    const keep = dropoutMask(dims, { p: 0.3, placement: name, seed: 7 });
    const values = tokens.flatMap((token, row) =>
      columns.slice(0, isCausal ? row + 1 : columns.length).map((column, at) => {
        const index = (head * tokens.length + row) * width + at;
        return { token, column, number: Number(data?.[index]), isDropped: keep[index] === 0 };
      }),
    );
    return stagePanel(name, subtitle, tokens, columns, values);
  });
  return {
    title: {
      text: 'Three stages of attention, and what dropout of each crosses out',
      subtitle: [
        'One causal head over six words. Dropped scores leave the softmax, which shares all weight',
        'among the rest; what is kept of weights and of context grows by 1/(1-p).',
      ],
    },
    hconcat: panels,
    spacing: 40,
    resolve: { scale: { color: 'independent', x: 'independent', y: 'shared' } },
  };
}

function stagePanel(
  name: DropoutPlacement,
  subtitle: string,
  rows: readonly string[],
  columns: readonly string[],
  values: readonly object[],
): object {
  const color = { field: 'number', type: 'quantitative', legend: null };
  const range = name === 'context' ? CHANNEL_COLORS : WEIGHT_COLORS;
  const band = { type: 'band', padding: 0 };
  const cross = { type: 'point', shape: 'M-1,-1L1,1M1,-1L-1,1', size: 330, strokeWidth: 2 };
  return {
    title: { text: name, subtitle, fontSize: 14 },
    width: 38 * columns.length,
    height: 30 * rows.length,
    data: { values },
    encoding: {
      x: {
        ...{ field: 'column', type: 'ordinal', sort: columns, scale: band },
        title: name === 'context' ? 'channel' : 'key',
        axis: { labelAngle: name === 'context' ? 0 : -45 },
      },
      y: { field: 'token', type: 'ordinal', sort: rows, scale: band, title: 'query' },
    },
    layer: [
      {
        mark: { type: 'rect', stroke: '#ffffff', strokeWidth: 1.5, cornerRadius: 2 },
        encoding: { color: { ...color, scale: { range, interpolate: 'rgb' } } },
      },
      {
        mark: { type: 'text', fontSize: 10, color: INK },
        encoding: { text: { field: 'number', type: 'quantitative', format: '.2f' } },
      },
      { transform: [{ filter: 'datum.isDropped' }], mark: { ...cross, stroke: NONE_COLOR } },
    ],
  };
}

/** Validation loss against the step, a panel for each placement; bands are 95 % intervals. */
export function curvesChart(summary: Summary): object {
  const names = ['no dropout', ...PROBABILITIES.map((p) => `p = ${p}`)];
  const points = (group: Group, placement: string, series: string) =>
    group.rows[0].curve.map(({ step }, i) => {
      const losses = group.rows.map(({ curve }) => curve[i].validation);
      return { placement: `dropout of ${placement}`, series, step, ...intervalOf(losses) };
    });
  const values = PLACEMENTS.flatMap((placement) => [
    ...points(summary.none, placement, names[0]),
    ...summary.groups
      .filter((group) => group.placement === placement)
      .flatMap((group, i) => points(group, placement, names[i + 1])),
  ]).filter(({ step }) => step > 0); // the loss of random weights would squeeze all others
  const thirds = [1, 2, 3].map((i) => (i * Math.max(...values.map(({ step }) => step))) / 3);
  const scale = { domain: names, range: [NONE_COLOR, ...P_COLORS] };
  const loss = { type: 'quantitative', scale: { zero: false }, title: 'validation loss, nats' };
  return {
    title: {
      text: 'Validation loss while training, without dropout and at four probabilities',
      subtitle: [
        `Means over ${summary.seeds.length} seeds, evaluated without dropout.`,
        'Bands: 95 % confidence intervals of the means.',
      ],
    },
    data: { values },
    facet: {
      column: {
        ...{ field: 'placement', type: 'nominal', title: null },
        sort: PLACEMENTS.map((placement) => `dropout of ${placement}`),
        header: { labelFontSize: 13, labelColor: INK },
      },
    },
    spec: {
      ...{ width: 250, height: 300 },
      encoding: {
        x: { field: 'step', type: 'quantitative', axis: { ...GRID, values: thirds } },
        color: { field: 'series', type: 'nominal', scale, sort: names, legend: LEGEND },
      },
      layer: [
        {
          mark: { type: 'area', opacity: 0.16 },
          encoding: {
            y: { field: 'low', ...loss, axis: GRID },
            y2: { field: 'high' },
          },
        },
        {
          mark: { type: 'line', strokeWidth: 2 },
          encoding: { y: { field: 'mean', ...loss } },
        },
      ],
    },
  };
}

/** Paired differences from no dropout: of the best loss on the left, of the last on the right. */
export function differencesChart(summary: Summary): object {
  const titles = { best: 'best loss of a run', final: 'loss at the end' };
  const values = (['best', 'final'] as const satisfies Measure[]).flatMap((measure) =>
    againstNone(summary, measure).map(({ first, interval }) => ({
      measure: titles[measure],
      placement: first.placement,
      p: `p = ${first.p}`,
      ...interval,
    })),
  );
  const title = 'nats against no dropout; left is better';
  const x = { type: 'quantitative', title, axis: { ...GRID, tickCount: 5 } };
  const rows = {
    y: { field: 'p', type: 'ordinal', title: null, axis: { labelFontSize: 12 } },
    yOffset: { field: 'placement', type: 'nominal', sort: PLACEMENTS },
    color: COLOR_BY_PLACEMENT,
  };
  return {
    title: {
      text: 'What dropout changes in the validation loss',
      subtitle: [
        `Paired differences over ${summary.seeds.length} seeds: the same weights and batches with`,
        'and without dropout. Bars: 95 % confidence intervals.',
      ],
    },
    data: { values },
    facet: {
      column: {
        ...{ field: 'measure', type: 'nominal', title: null, sort: Object.values(titles) },
        header: { labelFontSize: 13, labelColor: INK },
      },
    },
    resolve: { scale: { x: 'independent' } },
    spec: {
      ...{ width: 300, height: { step: 17 } },
      layer: [
        {
          mark: { type: 'rule', color: INK, strokeDash: [4, 4] },
          encoding: { x: { datum: 0, type: 'quantitative' } },
        },
        {
          mark: { type: 'rule', strokeWidth: 2.5 },
          encoding: { ...rows, x: { field: 'low', ...x }, x2: { field: 'high' } },
        },
        {
          mark: { type: 'point', filled: true, size: 60, opacity: 1 },
          encoding: { ...rows, x: { field: 'mean', ...x } },
        },
      ],
    },
  };
}

const NOISE_P = 0.3;
const commonTitle = (share: number) =>
  share === 0 ? 'values independent' : `values ${100 * share} % in common`;

/** Size of the noise and correlation of channels, theory as lines and measurements as dots. */
export function noiseChart(cases: readonly NoiseCase[]): object {
  const shown = cases.filter(({ p }) => Math.abs(p - NOISE_P) < 0.001);
  const shares = [...new Set(shown.map(({ commonShare }) => commonShare))];
  const panels = (['noise', 'correlation'] as const).flatMap((quantity) =>
    shares.map((share) =>
      theoryPanel(
        quantity === 'noise' ? `Noise, ${commonTitle(share)}` : `Channels, ${commonTitle(share)}`,
        quantity === 'noise' ? 'deviation / length of context' : 'mean |correlation| of two',
        shown
          .filter(({ commonShare }) => commonShare === share)
          .map((each) => ({
            ...{ placement: each.placement, topWeight: each.topWeight },
            ...each[quantity],
          })),
        { encoding: COLOR_BY_PLACEMENT, axis: { ...GRID, tickCount: 5 } },
      ),
    ),
  );
  return {
    title: {
      text: `The noise of each placement at equal p = ${NOISE_P}`,
      subtitle: 'Lines: exact theory in float64. Dots: measured on the package.',
    },
    concat: panels,
    columns: 2,
    spacing: 40,
  };
}

/** What dropout of scores does to the mean weight of the heaviest key. */
export function biasChart(cases: readonly NoiseCase[]): object {
  const values = cases
    .filter(({ placement, commonShare }) => placement === 'scores' && commonShare === 0)
    .map(({ p, topWeight, meanTopWeight }) => ({
      ...{ series: `p = ${p.toFixed(1)}`, topWeight },
      ...meanTopWeight,
    }));
  const scale = { domain: PROBABILITIES.map((p) => `p = ${p.toFixed(1)}`), range: P_COLORS };
  const panel = theoryPanel(
    'Dropout of scores flattens peaked rows',
    'its mean weight under dropout',
    values,
    {
      encoding: { field: 'series', type: 'nominal', scale, legend: LEGEND },
      axis: { ...GRID, tickCount: 5 },
    },
  );
  const unbiased = {
    data: { values: [{ at: 0 }, { at: 1 }] },
    mark: { type: 'line', strokeDash: [4, 4], strokeWidth: 1.5, color: INK },
    encoding: {
      x: { field: 'at', type: 'quantitative' },
      y: { field: 'at', type: 'quantitative' },
      color: { value: INK },
    },
  };
  return {
    ...panel,
    title: {
      text: 'Dropout of scores flattens peaked rows',
      subtitle: [
        'Lines: exact theory. Dots: measured. Dashed: no bias, as under dropout of weights',
        'and of context.',
      ],
    },
    ...{ width: 460, height: 320, layer: [unbiased, ...panel.layer] },
  };
}

interface TheoryPoint {
  readonly topWeight: number;
  readonly theory: number;
  readonly measured: number;
}

function theoryPanel(
  title: string,
  quantity: string,
  values: readonly TheoryPoint[],
  { encoding, axis }: { encoding: object; axis: object },
) {
  const x = { field: 'topWeight', type: 'quantitative', title: "the heaviest key's weight" };
  const y = { type: 'quantitative', title: quantity };
  return {
    title: { text: title, fontSize: 13 },
    ...{ width: 290, height: 200 },
    data: { values },
    encoding: { x: { ...x, axis, scale: { domain: [0, 1] } }, color: encoding },
    layer: [
      {
        mark: { type: 'line', strokeWidth: 2 },
        encoding: { y: { field: 'theory', ...y, axis } },
      },
      {
        mark: { type: 'point', filled: true, size: 42, opacity: 1 },
        encoding: { y: { field: 'measured', ...y } },
      },
    ],
  };
}
