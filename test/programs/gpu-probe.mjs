// Prints what this process finds out about its GPUs, and what a call, a tensor and 'auto' give.
import { attentionForwardSync, backendInfo, Tensor } from 'node-sdpa';

const tensor = new Tensor('float32', new Float32Array(4).fill(1), [1, 1, 1, 4]);
const attempt = async (/** @type {() => unknown} */ work) => {
  try {
    return await work();
  } catch (error) {
    const { code, message } = /** @type {NodeJS.ErrnoException} */ (error);
    return `${code} ${message}`;
  }
};
const { gpus, selected, tried } = backendInfo();
process.stdout.write(
  JSON.stringify({
    cuda: tried.find(({ backend }) => backend === 'cuda'),
    gpus,
    selected,
    auto: attentionForwardSync(tensor, tensor, tensor).backend,
    call: await attempt(
      () => attentionForwardSync(tensor, tensor, tensor, { backend: 'cuda' }).backend,
    ),
    tensor: await attempt(async () => {
      const there = await tensor.to('cuda');
      const { location } = there;
      there.dispose();
      return location;
    }),
  }),
);
