"""A simulated CUDA device for the tests: its tensors say `cuda:0` and hold CPU data

`install()` patches torch in this process. Afterwards `tensor.to("cuda")` gives a `SimulatedTensor`: operations compute on
the CPU, mixed devices and `numpy()` raise as on CUDA, and every copy between host and device and every wait for the device
is noted in the open `record()` blocks, with its thread and the line of the package that asked for it.
Kernels, streams, cuDNN, NCCL, torch.compile, the choice of attention kernels and their rounding are not simulated.
"""

import importlib.util
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
import torch._dynamo  # it must see torch before `install` changes it
from torch import Tensor

DEVICE = torch.device("cuda", 0)
BF16 = True  # whether the device multiplies bf16; may be set at any time
MEMORY = 16 << 30  # bytes of the device
TO_DEVICE, TO_DEVICE_WAITS = "to device, pinned", "to device, waits"
TO_HOST, TO_HOST_WAITS = "to host, pinned", "to host, waits"
VALUE, SIZE, SYNCHRONIZE = "value read, waits", "size read, waits", "synchronize, waits"
SIZE_READERS = "nonzero masked_select _unique2 unique_dim unique_consecutive bincount repeat_interleave _coalesce".split()
FACTORIES = "zeros ones empty full eye arange linspace rand randn randint randperm tensor as_tensor sparse_coo_tensor".split()
FACTORIES += "zeros_like ones_like empty_like full_like rand_like randn_like".split()
CUDA_ONLY = {  # operations without a CPU kernel
    torch.ops.aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    torch.ops.aten.bmm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
}
REAL: dict[str, Any] = {}  # what `install` replaced
CARD = {"state": torch.Generator().manual_seed(0).get_state()}  # the device's own random state

# ---- The log


@dataclass(frozen=True)
class Entry:
    "A copy between host and device, or a wait for the device"

    kind: str  # one of the kinds above
    thread: str  # "main" or "other"
    place: str  # module and function of the package, such as "training.steps.read"; empty outside of it
    line: int  # in that module
    bytes: int  # copied

    @property
    def waits(self) -> bool:
        "Whether the thread stands still until the device has done its work"
        return self.kind.endswith("waits")


_FOLDER = str(Path(importlib.util.find_spec("pclclip_nb").origin).parent)  # of the package, whose lines are named
_logs: list[list[Entry]] = []  # of the `record` blocks that are open


@contextmanager
def record() -> Iterator[list[Entry]]:
    "Collect the copies and waits of a `with` block, of all threads"
    log: list[Entry] = []
    _logs.append(log)
    try:
        yield log
    finally:
        _logs[:] = [other for other in _logs if other is not log]


def table(log: list[Entry]) -> pd.DataFrame:
    "Calls and bytes for each thread, kind and place"
    rows = pd.DataFrame([vars(entry) for entry in log], columns=["thread", "kind", "place", "bytes"])
    groups = rows.groupby(["thread", "kind", "place"])["bytes"]
    return groups.agg(calls="size", bytes="sum").reset_index()


def note(kind: str, x: Tensor | None = None) -> None:
    "Append a copy or a wait to the open logs; its bytes are those of x"
    if not _logs: return
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_FOLDER): frame = frame.f_back
    place, line = "", 0
    if frame is not None:
        module = Path(frame.f_code.co_filename).relative_to(_FOLDER).with_suffix("").parts
        place, line = ".".join([*module, frame.f_code.co_name]), frame.f_lineno
    thread = "main" if threading.current_thread() is threading.main_thread() else "other"
    size = x.numel() * x.element_size() if x is not None and x.layout is torch.strided else 0
    for log in _logs: log.append(Entry(kind, thread, place, line, size))


# ---- Pinned memory

_pinned: set[int] = set()  # addresses of pinned storages


def pin(x: Tensor) -> Tensor:
    "Mark the memory of a host tensor, and so of its views, as pinned"
    storage = x.untyped_storage()
    _pinned.add(storage.data_ptr())
    weakref.finalize(storage, _pinned.discard, storage.data_ptr())
    return x


def is_pinned(x: Tensor, device: Any = None) -> bool:
    "Whether a tensor lies in pinned memory of the host"
    on_host = x.layout is torch.strided and not isinstance(x, SimulatedTensor)
    return on_host and x.untyped_storage().data_ptr() in _pinned


def pin_memory(x: Tensor, device: Any = None) -> Tensor:
    "A pinned copy of a host tensor"
    if isinstance(x, SimulatedTensor) or x.layout is not torch.strided:
        raise RuntimeError(f"cannot pin a {x.layout} tensor on {x.device}: only dense CPU tensors can be pinned (simulated)")
    return x if is_pinned(x) else pin(x.clone())


