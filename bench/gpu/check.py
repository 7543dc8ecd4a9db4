"""One small forward and backward call through the C ABI against float64, without any library: that
plugin.py and the plugin agree about every structure. Usage: check.py PLUGIN"""
import ctypes
import math
import sys

from plugin import HOST, BackwardTensors, ForwardOutputs, Inputs, Plugin, make_problem

LENGTH, DIM = 5, 16


def wave(phase):
    return [math.sin(12.9898 * i + phase) for i in range(LENGTH * DIM)]


def main():
    plugin = Plugin(sys.argv[1])
    size = LENGTH * DIM * 4

    def upload(values):
        memory = plugin.allocate(size)
        array = (ctypes.c_float * len(values))(*values)
        plugin.copy(memory, 0, ctypes.addressof(array), HOST, size)
        return memory

    def download(memory):
        array = (ctypes.c_float * (LENGTH * DIM))()
        plugin.copy(ctypes.addressof(array), HOST, memory, 0, size)
        return list(array)

    q, k, v, g = (wave(phase) for phase in range(4))
    inputs = Inputs(*(upload(values) for values in (q, k, v)))
    outputs = ForwardOutputs(output=plugin.allocate(size), lse=plugin.allocate(size))
    problem = make_problem((1, 1, LENGTH, DIM), "float32", causal=True)
    plugin.forward(problem, inputs, outputs)
    grad_query, grad_key, grad_value = (plugin.allocate(size) for _ in range(3))
    plugin.backward(problem, inputs, BackwardTensors(outputs.output, outputs.lse, upload(g),
                                                     grad_query, grad_key, grad_value))
    row = lambda values, i: values[i * DIM:(i + 1) * DIM]
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))
    expected, expected_grad = [], [0.0] * (LENGTH * DIM)
    for i in range(LENGTH):
        scores = [dot(row(q, i), row(k, j)) / math.sqrt(DIM) for j in range(i + 1)]
        total = sum(math.exp(score) for score in scores)
        weights = [math.exp(score) / total for score in scores]
        expected += [sum(w * v[j * DIM + d] for j, w in enumerate(weights)) for d in range(DIM)]
        for j, weight in enumerate(weights):
            for d in range(DIM):
                expected_grad[j * DIM + d] += weight * g[i * DIM + d]
    for name, actual, wanted in (("output", outputs.output, expected),
                                 ("grad_value", grad_value, expected_grad)):
        error = max(abs(a - b) for a, b in zip(download(actual), wanted))
        print(f"{name}: largest error {error:.1e}")
        assert error < 1e-5


main()
