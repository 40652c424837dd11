"""A simulated CUDA device for the tests: its tensors say `cuda:0` and hold CPU data.

`install()` patches torch in this process. Afterwards `tensor.to("cuda")` gives a `SimulatedTensor`: operations compute on
the CPU; a mixture of devices raises as CUDA would; `numpy()` raises; every copy between host and device and every wait for
the device is noted with its thread and the line of the package that asked for it, as long as a `record()` block is open.
Real kernels, streams, cuDNN, NCCL, the inductor, the choice of attention kernels and rounding are not simulated.
"""

import importlib.util
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # it must see torch before `install` changes it
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
BF16 = True  # whether the device multiplies bf16; set it before a network is made
TOTAL_MEMORY = 16 << 30  # bytes
TO_DEVICE, TO_DEVICE_WAITS = "to device, pinned", "to device, waits"
TO_HOST, TO_HOST_WAITS = "to host, pinned", "to host, waits"
VALUE, SIZE, SYNCHRONIZE = "value read, waits", "size read, waits", "synchronize, waits"
FACTORIES = (
    "zeros ones empty full eye arange linspace rand randn randint randperm tensor as_tensor sparse_coo_tensor".split()
)
FACTORIES += "zeros_like ones_like empty_like full_like rand_like randn_like".split()
SIZE_READERS = {  # their result has a size that the host must know
    f"aten::{name}"
    for name in "nonzero masked_select _unique2 unique_dim unique_consecutive bincount repeat_interleave _coalesce".split()
}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
REAL: dict[str, Any] = {}  # what `install` replaced
CARD = {"state": torch.Generator().manual_seed(0).get_state()}  # the device's own random state


# ---- The log


@dataclass(frozen=True)
class Entry:
    "A copy between host and device, or a wait for the device"

    kind: str  # one of the kinds above
    thread: str  # "main" or "thread"
    module: str  # of the package, such as "training.steps"; empty if none of its lines was running
    function: str  # in that module
    line: int  # in that module
    bytes: int  # copied

    @property
    def waits(self) -> bool:
        "Whether the thread stands still until the device has done all its work"
        return self.kind not in (TO_DEVICE, TO_HOST)


_logs: list[list[Entry]] = []  # of the `record` blocks that are open


@contextmanager
def record() -> Iterator[list[Entry]]:
    "Collect what happens inside a `with` block, in all threads"
    log: list[Entry] = []
    _logs.append(log)
    try:
        yield log
    finally:
        _logs[:] = [other for other in _logs if other is not log]


def table(log: list[Entry]) -> list[dict]:
    "Rows (thread, kind, place, calls, bytes) of a log, the most frequent first"
    counts, sizes = Counter(), Counter()
    for entry in log:
        key = (entry.thread, entry.kind, f"{entry.module}.{entry.function}")
        counts[key] += 1
        sizes[key] += entry.bytes
    names = ("thread", "kind", "place")
    return [dict(zip(names, key, strict=True)) | {"calls": n, "bytes": sizes[key]} for key, n in counts.most_common()]


def _package_folder() -> str:
    "Folder of the package, whose lines are named in the log"
    spec = importlib.util.find_spec("pclclip_nb")
    return str(Path(spec.origin).parent) if spec else "no package"


_FOLDER = _package_folder()


def note(kind: str, n_bytes: int = 0) -> None:
    "Append to the open logs"
    if not _logs:
        return
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_FOLDER):
        frame = frame.f_back
    place = ("", "", 0)
    if frame is not None:
        path = Path(frame.f_code.co_filename).relative_to(_FOLDER).with_suffix("")
        place = (".".join(path.parts), frame.f_code.co_name, frame.f_lineno)
    thread = "main" if threading.current_thread() is threading.main_thread() else "thread"
    for log in _logs:
        log.append(Entry(kind, thread, *place, n_bytes))


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
    if isinstance(x, SimulatedTensor) or x.layout is not torch.strided:
        return False
    return x.untyped_storage().data_ptr() in _pinned


def pin_memory(x: Tensor, device: Any = None) -> Tensor:
    "A pinned copy of a host tensor"
    if isinstance(x, SimulatedTensor) or x.layout is not torch.strided:
        raise RuntimeError(f"cannot pin a {x.layout} tensor on {x.device}: only dense CPU tensors can be pinned")
    return x if is_pinned(x) else pin(x.clone())


# ---- Tensors


