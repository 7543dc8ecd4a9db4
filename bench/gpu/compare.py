"""node-sdpa's CUDA kernels against PyTorch's attention, in one process on the same tensors.

Usage: compare.py PLUGIN [--quick] [--kinds KIND ...]. Prints a table and, as its last line, the same
as JSON. First come the ceilings of the device, and what its tensor cores make of low bits.

Every time is between two CUDA events around one call and the wait for its end; subjects take turns
in a fresh random order each round; the median of all rounds is shown. Before that each result is
held against float64, of one head. Operations: 4 * B * H * L * L * D forward (half if causal), times
2.5 backward.
"""
import argparse
import json
import random
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from plugin import BackwardTensors, ForwardOutputs, Inputs, Plugin, make_problem

KINDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
         "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
PRECISIONS = ["highest", "high", "medium"]
#         batch, heads, length, head dim
SHAPES = [(1, 16, 8192, 128), (4, 16, 2048, 128), (2, 16, 4096, 128), (1, 16, 16384, 128),
          (8, 16, 1024, 64), (2, 16, 4096, 64), (2, 8, 4096, 256)]
LONGEST_MATH = 8192  # its weights are matrices in memory
DECODE = (8, 32, 4, 32768, 128)  # batch, query heads, kv heads, keys, head dim


def pointer(tensor):
    return tensor.data_ptr()


class Ours:
    def __init__(self, plugin, precision, hopper=False, placement="weights"):
        self.plugin, self.precision, self.hopper = plugin, precision, hopper
        self.placement = placement

    def prepare(self, tensors, kind, causal, dropout):
        q, k, v, g = tensors
        kv_heads, keys = k.shape[1], k.shape[2]
        problem = make_problem(tuple(q.shape), kind, causal, dropout, self.precision, kv_heads, keys,
                               self.placement)
        inputs = Inputs(pointer(q), pointer(k), pointer(v))
        output = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        grads = [torch.empty_like(t) for t in (q, k, v)]
        outputs = ForwardOutputs(pointer(output), pointer(lse))
        backward = BackwardTensors(pointer(output), pointer(lse), pointer(g), *map(pointer, grads))
        self.kept = (tensors, output, lse, grads)

        def forward():
            self.plugin.configure(self.hopper)
            self.plugin.forward(problem, inputs, outputs)

        def call_backward():
            self.plugin.configure(self.hopper)
            self.plugin.backward(problem, inputs, backward)

        forward()
        return forward, call_backward, output, grads


class Peer:
    def __init__(self, backend):
        self.backend = backend

    def prepare(self, tensors, kind, causal, dropout):
        q, k, v = (t.detach().requires_grad_() for t in tensors[:3])
        g = tensors[3]

        def call():
            with sdpa_kernel(self.backend):
                return scaled_dot_product_attention(
                    q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])

        output = call()
        grads = torch.autograd.grad(output, (q, k, v), g, retain_graph=True)

        def forward():
            with torch.no_grad():
                call()

        backward = lambda: torch.autograd.grad(output, (q, k, v), g, retain_graph=True)
        return forward, backward, output.detach(), grads


def exact(tensors, causal):
    """Output and gradients of the first head in float64, on the GPU."""
    q, k, v, g = (t[:1, :1].double() for t in tensors)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        output = scaled_dot_product_attention(q, k, v, is_causal=causal)
    return output.detach(), torch.autograd.grad(output, (q, k, v), g)


def error(actual, wanted):
    part = actual[:1, :1].double()
    return ((part - wanted).norm() / wanted.norm()).item()


def time_ms(call):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    torch.cuda.current_stream().synchronize()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def race(calls, rounds):
    times = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name in random.sample(list(calls), len(calls)):
            ms = time_ms(calls[name])
            if turn >= 2:  # the first two warm up
                times[name].append(ms)
    return {name: (statistics.median(ms), max(ms) / min(ms)) for name, ms in times.items()}


def measure(plugin, shape, kind, causal, dropout, rounds):
    torch.manual_seed(1)
    tensors = [torch.randn(shape, device="cuda", dtype=KINDS[kind]) for _ in range(4)]
    subjects = {name: Peer(backend) for name, backend in PEERS.items()}
    if shape[2] > LONGEST_MATH:
        del subjects["math"]
    precisions = PRECISIONS if kind == "float32" else PRECISIONS[:2]
    for number, name in enumerate(precisions):
        subjects[f"node-sdpa {name}"] = Ours(plugin, number)
        if torch.cuda.get_device_capability() == (9, 0):
            subjects[f"node-sdpa {name}, Hopper"] = Ours(plugin, number, hopper=True)
            if dropout > 0:
                subjects[f"node-sdpa {name}, Hopper, context"] = Ours(
                    plugin, number, hopper=True, placement="context")
    with_error = dropout == 0  # masks differ from library to library
    wanted = exact(tensors, causal) if with_error else None
    forwards, backwards, errors = {}, {}, {}
    for name, subject in subjects.items():
        try:
            forwards[name], backwards[name], output, grads = subject.prepare(
                tensors, kind, causal, dropout)
            backwards[name]()
            torch.cuda.synchronize()
        except (RuntimeError, torch.cuda.OutOfMemoryError) as reason:
            forwards.pop(name, None), backwards.pop(name, None)
            print(f"  {name}: left out, {str(reason).splitlines()[0][:90]}")
            continue
        if with_error:
            errors[name] = (error(output, wanted[0]),
                            max(error(a, b) for a, b in zip(grads, wanted[1])))
    batch, heads, length, dim = shape
    flops = 4 * batch * heads * length**2 * dim / (2 if causal else 1)
    rows = []
    for direction, calls, factor in (("forward", forwards, 1), ("backward", backwards, 2.5)):
        for name, (ms, spread) in race(calls, rounds).items():
            found = errors.get(name, (None, None))[direction == "backward"]
            rows.append(dict(shape=shape, kind=kind, causal=causal, dropout=dropout,
                             direction=direction, subject=name, ms=ms, spread=spread,
                             tflops=factor * flops / ms / 1e9, error=found))
    return rows