# ---- Tensors


def mapped(f: Callable, x: Any) -> Any:
    "f of everything in nested lists, tuples and dictionaries"
    if isinstance(x, list | tuple): return type(x)([mapped(f, y) for y in x])
    return {name: mapped(f, y) for name, y in x.items()} if isinstance(x, dict) else f(x)


def tensors_in(*nested: Any) -> list[Tensor]:
    "All tensors in nested lists, tuples and dictionaries"
    found = []
    mapped(lambda x: found.append(x) if isinstance(x, Tensor) else None, nested)
    return found


def inner_of(x: Any) -> Any:
    "The CPU tensor of a device tensor; anything else as it is"
    return x.inner if isinstance(x, SimulatedTensor) else x


def rows_on_host(x: Any) -> bool:
    "Whether x is a host tensor that CUDA does not accept beside device tensors (it accepts numbers)"
    return isinstance(x, Tensor) and not isinstance(x, SimulatedTensor) and x.dim() > 0


class SimulatedTensor(Tensor):
    "A tensor that says it is on the device; its data is the CPU tensor `inner`"

    @staticmethod
    def __new__(cls, inner: Tensor):
        strided = inner.layout is torch.strided
        form = dict(strides=inner.stride(), storage_offset=inner.storage_offset()) if strided else {}
        form |= dict(dtype=inner.dtype, layout=inner.layout, device="cpu")
        return Tensor._make_wrapper_subclass(cls, inner.size(), **form)

    def __init__(self, inner: Tensor):
        self.inner = inner

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self): return DEVICE.index
    def record_stream(self, stream): return None
    def __repr__(self, **kwargs): return f"SimulatedTensor({self.inner!r})"

    def __array__(self, *args, **kwargs):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first (simulated)")

    numpy = __array__

    def tolist(self):
        note(VALUE, self)
        return self.inner.tolist()

    def __reduce_ex__(self, protocol):
        note(TO_HOST_WAITS, self)
        copied = self.inner.detach().clone()
        if isinstance(self, torch.nn.Parameter): copied = torch.nn.Parameter(copied, self.requires_grad)
        return copied.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = SimulatedTensor(self.inner.clone())
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if parameter else copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        check_devices(getattr(func, "__name__", str(func)), args, kwargs)
        device = kwargs.pop("device", None)
        if device is not None and torch.device(device).type != "cuda":  # such as zeros_like(x, device="cpu")
            return func(*mapped(inner_of, args), **mapped(inner_of, kwargs), device=device)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name not in ("device", "pin_memory")}
        if torch.Tag.inplace_view in func.tags: raise NotImplementedError(f"{func} changes a shape in place: not simulated")
        note_operation(func._schema.name.removeprefix("aten::"), args, kwargs)
        given = {id(inner_of(x)): x for x in tensors_in(args, kwargs)}

        def outer(x):
            if not isinstance(x, Tensor): return x
            return given[id(x)] if id(x) in given else SimulatedTensor(x)

        with card_random_state() if torch.Tag.nondeterministic_seeded in func.tags else nullcontext():
            result = CUDA_ONLY.get(func, func)(*mapped(inner_of, args), **mapped(inner_of, kwargs))
        return mapped(outer, result)


def check_devices(name: str, args: tuple, kwargs: dict) -> None:
    "Raise a RuntimeError where CUDA refuses a mixture of host and device tensors"
    tensors = tensors_in(args, kwargs)
    if name == "copy_" or not any(map(rows_on_host, tensors)): return
    if name in ("__getitem__", "__setitem__"):
        base, index, *value = args
        indices = tensors_in(index)
        if rows_on_host(base) and any(isinstance(x, SimulatedTensor) for x in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu) (simulated)")
        one_device = not any(isinstance(x, Tensor) and x.dim() and rows_on_host(x) != rows_on_host(base) for x in value)
        if one_device or not indices: return  # a CPU index is copied, as is a value for a slice
    shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
    raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu: {shapes} (simulated)")


def note_operation(name: str, args: tuple, kwargs: dict) -> None:
    "Note the copies and waits of an operation of ATen"
    if name in ("_local_scalar_dense", "equal"): note(VALUE, args[0])
    if name in SIZE_READERS and "output_size" not in kwargs: note(SIZE)
    if name == "copy_": note_copy(args[0], args[1], (*args, kwargs.get("non_blocking", False))[2])
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [x for x in args[1] if x is not None]
        for x in filter(rows_on_host, indices): note(TO_DEVICE_WAITS, x)
        fills = name != "index" and args[2].numel() == 1  # x[mask] = number is a masked_fill
        if not fills and any(x.dtype in (torch.bool, torch.uint8) for x in indices): note(SIZE)


