// Which pictures the demo draws, and from which numbers.
import { attend, DROPOUT_P, decisions } from './attention.mjs';
import { embed, HEAD_DIM, HEADS } from './embedding.mjs';
import { attentionMap, contextMap, save, sideBySide, unbiasednessChart } from './pictures.mjs';

const PICTURED_HEAD = 0;

/**
 * Writes all pictures into the folder and gives their names.
 * @param {string} folder
 * @param {string} title of the text
 * @param {string[]} tokens
 * @param {Record<string, {seeds: number, error: number}[]>} courses of the means, by placement
 */
export async function draw(folder, title, tokens, courses) {
  const { undropped, weights, context, scores } = drawMaps(tokens);
  const head = `Head: ${HEADS[PICTURED_HEAD]?.name}`;
  const about = [title, `${head}. Dropout p = ${DROPOUT_P}; × is dropped.`];
  const one = 'One attention head';
  const pair = (/** @type {string} */ placement, /** @type {object} */ picture) =>
    sideBySide(`${one} and dropout of its ${placement}`, about, [undropped, picture]);
  const pictures = {
    attention: sideBySide(`${one}, undropped and under each placement of dropout`, about, [
      undropped,
      weights,
      scores,
      context,
    ]),
    'attention-undropped': sideBySide(one, [title, head], [undropped]),
    'attention-weights': pair('weights', weights),
    'attention-scores': pair('scores', scores),
    'attention-context': pair('context', context),
    unbiasedness: unbiasednessChart(courses),
  };
  for (const [name, picture] of Object.entries(pictures)) await save(folder, name, picture);
  return Object.keys(pictures);
}

/** The pictured head undropped and under each placement. @param {string[]} tokens */
function drawMaps(tokens) {
  const inputs = embed(tokens);
  const count = tokens.length;
  const at = (/** @type {ArrayLike<number>} */ data, /** @type {number} */ columns) => {
    return (/** @type {number} */ row, /** @type {number} */ column) =>
      data[(PICTURED_HEAD * count + row) * columns + column] ?? Number.NaN;
  };
  const isDropped = (/** @type {import('./attention.mjs').Placement} */ placement) => {
    const keep = at(decisions(placement, count), placement === 'context' ? HEAD_DIM : count);
    return (/** @type {number} */ row, /** @type {number} */ column) => keep(row, column) === 0;
  };
  return {
    undropped: attentionMap({
      title: 'Undropped',
      subtitle: ['The weights of each row sum to 1.'],
      tokens,
      columns: count,
      valueAt: at(attend(inputs, 'none').weights, count),
      isDropped: () => false,
    }),
    weights: attentionMap({
      title: 'Dropout of weights',
      subtitle: ['A query loses tokens after the softmax; the rest grow by 1/(1-p).'],
      tokens,
      columns: count,
      valueAt: at(attend(inputs, 'weights').droppedWeights, count),
      isDropped: isDropped('weights'),
    }),
    scores: attentionMap({
      title: 'Dropout of scores',
      subtitle: ['A query loses keys before the softmax; the rest share their weight.'],
      tokens,
      columns: count,
      valueAt: at(attend(inputs, 'scores').droppedWeights, count),
      isDropped: isDropped('scores'),
    }),
    context: contextMap({
      title: 'Dropout of context',
      subtitle: ['The weights stay as they are; a query loses channels of its result.'],
      tokens,
      columns: HEAD_DIM,
      valueAt: at(attend(inputs, 'context').output, HEAD_DIM),
      isDropped: isDropped('context'),
    }),
  };
}
