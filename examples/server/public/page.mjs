/// <reference lib="dom" />
/// <reference lib="dom.iterable" />
// The page: writes a text as it arrives, colours it by doubt, and shows where the model looks.

/**
 * A character of the text, and what is known of it.
 * @typedef {object} Character
 * @property {string} text
 * @property {HTMLSpanElement} span
 * @property {number} [probability] of the character, where the model wrote it
 * @property {number} [entropy] in nats: of all that could have come here
 * @property {Prediction} [asked] by many samples
 *
 * @typedef {object} Prediction
 * @property {string | null} character
 * @property {number | null} mean
 * @property {number | null} spread
 * @property {number} entropy
 * @property {number} expectedEntropy
 * @property {number} mutualInformation
 * @property {{character: string, mean: number}[]} likeliest
 *
 * @typedef {object} Maps
 * @property {number} layers
 * @property {number} heads
 * @property {number} length
 * @property {Float32Array} weights [layers, heads, length, length]
 * @property {number} first where in the text they begin
 */

/** @template {HTMLElement} T @param {string} id @returns {T} */
const find = (id) => /** @type {T} */ (document.getElementById(id));

/** @type {HTMLFormElement} */ const write = find('write');
/** @type {HTMLFormElement} */ const ask = find('ask');
/** @type {HTMLFormElement} */ const look = find('look');
/** @type {HTMLButtonElement} */ const start = find('start');
/** @type {HTMLButtonElement} */ const stop = find('stop');
/** @type {HTMLSelectElement} */ const measure = find('measure');
/** @type {HTMLSelectElement} */ const layer = find('layer');
/** @type {HTMLSelectElement} */ const head = find('head');
/** @type {HTMLCanvasElement} */ const canvas = find('weights');
const text = find('text');
const details = find('details');

/** The page is drawn once in so long, however fast characters come. */
const FRAME_MS = 30;

/** @type {Character[]} */ let characters = [];
/** @type {Maps | null} */ let maps = null;
let chosen = -1;
let longest = 1;
let vocabulary = 2;
/** @type {AbortController | null} */ let writing = null;

/** Beside a form's buttons. @param {HTMLFormElement} form @param {string | Error} message */
function say(form, message) {
  const line = /** @type {HTMLElement} */ (form.querySelector('.status'));
  const isError = message instanceof Error;
  line.textContent = isError ? message.message : message;
  line.classList.toggle('error', isError);
}

/** @param {string} url @param {object} body @param {AbortSignal} [signal] */
async function post(url, body, signal) {
  const response = await fetch(url, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body),
    signal,
  });
  if (response.ok) return response;
  const { error } = await response.json();
  throw new Error(error.message);
}

/** What a form says, without what was left empty; numbers as numbers. @param {HTMLFormElement} form */
function valuesOf(form) {
  /** @type {Record<string, string | number>} */
  const values = {};
  for (const element of form.elements) {
    if (!(element instanceof HTMLInputElement || element instanceof HTMLSelectElement)) continue;
    if (element.name === '' || element.value === '') continue;
    values[element.name] = element.type === 'number' ? Number(element.value) : element.value;
  }
  return values;
}

/** @param {string} piece @param {Partial<Character>} known */
function append(piece, known) {
  const span = document.createElement('span');
  span.textContent = piece;
  span.id = `character-${characters.length}`;
  span.role = 'option';
  if (piece.trim() === '') span.ariaLabel = named(piece);
  if (known.entropy === undefined) span.className = 'given';
  text.append(span);
  characters.push({ text: piece, span, ...known });
  paint(characters.length - 1);
}

/** From 0, sure, to 1, at a loss. @param {Character} character */
function doubtOf({ entropy, asked }) {
  const most = Math.log(vocabulary);
  if (measure.value === 'entropy') return (asked?.entropy ?? entropy ?? 0) / most;
  // Disagreement and spread are small numbers: full colour is at a tenth of what is possible.
  if (measure.value === 'spread') return 10 * (asked?.spread ?? 0);
  return (10 * (asked?.mutualInformation ?? 0)) / most;
}

/** @param {number} index */
function paint(index) {
  const { span } = characters[index];
  const doubt = Math.min(1, doubtOf(characters[index]));
  span.style.setProperty('--doubt', (0.75 * doubt).toFixed(3));
}

function paintAll() {
  characters.forEach((_, index) => {
    paint(index);
  });
}