def note_copy(target: Tensor, source: Tensor, non_blocking: bool) -> None:
    "Note a copy if it is between host and device"
    to_device = isinstance(target, SimulatedTensor)
    if to_device == isinstance(source, SimulatedTensor): return
    host = source if to_device else target
    free = non_blocking and is_pinned(host) and host.is_contiguous() and target.dtype == source.dtype
    free_kind, waiting_kind = (TO_DEVICE, TO_DEVICE_WAITS) if to_device else (TO_HOST, TO_HOST_WAITS)
    note(free_kind if free else waiting_kind, host)


# ---- From host to device and back


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return SimulatedTensor(x.detach().clone())
    @staticmethod
    def backward(ctx, grad): return inner_of(grad)


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.inner.detach().clone()
    @staticmethod
    def backward(ctx, grad): return SimulatedTensor(grad)


def to(self: Tensor, *args, copy: bool = False, **kwargs) -> Tensor:
    "`Tensor.to`, from and to the simulated device too"
    like = args[0] if args and isinstance(args[0], Tensor) else None
    form = args if like is None else (like.device, like.dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*form, **kwargs)
    here = isinstance(self, SimulatedTensor)
    there = here if device is None else device.type == "cuda"
    if not here and not there: return REAL["to"](self, *args, copy=copy, **kwargs)
    if there and not here:
        free = non_blocking and is_pinned(self) and self.is_contiguous() and dtype in (None, self.dtype)
        note(TO_DEVICE if free else TO_DEVICE_WAITS, self)
        self = _ToDevice.apply(self)
    elif here and not there:
        note(TO_HOST if non_blocking else TO_HOST_WAITS, self)
        self = pin(_ToHost.apply(self)) if non_blocking else _ToHost.apply(self)  # torch pins its own target
    options = {} if memory_format is None else {"memory_format": memory_format}
    with torch._C.DisableTorchFunctionSubclass():
        return REAL["to"](self, dtype=dtype or self.dtype, copy=copy and here == there, **options)


def _factory(name: str) -> Callable:
    "A function of torch that makes tensors, on the simulated device and in pinned memory too"
    real = getattr(torch, name)

    def make(*args, device=None, pin_memory=False, **kwargs):
        on_device = device is not None and torch.device(device).type == "cuda"
        if name == "as_tensor" and isinstance(args[0], Tensor): return args[0].to(device or args[0].device, *args[1:], **kwargs)
        if not on_device:
            made = real(*args, **kwargs) if device is None else real(*args, device=device, **kwargs)
            return pin(made) if pin_memory else made
        requires_grad = kwargs.pop("requires_grad", False)
        with card_random_state() if name.startswith("rand") else nullcontext():
            made = real(*args, **kwargs)
        if name in ("tensor", "as_tensor", "sparse_coo_tensor") and not isinstance(made, SimulatedTensor): note(TO_DEVICE_WAITS, made)
        return (made if isinstance(made, SimulatedTensor) else SimulatedTensor(made)).requires_grad_(requires_grad)

    make.__name__ = name
    return make


# ---- torch.cuda


@contextmanager
def card_random_state() -> Iterator[None]:
    "Draw from the random state of the device instead of the host's"
    host = torch.get_rng_state()
    torch.set_rng_state(CARD["state"])
    try:
        yield
    finally:
        CARD["state"] = torch.get_rng_state()
        torch.set_rng_state(host)


def get_rng_state(device: Any = DEVICE) -> Tensor:
    "The random state of the device"
    note(TO_HOST_WAITS, CARD["state"])
    return CARD["state"].clone()


def set_rng_state(state: Tensor, device: Any = DEVICE) -> None:
    "Set the random state of the device"
    if isinstance(state, SimulatedTensor) or state.dtype != torch.uint8: raise TypeError("RNG state must be a torch.ByteTensor")
    CARD["state"] = state.clone()


def manual_seed(seed: int) -> None:
    "Seed the device"
    CARD["state"] = torch.Generator().manual_seed(seed).get_state()


def get_device_properties(device: Any = None) -> SimpleNamespace:
    "Name, memory and compute capability"
    major, minor = (8, 0) if BF16 else (7, 5)
    return SimpleNamespace(name="simulated CUDA device", total_memory=MEMORY, multi_processor_count=1, major=major, minor=minor)


