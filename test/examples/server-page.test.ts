// The page of examples/server in headless Chromium, on a desktop, on a phone, and by keyboard alone.
import { existsSync } from 'node:fs';
import type { FastifyInstance } from 'fastify';
import { type Browser, chromium, type Page } from 'playwright-core';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { createCheckpoint, SIZES, serve } from './server-model';

const CHROMIUM = '/usr/bin/chromium';
const isHere = existsSync(CHROMIUM);
if (!isHere && process.env.CI) throw new Error(`${CHROMIUM} is not here: apt-get install chromium`);
if (!isHere) console.log(`skipped: ${CHROMIUM} is not here (apt-get install chromium)`);

describe.skipIf(!isHere)('the page', () => {
  let app: FastifyInstance;
  let url: string;
  let browser: Browser;
  let remove: () => void;

  beforeAll(async () => {
    const checkpoint = createCheckpoint();
    remove = checkpoint.remove;
    ({ app, url } = await serve({ checkpoint: checkpoint.file, limits: { characters: 20_000 } }));
    browser = await chromium.launch({
      executablePath: CHROMIUM,
      args: [
        '--headless',
        '--no-sandbox',
        '--disable-gpu',
        '--disable-quic',
        '--no-first-run',
        '--disable-background-networking',
        '--disable-component-update',
        '--disable-sync',
      ],
    });
  });
  afterAll(async () => {
    await browser?.close();
    await app?.close();
    remove?.();
  });

  /** Opens the page, does something with it, and looks for what a browser complains about. */
  async function open(
    width: number,
    height: number,
    work: (page: Page) => Promise<void>,
    expected: unknown[] = [],
  ) {
    const page = await browser.newPage({ viewport: { width, height } });
    page.setDefaultTimeout(10_000);
    const complaints: string[] = [];
    page.on('pageerror', (error) => complaints.push(error.message));
    page.on('console', (message) => {
      if (message.type() !== 'log') complaints.push(message.text());
    });
    await page.goto(url);
    await page.waitForFunction(() => document.querySelectorAll('#head option').length > 0);
    await work(page);
    expect(complaints).toEqual(expected);
    await page.close();
  }

  const status = (page: Page, form: string) => page.locator(`#${form} .status`);
  const said = (page: Page, form: string, what: RegExp) =>
    status(page, form).filter({ hasText: what }).waitFor();

  describe.each([
    ['a desktop', 1280, 900],
    ['a phone', 390, 844],
  ])('on %s', (_name, width, height) => {
    test('writes, asks and looks', () =>
      open(width, height, async (page) => {
        await page.getByLabel('Your beginning').fill('Call me');
        await page.getByLabel('Characters').fill('60');
        await page.getByLabel('Seed').fill('7');
        await page.getByRole('button', { name: 'Write' }).click();
        await said(page, 'write', /^60 characters written, seed 7\.$/);
        const text = page.getByRole('listbox', { name: 'The text' });
        expect(await text.locator('span').count()).toBe(67);
        expect(await text.textContent()).toMatch(/^Call me[\s\S]{60}$/);

        // What the model wrote is coloured by its entropy, what was given is not.
        const doubts = await text
          .locator('span')
          .evaluateAll((all) => all.map((span) => Number(span.style.getPropertyValue('--doubt'))));
        expect(doubts.slice(0, 7)).toEqual([0, 0, 0, 0, 0, 0, 0]);
        for (const doubt of doubts.slice(7)) expect(doubt).toBeGreaterThan(0);
        const colour = (i: number) =>
          text
            .locator('span')
            .nth(i)
            .evaluate((span) => getComputedStyle(span).backgroundColor);
        expect(await colour(0)).toMatch(/, 0\)$/);
        expect(await colour(20)).not.toMatch(/, 0\)$/);

        await page.getByLabel('Times', { exact: true }).fill('4');
        await page.getByRole('combobox', { name: 'Drop' }).selectOption('scores');
        await page.getByRole('button', { name: 'Ask', exact: true }).click();
        await said(page, 'ask', /^Asked 4 times, computed by [a-z0-9:]+\.$/);
        await page.getByLabel('Colour by').selectOption('disagreement');
        await text.locator('span').nth(30).click();
        expect(await page.locator('#details').textContent()).toMatch(
          /^Character 31, .* ± .* nats; of it disagreement 0\.\d+; likeliest .*\.$/,
        );

        await page.getByLabel('Layer').selectOption('2');
        await page.getByRole('button', { name: 'Look' }).click();
        await said(page, 'look', /^The weights of 2 layers with 2 heads each\.$/);
        const caption = page.locator('#caption');
        expect(await caption.textContent()).toMatch(/^Layer 2, head 1: .* at 31 looks at .* %\)/);
        const drawn = await page.locator('canvas').evaluate((element) => {
          const canvas = element as HTMLCanvasElement;
          const { data } = canvas.getContext('2d')!.getImageData(0, 0, canvas.width, canvas.height);
          const shades = data.filter((_, i) => i % 4 === 3);
          const at = (row: number, column: number) => shades[row * canvas.width + column];
          return { size: canvas.width, first: at(0, 0), future: at(10, 11), past: at(40, 3) };
        });
        expect(drawn).toMatchObject({ size: 67, first: 255, future: 0 });
        expect(drawn.past).toBeGreaterThan(0);

        // Nothing sticks out to the side, and a finger hits what there is to hit.
        expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBe(width);
        for (const control of await page.locator('button, input, select, textarea').all()) {
          expect((await control.boundingBox())!.height).toBeGreaterThanOrEqual(44);
        }
      }));
  });

  test('by keyboard alone', () =>
    open(1280, 900, async (page) => {
      const focused = () =>
        page.evaluate(() => {
          const element = document.activeElement as HTMLElement;
          const { outlineStyle, outlineWidth } = getComputedStyle(element);
          const name = element.id || element.getAttribute('name') || element.textContent?.trim();
          return { name, hasRing: outlineStyle !== 'none' && outlineWidth !== '0px' };
        });
      const order: (string | undefined)[] = [];
      for (let i = 0; i < 16; i++) {
        await page.keyboard.press('Tab');
        const { name, hasRing } = await focused();
        expect(hasRing, `${name} shows that it has the focus`).toBe(true);
        order.push(name);
      }
      // Stop is off while nothing is written.
      const fields = ['prompt', 'characters', 'temperature', 'topK', 'seed', 'start', 'text'];
      const more = ['placement', 'p', 'samples', 'measure', 'Ask', 'layer', 'head', 'Look'];
      expect(order).toEqual(['Skip to the text', ...fields, ...more]);

      await page.locator('#write [name=characters]').focus();
      await page.keyboard.press('Control+A');
      await page.keyboard.type('30');
      await page.keyboard.press('Enter');
      await said(page, 'write', /^30 characters written/);
      await page.locator('#text').focus();
      await page.keyboard.press('Home');
      await page.keyboard.press('ArrowRight');
      await page.keyboard.press('ArrowRight');
      expect(await page.locator('#details').textContent()).toBe('Character 3, “l”; yours.');
      const active = await page.locator('#text').getAttribute('aria-activedescendant');
      expect(await page.locator(`#${active}`).getAttribute('aria-selected')).toBe('true');
      await page.keyboard.press('End');
      expect(await page.locator('#details').textContent()).toMatch(/^Character 37, .* nats\.$/);
    }));

  test('every control has a name, and what changes is announced', () =>
    open(390, 844, async (page) => {
      for (const control of await page.locator('button, input, select, textarea').all()) {
        const name = await control.evaluate((element) => {
          const { labels } = element as HTMLInputElement;
          return (labels?.[0] ?? element).textContent?.trim();
        });
        expect(name).toMatch(/\w/);
      }
      expect(await page.locator('[aria-live=polite]').count()).toBe(5);
      expect(await page.locator('html').getAttribute('lang')).toBe('en');
    }));

  test('stops what it no longer wants, and tells what went wrong', () => {
    const work = async (page: Page) => {
      await page.getByLabel('Characters').fill('20000');
      await page.getByRole('button', { name: 'Write' }).click();
      await page.waitForFunction(() => document.querySelectorAll('#text span').length > 20);
      const health = async () => (await fetch(`${url}/healthz`)).json();
      expect((await health()).running).toBe(1);
      await page.getByRole('button', { name: 'Stop' }).click();
      await said(page, 'write', /^Stopped after \d+ characters\.$/);
      for (let i = 0; i < 100 && (await health()).running > 0; i++) await page.waitForTimeout(10);
      expect((await health()).running).toBe(0);

      await page.getByLabel('Your beginning').fill('鯨');
      await page.getByLabel('Characters').fill('10');
      await page.getByRole('button', { name: 'Write' }).click();
      await said(page, 'write', /^"鯨" is not in the text that was learned$/);
    };
    return open(390, 844, work, [expect.stringContaining('status of 400')]); // Chromium's own line
  });

  test('a text longer than the model sees is asked about from its end', () =>
    open(1280, 900, async (page) => {
      await page.getByLabel('Characters').fill(`${2 * SIZES.length}`);
      await page.getByRole('button', { name: 'Write' }).click();
      await said(page, 'write', /characters written/);
      await page.getByRole('button', { name: 'Look' }).click();
      await said(page, 'look', /^The weights/);
      expect(await page.locator('#caption').textContent()).toMatch(/ at 199 looks at /);
      await page.locator('#text span').first().click();
      expect(await page.locator('#caption').textContent()).toMatch(/^Choose a character/);
    }));
});
