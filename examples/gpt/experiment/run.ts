// One training run of the experiment, in a process of its own: takes a job, sends back its row.
import { setImmediate } from 'node:timers/promises';
import { backendInfo } from 'node-sdpa';
import { Trainer } from '../trainer';
import { EVALUATED_EVERY, type Job, readCorpus, settingsOf } from './plan';
import type { Point, Row } from './results';

process.on('disconnect', () => process.exit(1)); // nobody waits for the row any more
process.once('message', async ({ job, steps }: { job: Job; steps: number }) => {
  const row = await runJob(job, steps);
  process.send?.(row, () => process.disconnect());
});

async function runJob(job: Job, steps: number): Promise<Row> {
  const start = performance.now();
  const trainer = new Trainer(settingsOf(job, steps), readCorpus());
  const curve: Point[] = [];
  for (;;) {
    if (trainer.step % EVALUATED_EVERY === 0 || trainer.isFinished) {
      const training = trainer.trainingLoss();
      const validation = trainer.validate();
      curve.push({ step: trainer.step, training, validation });
    }
    if (trainer.isFinished) break;
    trainer.trainStep();
    await setImmediate(); // lets `disconnect` through
  }
  const seconds = (performance.now() - start) / 1000;
  return { ...job, curve, backend: backendInfo().selected, seconds };
}