def nothing(*args, **kwargs) -> None:
    "What streams and memory pools do here"


class Queue:
    "A stream or an event of the device, on which all work is done at once"

    seconds, cuda_stream = 0.0, 0
    __init__ = wait = wait_stream = wait_event = nothing

    def record(self, stream=None): self.seconds = time.perf_counter()
    def elapsed_time(self, later): return 1000 * (later.seconds - self.seconds)
    def synchronize(self): note(SYNCHRONIZE)
    def query(self): return True
    def record_event(self, event=None):
        event = event or Queue()
        event.record()
        return event


def cuda_functions() -> dict[str, Any]:
    "What replaces names of `torch.cuda`"
    replaced = dict(manual_seed=manual_seed) | dict.fromkeys(("Stream", "Event", "current_stream", "default_stream"), Queue)
    replaced |= dict(get_rng_state=get_rng_state, set_rng_state=set_rng_state, manual_seed_all=manual_seed)
    replaced |= dict(get_device_properties=get_device_properties, synchronize=lambda device=None: note(SYNCHRONIZE))
    replaced["is_bf16_supported"] = lambda including_emulation=True: BF16 or including_emulation
    replaced["get_device_name"] = lambda device=None: get_device_properties().name
    replaced["get_device_capability"] = lambda device=None: (get_device_properties().major, get_device_properties().minor)
    replaced["mem_get_info"] = lambda device=None: (MEMORY, MEMORY)
    replaced |= dict.fromkeys(("is_available", "is_initialized"), lambda: True)
    replaced |= dict.fromkeys(("device", "stream"), lambda which=None: nullcontext())
    replaced |= dict.fromkeys(("init", "_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats"), nothing)
    replaced |= dict(device_count=lambda: 1, set_sync_debug_mode=nothing, is_current_stream_capturing=lambda: False)
    zeros = ("current_device", "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "get_sync_debug_mode")
    return replaced | dict.fromkeys(zeros, lambda device=None: 0)


def _autocast_class() -> type:
    "Autocast whose kind `cuda` is that of the CPU"

    class Autocast(REAL["autocast"]):
        def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
            on_device = device_type == "cuda"
            if on_device and enabled and dtype is torch.bfloat16 and not BF16:
                raise RuntimeError("Current CUDA Device does not support bfloat16. Please switch dtype to float16. (simulated)")
            dtype = torch.float16 if on_device and dtype is None else dtype
            super().__init__("cpu" if on_device else device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)

    return Autocast


def _by_device(lists: list, with_indices: bool = False) -> dict:
    "Groups of an optimiser's tensors, under the device that they say they are on"
    groups = REAL["groups"](lists, with_indices)
    return {(group[0][0][0].device, dtype): group for (_, dtype), group in groups.items()}


def _compatible(x: Tensor, y: Tensor) -> bool:
    "Whether `Module.to` may exchange the data of a parameter instead of the parameter"
    return not isinstance(x, SimulatedTensor) and not isinstance(y, SimulatedTensor) and REAL["compatible"](x, y)


def install(bf16: bool = True) -> None:
    "Patch torch in this process, once; `bf16` tells whether the device multiplies bf16"
    global BF16
    BF16 = bf16
    if REAL: return
    optimizer = torch.optim.Optimizer
    REAL.update(to=Tensor.to, cpu=Tensor.cpu, autocast=torch.autocast, compatible=torch._has_compatible_shallow_copy_type)
    REAL["groups"] = optimizer._group_tensors_by_device_and_dtype
    methods = dict(to=to, type_as=lambda self, other: to(self, other), pin_memory=pin_memory, is_pinned=is_pinned)
    methods["cpu"] = lambda self, *args, **kwargs: to(self, "cpu") if self.is_cuda else REAL["cpu"](self, *args, **kwargs)
    methods["cuda"] = lambda self, device=None, non_blocking=False, **kwargs: to(self, DEVICE, non_blocking=non_blocking, **kwargs)
    for name, method in methods.items(): setattr(Tensor, name, method)
    for name in FACTORIES: setattr(torch, name, _factory(name))
    for name, function in cuda_functions().items(): setattr(torch.cuda, name, function)
    torch.autocast = torch.amp.autocast = torch.amp.autocast_mode.autocast = _autocast_class()
    torch._has_compatible_shallow_copy_type = _compatible
    optimizer._group_tensors_by_device_and_dtype = staticmethod(_by_device)
    optimizer._accelerator_graph_capture_health_check = lambda self: None  # there are no graphs