class SimulatedTensor(Tensor):
    "A tensor that says it is on the device; its data is the CPU tensor `inner`"

    @staticmethod
    def __new__(cls, inner: Tensor):
        strided = inner.layout is torch.strided
        form = dict(strides=inner.stride(), storage_offset=inner.storage_offset()) if strided else {}
        shape = dict(dtype=inner.dtype, layout=inner.layout, device="cpu", **form)
        return Tensor._make_wrapper_subclass(cls, inner.size(), **shape)

    def __init__(self, inner: Tensor):
        self.inner = inner

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self):
        return 0

    def __repr__(self, **kwargs):
        return f"SimulatedTensor({self.inner!r})"

    def __array__(self, *args, **kwargs):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first (simulated)")

    numpy = __array__

    def tolist(self):
        note(VALUE, number_of_bytes(self))
        return self.inner.tolist()

    def record_stream(self, stream):
        return None

    def __reduce_ex__(self, protocol):
        note(TO_HOST_WAITS, number_of_bytes(self))
        return host_copy(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = SimulatedTensor(self.inner.clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        check_devices(getattr(func, "__name__", str(func)), args, kwargs)
        asked = kwargs.pop("device", None)
        if asked is not None and torch.device(asked).type != "cuda":  # such as zeros_like(x, device="cpu")
            return func(*tree_map(inner_of, args), **tree_map(inner_of, kwargs), device=asked)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name not in ("device", "pin_memory")}
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} changes a shape in place: not simulated")
        note_waits(func._schema.name, args, kwargs)
        given = {id(inner_of(x)): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}

        def outer(x):
            if not isinstance(x, Tensor):
                return x
            return given[id(x)] if id(x) in given else SimulatedTensor(x)

        with card_random_state() if torch.Tag.nondeterministic_seeded in func.tags else nullcontext():
            result = func(*tree_map(inner_of, args), **tree_map(inner_of, kwargs))
        return tree_map(outer, result)


def inner_of(x: Any) -> Any:
    "The CPU tensor of a device tensor; anything else as it is"
    return x.inner if isinstance(x, SimulatedTensor) else x


def number_of_bytes(x: Tensor) -> int:
    "Of a dense tensor; 0 of a sparse one"
    return x.numel() * x.element_size() if x.layout is torch.strided else 0


def host_copy(x: SimulatedTensor) -> Tensor:
    "The same leaf on the host"
    copied = x.inner.detach().clone()
    if isinstance(x, torch.nn.Parameter):
        return torch.nn.Parameter(copied, x.requires_grad)
    return copied.requires_grad_(x.requires_grad)


def on_host(x: Any) -> bool:
    "Whether x is a host tensor that no operation takes beside device tensors (a 0-dim one it takes)"
    return isinstance(x, Tensor) and not isinstance(x, SimulatedTensor) and x.dim() > 0


def check_devices(name: str, args: tuple, kwargs: dict) -> None:
    "Raise a RuntimeError where CUDA refuses a mixture of host and device tensors"
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not any(map(on_host, leaves)) or name == "copy_":
        return
    if name in ("__getitem__", "__setitem__"):
        base, index, *value = args
        indices = [x for x in tree_leaves(index) if isinstance(x, Tensor)]
        if on_host(base) and any(isinstance(x, SimulatedTensor) for x in indices):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu) (simulated)"
            )
        if (
            not value
            or not indices
            or on_host(base) == on_host(value[0])
            or not isinstance(value[0], Tensor)
            or not value[0].dim()
        ):
            return
    shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in leaves)
    raise RuntimeError(
        f"{name}: Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu: {shapes} (simulated)"
    )


def note_waits(name: str, args: tuple, kwargs: dict) -> None:
    "Note the copies and waits of an operation"
    if name in ("aten::_local_scalar_dense", "aten::equal"):
        note(VALUE, number_of_bytes(args[0]))
    elif name in SIZE_READERS and "output_size" not in kwargs:
        note(SIZE)
    elif name == "aten::copy_":
        note_copy(args[0], args[1], (*args, kwargs.get("non_blocking", False))[2])
    elif name in INDEXED:
        indices = [x for x in args[1] if x is not None]
        masks = [x for x in indices if x.dtype in (torch.bool, torch.uint8)]
        fills = name != "aten::index" and args[2].numel() == 1  # x[mask] = number is a masked_fill
        for x in filter(on_host, indices):
            note(TO_DEVICE_WAITS, number_of_bytes(x))
        if masks and not fills:
            note(SIZE)


