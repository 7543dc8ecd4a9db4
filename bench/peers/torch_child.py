"""The process of PyTorch, a reference: does what each line on standard input asks, as child.mjs."""

import ctypes
import json
import os
import re
import sys
import time

import torch
import torch.nn.functional as F

# As in timing.mjs.
TURN_SECONDS = 0.015
WARM_UP_SECONDS = 0.005
LONG_MS = 1000
NAMES = ("query", "key", "value", "gradOutput")
replies = os.fdopen(os.dup(1), "w")
sys.stdout = sys.stderr
runs = {}


def read_inputs(problem, folder):
    """[batch, heads, length, headDim]"""
    tensors = []
    for name in NAMES:
        length = problem["queryLength" if name in ("query", "gradOutput") else "keyLength"]
        shape = (problem["batch"], problem["heads"], length, problem["headDim"])
        count = shape[0] * shape[1] * shape[2] * shape[3]
        file = os.path.join(folder, name)
        if os.path.exists(file):
            data = torch.from_file(file, size=count, dtype=torch.float32)
            tensors.append(data.reshape(shape).clone())
    return tensors


def prepare(problem, folder):
    query, key, value, *rest = read_inputs(problem, folder)
    is_causal = problem["options"].get("isCausal", False)
    if not problem["isBackward"]:

        def forward():
            with torch.no_grad():
                return [F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)]

        return forward
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = F.scaled_dot_product_attention(*inputs, is_causal=is_causal)
    return lambda: torch.autograd.grad(output, inputs, rest[0], retain_graph=True)


def describe(_):
    return {"version": torch.__version__}


def check(request):
    torch.set_num_threads(request["subject"]["threads"])
    call = prepare(request["problem"], request["folder"])
    outputs = [output.contiguous() for output in call()]
    for i, output in enumerate(outputs):
        with open(os.path.join(request["folder"], f"output-{i}"), "wb") as file:
            file.write(ctypes.string_at(output.data_ptr(), output.numel() * 4))
    runs[request["id"]] = (call, request["subject"]["threads"], [])
    return {"outputs": len(outputs), "form": request["subject"]["form"]}


def turn(request):
    call, threads, times = runs[request["id"]]
    torch.set_num_threads(threads)
    count = len(times)
    is_long = any(ms > LONG_MS for ms in times)
    end = time.perf_counter() + (0 if is_long else WARM_UP_SECONDS)
    while time.perf_counter() < end:
        call()
    end = time.perf_counter() + TURN_SECONDS
    while len(times) == count or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return {"times": times[count:]}


def release(_):
    runs.clear()
    return {}


def measure_memory(request):
    torch.set_num_threads(request["subject"]["threads"])
    call = prepare(request["problem"], request["folder"])
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status_bytes("VmRSS")
    outputs = call()
    peak = status_bytes("VmHWM")
    return {"extraBytes": peak - before - sum(4 * output.numel() for output in outputs)}


def status_bytes(name):
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(name + r":\s*(\d+) kB", file.read()).group(1))


actions = {
    "describe": describe,
    "check": check,
    "turn": turn,
    "release": release,
    "measureMemory": measure_memory,
}
for line in sys.stdin:
    request = json.loads(line)
    try:
        reply = actions[request["action"]](request)
    except Exception as error:
        reply = {"error": str(error)}
    print(json.dumps(reply), file=replies, flush=True)
