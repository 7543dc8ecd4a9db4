"""libsdpa_cuda.so from Python: the C ABI of native/cuda/plugin.h, read from the headers' own lists."""
import ctypes
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST = -1
TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}


def problem_fields():
    """The fields of a Problem: the list in core/problem.h is the only one."""
    header = (ROOT / "native/core/problem.h").read_text()
    kinds = {"float": ctypes.c_float, "double": ctypes.c_double, "int32_t": ctypes.c_int32}
    found = re.findall(r"FIELD\((\w+), (\w+)\)", header)
    return [(name, kinds.get(kind, ctypes.c_uint32)) for kind, name in found if kind != "type"]


def pointers(*names):
    return [(name, ctypes.c_void_p) for name in names]


class Problem(ctypes.Structure):
    _fields_ = problem_fields()


class Inputs(ctypes.Structure):
    _fields_ = pointers("query", "key", "value", "mask", "keep_mask", "causal_offsets", "kv_lengths",
                        "key_blocks")


class ForwardOutputs(ctypes.Structure):
    _fields_ = pointers("output", "lse", "scores", "weights", "dropped_weights", "mean", "variance")


class BackwardTensors(ctypes.Structure):
    _fields_ = pointers("output", "lse", "grad_output", "grad_query", "grad_key", "grad_value",
                        "grad_mask")


class Sequences(ctypes.Structure):
    _fields_ = pointers("query_starts", "key_starts", "key_blocks") + [("width", ctypes.c_size_t)]


class CancelToken(ctypes.Structure):
    _fields_ = [("cancelled", ctypes.c_bool), ("external", ctypes.c_void_p)]


class Call(ctypes.Structure):
    _fields_ = [("device", ctypes.c_int), ("on_device", ctypes.c_bool)] + pointers(
        "problem", "sequences", "inputs", "arrays") + [("array_count", ctypes.c_size_t)]


class Copy(ctypes.Structure):
    _fields_ = [("from_device", ctypes.c_int), ("to_device", ctypes.c_int),
                ("from_", ctypes.c_void_p), ("to", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


class Status(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("message", ctypes.c_char_p)]


class Settings(ctypes.Structure):
    _fields_ = [("memory_limit", ctypes.c_size_t), ("hopper", ctypes.c_bool)]


FUNCTIONS = ("open", "describe", "configure", "memory_use", "allocate", "release", "copy",
             "forward", "backward", "dropout_mask")


PLACEMENTS = ("weights", "context", "scores")


class Table(ctypes.Structure):
    _fields_ = [("abi", ctypes.c_uint32), ("version", ctypes.c_char_p)] + pointers(*FUNCTIONS)


def abi():
    header = (ROOT / "native/cuda/plugin.h").read_text()
    return int(re.search(r"kPluginAbi = (\d+)", header).group(1))


class Plugin:
    """Raises RuntimeError with the plugin's own message where it cannot be used."""

    def __init__(self, path):
        entry = ctypes.CDLL(str(path)).sdpa_cuda_plugin
        entry.restype = ctypes.POINTER(Table)
        table = entry(ctypes.c_uint32(abi()))
        if not table:
            raise RuntimeError(f"{path} has another ABI than {abi()}")
        self.table = table.contents
        self.never = CancelToken()
        self.none = Sequences()
        count = ctypes.c_int()
        self._run("open", ctypes.byref(count))

    def _run(self, name, *arguments):
        prototype = ctypes.CFUNCTYPE(Status, *[ctypes.c_void_p] * len(arguments))
        addresses = [ctypes.cast(argument, ctypes.c_void_p) for argument in arguments]
        status = prototype(getattr(self.table, name))(*addresses)
        if status.code != 0:
            raise RuntimeError(f"{name}: {status.message.decode()}")

    def configure(self, hopper):
        """Whether GPUs of compute capability 9.0 use the kernels made for them."""
        prototype = ctypes.CFUNCTYPE(None, ctypes.POINTER(Settings))
        prototype(self.table.configure)(ctypes.byref(Settings(0, hopper)))

    def allocate(self, size):
        memory = ctypes.c_void_p()
        prototype = ctypes.CFUNCTYPE(Status, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p)
        status = prototype(self.table.allocate)(0, size, ctypes.addressof(memory))
        if status.code != 0:
            raise RuntimeError(status.message.decode())
        return memory.value

    def copy(self, to, to_device, source, from_device, size):
        copy = Copy(from_device, to_device, source, to, size)
        self._run("copy", ctypes.byref(copy), ctypes.byref(self.never))

    def _call(self, problem, inputs):
        address = ctypes.addressof
        return Call(0, True, address(problem), address(self.none), address(inputs), None, 0)

    def forward(self, problem, inputs, outputs):
        call = self._call(problem, inputs)
        self._run("forward", ctypes.byref(call), ctypes.byref(outputs), ctypes.byref(self.never))

    def backward(self, problem, inputs, tensors):
        call = self._call(problem, inputs)
        self._run("backward", ctypes.byref(call), ctypes.byref(tensors), ctypes.byref(self.never))


def make_problem(shape, kind, causal=False, dropout=0.0, precision=0, kv_heads=None, keys=None,
                 placement="weights"):
    """A Problem for [batch, heads, length, dim] tensors."""
    batch, heads, length, dim = shape
    problem = Problem()
    values = dict(batch=batch, query_heads=heads, kv_heads=kv_heads or heads, query_length=length,
                  key_length=keys or length, head_dim=dim, value_dim=dim, type=TYPES[kind],
                  key_type=TYPES[kind], mask_batch=1, mask_heads=1, mask_queries=1, mask_keys=1,
                  is_causal=int(causal), window_left=-1, window_right=-1, scale=dim**-0.5,
                  dropout_p=dropout, dropout_placement=PLACEMENTS.index(placement), seed_lo=1,
                  precision=precision)
    for name, value in values.items():
        setattr(problem, name, value)
    return problem