def measure_ceilings(rounds, size=8192):
    """The rates of matrix products and of reading memory."""
    flops, rows = 2 * size**3, []
    for kind, dtype in KINDS.items():
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        ms, spread = race({kind: lambda: torch.mm(a, b)}, rounds)[kind]
        rows.append(dict(direction="matrix product", subject=kind, ms=ms, spread=spread,
                         tflops=flops / ms / 1e9))
        print(f"matrix product of {kind}: {rows[-1]['tflops']:.1f} TFLOP/s")
    source = torch.randn(4 * size, size, device="cuda")
    ms, spread = race({"read": lambda: source.sum()}, rounds)["read"]
    rows.append(dict(direction="read", subject="sum", ms=ms, spread=spread,
                     gigabytes_per_second=source.numel() * 4 / ms / 1e6))
    print(f"reads of memory: {rows[-1]['gigabytes_per_second']:.0f} GB/s")
    return rows


def low_bits(size=4096):
    """How much of 32 products of 2^-n is left beside a sum of 1, which is taken away at the end."""
    shares = {}
    for n in range(18, 29, 2):
        a = torch.zeros(size, 64, device="cuda", dtype=torch.float16)
        b = torch.zeros(64, size, device="cuda", dtype=torch.float16)
        a[:, 0] = a[:, 63] = b[0] = 1
        b[63] = -1
        a[:, 16:48] = b[16:48] = 2.0 ** (-n // 2)
        shares[n] = torch.mm(a, b)[0, 0].item() / (32 * 2.0**-n)
    print("left of 2^-n beside 1: " + ", ".join(f"{n}: {share:.2f}" for n, share in shares.items()))
    return [dict(direction="low bits", shares=shares)]


def measure_decode(plugin, rounds):
    batch, heads, kv_heads, keys, dim = DECODE
    make = lambda *dims: torch.randn(dims, device="cuda", dtype=torch.bfloat16)
    tensors = [make(batch, heads, 1, dim), make(batch, kv_heads, keys, dim),
               make(batch, kv_heads, keys, dim), make(batch, heads, 1, dim)]
    source = torch.cat([t.flatten() for t in tensors[1:3]])
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    calls = {"copy on the device": lambda: target.copy_(source)}
    for name, subject in {"node-sdpa": Ours(plugin, 0), "flash": Peer(PEERS["flash"])}.items():
        calls[name] = subject.prepare(tensors, "bfloat16", False, 0.0)[0]
    rows = []
    for name, (ms, spread) in race(calls, rounds).items():
        moved = 2 * size if name.startswith("copy") else size
        rows.append(dict(shape=DECODE, kind="bfloat16", direction="decode", subject=name, ms=ms,
                         spread=spread, gigabytes_per_second=moved / ms / 1e6))
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("plugin")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS)[::-1])
    options = parser.parse_args()
    rounds = 5 if options.quick else 30
    plugin = Plugin(options.plugin)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    rows = measure_ceilings(rounds) + low_bits()
    for kind in options.kinds:
        for shape in SHAPES[:1] if options.quick else SHAPES:
            for causal, dropout in ((False, 0.0), (True, 0.0), (False, 0.1), (True, 0.1)):
                print(f"\n{kind} {shape}{' causal' if causal else ''}, dropout {dropout}")
                for row in measure(plugin, shape, kind, causal, dropout, rounds):
                    rows.append(row)
                    found = "" if row["error"] is None else f"  error {row['error']:.1e}"
                    print(f"  {row['direction']:9} {row['subject']:34} {row['ms']:8.3f} ms "
                          f"{row['tflops']:7.1f} TFLOP/s  spread {row['spread']:.2f}{found}")
    print(f"\ndecode, bfloat16, {DECODE}")
    for row in measure_decode(plugin, rounds):
        rows.append(row)
        print(f"  {row['subject']:34} {row['ms']:8.3f} ms {row['gigabytes_per_second']:7.0f} GB/s")
    print(json.dumps(rows))


main()