def note_copy(target: Tensor, source: Tensor, non_blocking: bool) -> None:
    "Note a copy if it is between host and device"
    to_device, from_device = (isinstance(x, SimulatedTensor) for x in (target, source))
    if to_device == from_device:
        return
    host = source if to_device else target
    free = non_blocking and is_pinned(host) and host.is_contiguous() and target.dtype == source.dtype
    kinds = {True: (TO_DEVICE, TO_DEVICE_WAITS), False: (TO_HOST, TO_HOST_WAITS)}[to_device]
    note(kinds[0] if free else kinds[1], number_of_bytes(host))


# ---- Moving


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return SimulatedTensor(x.detach().clone())

    @staticmethod
    def backward(ctx, grad):
        return inner_of(grad)


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.inner.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return SimulatedTensor(grad)


def to(self: Tensor, *args, copy: bool = False, **kwargs) -> Tensor:
    "`Tensor.to`, to and from the simulated device too"
    given = args
    if args and isinstance(args[0], Tensor):
        given = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*given, **kwargs)
    here = isinstance(self, SimulatedTensor)
    there = here if device is None else device.type == "cuda"
    if not here and not there:
        return REAL["to"](self, *args, copy=copy, **kwargs)
    if here != there:
        if there:
            note(
                TO_DEVICE
                if non_blocking and is_pinned(self) and self.is_contiguous() and dtype in (None, self.dtype)
                else TO_DEVICE_WAITS,
                number_of_bytes(self),
            )
        else:
            note(TO_HOST if non_blocking else TO_HOST_WAITS, number_of_bytes(self))  # torch pins what it makes itself
        self = (_ToDevice if there else _ToHost).apply(self)
        if non_blocking and not there:
            pin(self)
    form = {} if memory_format is None else {"memory_format": memory_format}
    with torch._C.DisableTorchFunctionSubclass():
        return REAL["to"](self, dtype=dtype or self.dtype, copy=copy and here == there, **form)


def _factory(name: str) -> Callable:
    "A function of torch that makes tensors, on the simulated device and in pinned memory too"
    real = getattr(torch, name)

    def make(*args, device=None, pin_memory=False, requires_grad=False, **kwargs):
        if isinstance(device, int):
            device = torch.device("cuda", device)
        if device is None or torch.device(device).type != "cuda":
            extra = {
                name: value
                for name, value in (("device", device), ("requires_grad", requires_grad))
                if value not in (None, False)
            }
            if name == "as_tensor" and device is not None and isinstance(args[0], Tensor):
                args = (args[0].to(device), *args[1:])
            made = real(*args, **extra, **kwargs)
            return pin(made) if pin_memory else made
        if name == "as_tensor" and isinstance(args[0], Tensor):
            return args[0].to(device, kwargs.get("dtype"))
        with card_random_state() if name.startswith("rand") else nullcontext():
            made = real(*args, **kwargs)
        if not isinstance(made, SimulatedTensor):
            if name in ("tensor", "as_tensor", "sparse_coo_tensor"):
                note(TO_DEVICE_WAITS, number_of_bytes(made))
            made = SimulatedTensor(made)
        return made.requires_grad_(requires_grad)

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


def set_rng_state(state: Tensor, device: Any = DEVICE) -> None:
    "Set the random state of the device"
    if isinstance(state, SimulatedTensor) or state.dtype != torch.uint8:
        raise TypeError("RNG state must be a torch.ByteTensor")
    CARD["state"] = state.clone()


def get_rng_state(device: Any = DEVICE) -> Tensor:
    "The random state of the device"
    note(TO_HOST_WAITS, len(CARD["state"]))
    return CARD["state"].clone()


class Event:
    "A moment on the device; all work is done at once, so it is the present one"

    def __init__(self, *args, **kwargs):
        self.seconds = 0.0

    def record(self, stream=None):
        self.seconds = time.perf_counter()

    def elapsed_time(self, later):
        return 1000 * (later.seconds - self.seconds)

    def synchronize(self):
        note(SYNCHRONIZE)

    def wait(self, stream=None):
        return None

    def query(self):
        return True