/** @param {number} share */
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
/** @param {string | null} character */
const named = (character) =>
  character === ' ' ? 'space' : character === '\n' ? 'new line' : `“${character}”`;

/** @param {number} index */
function choose(index) {
  characters[chosen]?.span.classList.remove('chosen');
  characters[chosen]?.span.removeAttribute('aria-selected');
  chosen = Math.max(0, Math.min(characters.length - 1, index));
  const character = characters[chosen];
  if (character === undefined) return;
  character.span.classList.add('chosen');
  character.span.ariaSelected = 'true';
  text.setAttribute('aria-activedescendant', character.span.id);
  character.span.scrollIntoView({ block: 'nearest' });
  const { asked, probability, entropy } = character;
  const parts = [`Character ${chosen + 1}, ${named(character.text)}`];
  if (asked) {
    parts.push(
      `${percent(asked.mean ?? 0)} ± ${percent(asked.spread ?? 0)}`,
      `all doubt ${asked.entropy.toFixed(2)} nats`,
      `of it disagreement ${asked.mutualInformation.toFixed(3)}`,
      `likeliest ${asked.likeliest.map((l) => `${named(l.character)} ${percent(l.mean)}`).join(', ')}`,
    );
  } else if (probability !== undefined && entropy !== undefined) {
    parts.push(percent(probability), `doubt ${entropy.toFixed(2)} nats`);
  } else parts.push('yours');
  details.textContent = `${parts.join('; ')}.`;
  showWeights();
}

function clear() {
  text.replaceChildren();
  text.removeAttribute('aria-activedescendant');
  characters = [];
  maps = null;
  chosen = -1;
  details.textContent = '';
  find('map').hidden = true;
}

/** The lines of a response, as many at once as have arrived. @param {Response} response */
async function* linesOf(response) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split('\n');
    rest = /** @type {string} */ (lines.pop());
    yield lines.map((line) => JSON.parse(line));
    await new Promise((resolve) => setTimeout(resolve, FRAME_MS));
  }
}

write.addEventListener('submit', async (event) => {
  event.preventDefault();
  writing?.abort();
  const own = new AbortController();
  writing = own;
  clear();
  const prompt = /** @type {HTMLTextAreaElement} */ (find('prompt')).value;
  for (const character of prompt) append(character, {});
  [start.disabled, stop.disabled] = [true, false];
  say(write, 'Writing …');
  let seed = '';
  let written = 0;
  let hasEnded = false;
  try {
    const response = await post('/generate', { prompt, ...valuesOf(write) }, own.signal);
    for await (const lines of linesOf(response)) {
      for (const { type, seed: given, message, text, ...known } of lines) {
        if (type === 'start') seed = given;
        if (type === 'error') throw new Error(message);
        if (type === 'end') hasEnded = true;
        if (type !== 'token') continue;
        written++;
        append(text, known);
      }
      text.scrollTop = text.scrollHeight;
    }
    if (!hasEnded) throw new Error('the connection was lost');
    say(write, `${written} characters written, seed ${seed}.`);
  } catch (error) {
    const isOver = own.signal.aborted;
    say(write, isOver ? `Stopped after ${written} characters.` : /** @type {Error} */ (error));
  }
  [start.disabled, stop.disabled] = [false, true];
});

stop.addEventListener('click', () => {
  writing?.abort();
  start.focus();
});

/** The end of the text that the model sees at once: where it begins, and what it is. */
function lastPart() {
  const first = Math.max(0, characters.length - longest);
  const part = characters.slice(first).map((character) => character.text);
  if (part.length === 0) throw new Error('there is no text yet: press Write first');
  return { first, part: part.join('') };
}

/**
 * Lets a form do what it is for, and tells how it went.
 * @param {HTMLFormElement} form @param {() => Promise<string>} work
 */
function onSubmit(form, work) {
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    say(form, 'Asking …');
    say(form, await work().catch((error) => error));
  });
}

onSubmit(ask, async () => {
  const { first, part } = lastPart();
  const shown = characters;
  const response = await post('/uncertainty', { text: part, ...valuesOf(ask) });
  const { predictions, samples, backends } = await response.json();
  if (shown !== characters) return '';
  predictions.forEach((/** @type {Prediction} */ prediction, /** @type {number} */ i) => {
    const character = characters[first + i + 1];
    if (character !== undefined) character.asked = prediction;
  });
  paintAll();
  if (chosen >= 0) choose(chosen);
  return `Asked ${samples} times, computed by ${backends.join(' and ')}.`;
});

measure.addEventListener('change', paintAll);

onSubmit(look, async () => {
  const { first, part } = lastPart();
  const shown = characters;
  const response = await post('/attention', { text: part });
  const { weights, ...sizes } = await response.json();
  if (shown !== characters) return ''; // another text was begun meanwhile
  const bytes = Uint8Array.from(atob(weights), (byte) => byte.charCodeAt(0));
  maps = { ...sizes, weights: new Float32Array(bytes.buffer), first };
  find('map').hidden = false;
  choose(chosen < first ? characters.length - 1 : chosen);
  return `The weights of ${sizes.layers} layers with ${sizes.heads} heads each.`;
});

for (const select of [layer, head]) select.addEventListener('change', showWeights);

/** Draws the map of a head, and underlines what the chosen character looks at. */
function showWeights() {
  for (const { span } of characters) span.classList.remove('seen');
  if (maps === null) return;
  const { heads, length, weights, first } = maps;
  const from = (layer.selectedIndex * heads + head.selectedIndex) * length * length;
  const own = weights.subarray(from, from + length * length);
  drawMap(own, length, chosen - first);
  if (chosen < first || chosen >= first + length) {
    find('caption').textContent = 'Choose a character to see where it looks.';
    return;
  }
  const row = own.subarray((chosen - first) * length, (chosen - first + 1) * length);
  const most = row.reduce((a, b) => Math.max(a, b), 0);
  row.forEach((weight, i) => {
    const { span } = characters[first + i];
    span.classList.toggle('seen', weight > most / 4);
    span.style.setProperty('--weight', (weight / most).toFixed(3));
  });
  const ranked = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 3);
  const places = ranked.map(
    (i) => `${named(characters[first + i].text)} at ${first + i + 1} (${percent(row[i])})`,
  );
  find('caption').textContent =
    `Layer ${layer.value}, head ${head.value}: each row is a character, each column one that it ` +
    `sees. ${named(characters[chosen].text)} at ${chosen + 1} looks at ${places.join(', ')}.`;
}

/**
 * Draws each row against its largest weight.
 * @param {Float32Array} weights [length, length] @param {number} length
 * @param {number} row that is chosen
 */
function drawMap(weights, length, row) {
  canvas.width = length;
  canvas.height = length;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext('2d'));
  const heat = getComputedStyle(document.documentElement).getPropertyValue('--heat').split(' ');
  const image = context.createImageData(length, length);
  for (let y = 0; y < length; y++) {
    const own = weights.subarray(y * length, (y + 1) * length);
    const most = own.reduce((a, b) => Math.max(a, b), 0);
    own.forEach((weight, x) => {
      const shade = Math.max(weight / most, y === row ? 0.15 : 0);
      image.data.set([...heat.map(Number), 255 * shade], 4 * (y * length + x));
    });
  }
  context.putImageData(image, 0, 0);
}

text.addEventListener('click', (event) => {
  const index = characters.findIndex(({ span }) => span === event.target);
  if (index >= 0) choose(index);
});

text.addEventListener('keydown', (event) => {
  /** @type {Record<string, number>} */
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 };
  const step = steps[event.key];
  if (step !== undefined) choose(chosen + step);
  else if (event.key === 'Home') choose(0);
  else if (event.key === 'End') choose(characters.length - 1);
  else return;
  event.preventDefault();
});

canvas.addEventListener('click', (event) => {
  if (maps !== null) {
    choose(maps.first + Math.floor((event.offsetY / canvas.clientHeight) * maps.length));
  }
});

/** @param {HTMLSelectElement} select @param {number} count */
function number(select, count) {
  for (let i = 1; i <= count; i++) select.add(new Option(`${i}`));
}

const response = await fetch('/model');
const model = await response.json();
longest = model.sizes.length;
vocabulary = model.sizes.vocabulary;
number(layer, model.sizes.layers);
number(head, model.sizes.heads);
/** @type {HTMLTextAreaElement} */ (find('prompt')).maxLength = model.limits.prompt;
for (const name of ['characters', 'samples']) {
  const input = document.querySelector(`input[name=${name}]`);
  if (input instanceof HTMLInputElement) input.max = model.limits[name];
}
find('about').textContent =
  `A small GPT writes on, one character at a time. It learned ${model.title} in ${model.step} steps; ` +
  `it sees ${longest} characters at once.`;