class Stream:
    "A queue of work on the device; all work is done at once"

    def __init__(self, *args, **kwargs):
        self.cuda_stream = 0

    def synchronize(self):
        note(SYNCHRONIZE)

    def wait_stream(self, stream):
        return None

    def wait_event(self, event):
        return None

    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event

    def query(self):
        return True


def cuda_functions() -> dict[str, Any]:
    "What replaces names of `torch.cuda`"
    capability = lambda device=None: (8, 0) if BF16 else (7, 5)  # noqa: E731
    properties = SimpleNamespace(name="simulated CUDA device", total_memory=TOTAL_MEMORY, multi_processor_count=1)
    nothing = lambda *args, **kwargs: None  # noqa: E731
    zero = lambda device=None: 0  # noqa: E731
    seed = lambda seed: set_rng_state(torch.Generator().manual_seed(seed).get_state())  # noqa: E731
    return {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "is_initialized": lambda: True,
        "init": nothing, "_lazy_init": nothing, "set_device": nothing, "device": lambda device: nullcontext(),
        "get_device_name": lambda device=None: properties.name, "get_device_capability": capability,
        "get_device_properties": lambda device=None: SimpleNamespace(**vars(properties), **dict(zip(("major", "minor"), capability(), strict=True))),
        "is_bf16_supported": lambda including_emulation=True: BF16 or including_emulation,
        "mem_get_info": lambda device=None: (TOTAL_MEMORY, TOTAL_MEMORY), "empty_cache": nothing,
        "memory_allocated": zero, "max_memory_allocated": zero, "memory_reserved": zero, "max_memory_reserved": zero,
        "reset_peak_memory_stats": nothing, "synchronize": lambda device=None: note(SYNCHRONIZE),
        "Stream": Stream, "Event": Event, "current_stream": Stream, "default_stream": Stream, "stream": lambda stream: nullcontext(),
        "get_rng_state": get_rng_state, "set_rng_state": set_rng_state, "manual_seed": seed, "manual_seed_all": seed,
        "set_sync_debug_mode": nothing, "get_sync_debug_mode": zero, "is_current_stream_capturing": lambda: False,
    }  # fmt: skip


# ---- Installation


def _autocast_class() -> type:
    "Autocast for the simulated device: that of the CPU"

    class Autocast(REAL["autocast"]):
        def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
            if device_type == "cuda":
                if enabled and dtype is torch.bfloat16 and not BF16:
                    raise RuntimeError("this device does not support bfloat16 (simulated)")
                dtype = dtype or torch.float16
                device_type = "cpu"
            super().__init__(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)

    return Autocast


def _by_device(lists: list, with_indices: bool = False) -> dict:
    "Groups of an optimiser's tensors, under the device that they say they are on"
    groups = REAL["grouped"](lists, with_indices)
    return {(group[0][0][0].device, dtype): group for (_, dtype), group in groups.items()}


def install(bf16: bool = True) -> None:
    "Patch torch in this process, once; `bf16` tells whether the device multiplies bf16"
    global BF16
    BF16 = bf16
    if REAL:
        return
    optimizer = torch.optim.Optimizer
    REAL.update(
        to=Tensor.to, cpu=Tensor.cpu, autocast=torch.autocast, compatible=torch._has_compatible_shallow_copy_type
    )
    REAL["grouped"] = optimizer._group_tensors_by_device_and_dtype
    Tensor.to = to
    Tensor.cpu = lambda self, *args, **kwargs: (
        to(self, "cpu") if isinstance(self, SimulatedTensor) else REAL["cpu"](self, *args, **kwargs)
    )
    Tensor.cuda = lambda self, device=None, non_blocking=False, **kwargs: to(
        self, DEVICE, non_blocking=non_blocking, **kwargs
    )
    Tensor.type_as = lambda self, other: to(self, other)
    Tensor.pin_memory = pin_memory
    Tensor.is_pinned = is_pinned
    for name in FACTORIES:
        setattr(torch, name, _factory(name))
    for name, value in cuda_functions().items():
        setattr(torch.cuda, name, value)
    torch.autocast = torch.amp.autocast = torch.amp.autocast_mode.autocast = _autocast_class()
    optimizer._group_tensors_by_device_and_dtype = staticmethod(_by_device)
    optimizer._accelerator_graph_capture_health_check = lambda self: None  # there are no graphs
    torch._has_compatible_shallow_copy_type = lambda x, y: (
        type(inner_of(x)) is type(x) and type(inner_of(y)) is type(y) and REAL["compatible"](x, y)
    )
