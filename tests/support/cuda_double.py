"""NVIDIA GPUs as torch sees them, simulated on CPU tensors, so that CUDA calls can be tested without a card.

Doubles stand only for what torch has in C++. Torch's own Python above it is real, so a call that it refuses on a
machine with GPUs (a device without an index, one that is out of range) is refused here as well. Tensors remember on
which device they are: mixing devices, and reading a GPU's tensor as NumPy, raise as they do there. A copy that is not
waited for arrives when an event after it is synchronized, and holds NaN until then.
"""

import os
import runpy
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves, tree_map

from census_tf_dagster.inference import attention
from census_tf_dagster.inference import model as model_module
from census_tf_dagster.inference.pooling import plain_sums

CPU = torch.device("cpu")
GIB = 2**30
MARK = "device_in_tests"


class Machine:
    """Some GPUs, and the stream that all of them share."""

    def __init__(self, gpus: int, free: int, capability: tuple[int, int]) -> None:
        self.gpus = gpus
        self.free = free
        self.capability = capability
        self.current = 0
        self.used: set[int] = set()
        self.peak_of: list[int] = []
        self.emptied = 0
        self.pending: deque[Callable[[], object]] = deque()
        self.queued = self.finished = 0

    def count(self) -> int:
        # The driver's rule, as torch's own Python states it.
        visible = torch.cuda._parse_visible_devices()
        inside = [one < self.gpus for one in visible]
        return inside.index(False) if False in inside else len(inside)

    def set_device(self, index: int) -> None:
        if index >= self.count():
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        self.current = index

    def queue(self, work: Callable[[], object]) -> None:
        self.pending.append(work)
        self.queued += 1

    def finish(self, until: int) -> None:
        while self.finished < until:
            self.pending.popleft()()
            self.finished += 1

    def memory_stats(self, index: int) -> dict[str, Any]:
        self.peak_of.append(index)
        return {"allocated_bytes": {"all": {"peak": 5 * GIB + index}}}

    def properties(self, index: int) -> SimpleNamespace:
        major, minor = self.capability
        return SimpleNamespace(name=f"GPU {index}", major=major, minor=minor)

    def memory(self, index: int) -> tuple[int, int]:
        if not isinstance(index, int):
            raise TypeError(f"cudaMemGetInfo takes an int, not {index!r}")
        return self.free, 80 * GIB

    def empty_cache(self) -> None:
        self.emptied += 1


def device_of(tensor: Tensor) -> torch.device:
    return tensor.__dict__.get(MARK, CPU)


def mark(found: Any, device: torch.device) -> Any:
    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            leaf.__dict__[MARK] = device
        return leaf

    return tree_map(one, found) if device.type == "cuda" else found


class Devices(TorchFunctionMode):
    """Tracks the device on which each tensor would be."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if function == Tensor.device.__get__:
            return device_of(args[0])
        if function == Tensor.is_cuda.__get__:
            return device_of(args[0]).type == "cuda"
        name = getattr(function, "__name__", "")
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        places = {device_of(tensor) for tensor in tensors if tensor.dim()}
        if name == "numpy" and device_of(args[0]) != CPU:
            raise TypeError(f"can't convert {device_of(args[0])} device type tensor to numpy. Use Tensor.cpu()")
        if name == "pin_memory":
            if device_of(args[0]) != CPU:
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
            return args[0].clone()
        if name == "copy_":
            return self.copy(*args, **options)
        if name == "cpu":
            return _unmarked(args[0])
        if name == "to":
            target = next((one for one in (*args[1:], options.get("device")) if isinstance(one, torch.device)), None)
            if target is not None:
                rest = [one for one in args[1:] if isinstance(one, torch.dtype)]
                options.pop("device", None)
                options.pop("non_blocking", None)
                return self.on(_unmarked(args[0]).to(*rest, **options), target)
        if (wanted := options.get("device")) is not None:
            options.pop("pin_memory", None)
            options["device"] = CPU
            return self.on(function(*args, **options), torch.device(wanted))
        options.pop("pin_memory", None)
        if len(places) > 1 and name not in ("__getitem__", "__setitem__", "__get__", "__set__"):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {places} ({name})")
        found = function(*args, **options)
        fresh = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf not in _Same(tensors)]
        mark(fresh, next(iter(places), CPU))
        return found

    def on(self, tensor: Tensor, device: torch.device) -> Tensor:
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            if index >= self.machine.count():
                raise torch.AcceleratorError("CUDA error: invalid device ordinal")
            self.machine.used.add(index)
            device = torch.device("cuda", index)
        return mark(tensor, device)

    def copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if non_blocking and device_of(source) != device_of(target):
            target.fill_(torch.nan)
            source = source.clone()
            self.machine.queue(lambda: _plainly(target.copy_, source))
            return target
        return _plainly(target.copy_, source)


class _Same:
    """A set that compares by identity, because tensors compare by value."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.ids = {id(tensor) for tensor in tensors}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self.ids


def _plainly(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with torch._C.DisableTorchFunction():
        return function(*arguments, **options)


def _unmarked(tensor: Tensor) -> Tensor:
    """Return the same values as a tensor of its own, on the CPU."""
    return _plainly(tensor.detach)


def event_of(machine: Machine) -> type:
    class Event:
        """The rules of CUDAEvent about time."""

        def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
            self.timed = enable_timing
            self.position: int | None = None
            self.when = 0.0

        def record(self, stream: object = None) -> None:
            self.position, self.when = machine.queued, time.monotonic()

        def synchronize(self) -> None:
            machine.finish(self.position or 0)

        def elapsed_time(self, end: "Event") -> float:
            if not (self.timed and end.timed):
                raise ValueError("Both events must be created with argument 'enable_timing=True'.")
            if self.position is None or end.position is None:
                raise ValueError("Both events must be recorded before calculating elapsed time.")
            if machine.finished < max(self.position, end.position):
                raise RuntimeError("Both events must be completed before calculating elapsed time.")
            return (end.when - self.when) * 1000

    return Event


def pretend(
    patch: pytest.MonkeyPatch,
    gpus: int,
    free: int = 70 * GIB,
    capability: tuple[int, int] = (9, 0),
    flash: bool = False,
) -> Machine:
    """Let torch find some GPUs on this machine until `patch` is undone, and flash-attn-4 if `flash` is true."""
    machine = Machine(gpus, free, capability)
    if flash:
        for name in ("flash_attn", "flash_attn.cute"):
            module = ModuleType(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None), []
            patch.setitem(sys.modules, name, module)
    for name, double in {
        "_cuda_getDeviceCount": machine.count,
        "_has_cuda": True,
        "_cuda_init": lambda: None,
        "_cuda_setDevice": machine.set_device,
        "_cuda_getDevice": lambda: machine.current,
        "_cuda_emptyCache": machine.empty_cache,
        "_cuda_memoryStats": machine.memory_stats,
    }.items():
        patch.setattr(torch._C, name, double, raising=False)
    for name, double in {
        "_cudart": SimpleNamespace(cudaMemGetInfo=machine.memory),
        "_get_device_properties": machine.properties,
        "_initialized": False,
        "_cached_device_count": None,
        # Other tests may have left seeds there for generators that this machine lacks.
        "_queued_calls": [],
        "_lazy_seed_tracker": SimpleNamespace(get_calls=list),
        "Event": event_of(machine),
    }.items():
        patch.setattr(torch.cuda, name, double, raising=False)
    # Kernels are not built here: layers run as they are, FlexAttention and pooling in their reference form.
    for module in (attention, model_module):
        patch.setattr(module, "compiled", lambda function: function)
    patch.setattr(attention, "flex_attention", _reference(attention.flex_attention, machine))
    kernel = SimpleNamespace(sum_of_tokens=plain_sums)
    patch.setitem(sys.modules, "census_tf_dagster.inference.pooling_kernel", kernel)
    # It calls vmap, whose tensors keep no marks.
    build = BlockMask.from_kv_blocks
    patch.setattr(BlockMask, "from_kv_blocks", lambda *arguments, **options: _plainly(build, *arguments, **options))
    patch.setenv("CC", "true")
    return machine


def _reference(flex: Callable[..., Tensor], machine: Machine) -> Callable[..., Tensor]:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, score_mod: Any, block_mask: Any, scale: float, kernel_options: Any
    ) -> Tensor:
        if kernel_options.get("BACKEND") == "FLASH":
            _refuse_as_flash(q, block_mask, machine.capability[0])
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch, _pop_mode_temporarily():
            warnings.simplefilter("ignore")
            # The compiler behind it would look for the GPU's generators and streams.
            patch.delattr(torch._C, "_cuda_getDeviceCount")
            patch.setattr(torch.cuda, "_initialized", False)
            # Called directly, not traced for each row.
            patch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
            found = flex(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale)
        return mark(found, device_of(q))

    return attend


def _refuse_as_flash(q: Tensor, mask: BlockMask, major: int) -> None:
    """Refuse what flash-attn-4 and torch's call of it refuse.

    The rules and texts are those of `flash_attn/cute/interface.py` and `block_sparsity.py` (4.0.0b36), and of torch's
    `_inductor/kernel/flex/flex_flash_attention.py` (2.13).
    """
    if "flash_attn.cute" not in sys.modules:
        raise RuntimeError(
            "BACKEND='FLASH' but flash attention cannot be used: CUTE flash attention library is not available. "
        )
    if mask.full_kv_num_blocks is None:
        raise NotImplementedError("Flash attention with block mask but without full blocks is not supported yet")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise AssertionError("inputs must be float16, bfloat16, fp8 e4m3fn, or fp8 e5m2")
    width = q.shape[-1]
    if major not in (8, 12) and (width % 8 or not 8 <= width <= (256 if major == 9 else 128)):
        raise AssertionError(f"(head_dim, head_dim_v)=({width}, {width}) is not supported on SM{major}0.")
    if major == 8:
        raise NotImplementedError("Custom user-provided score_mod is not supported on SM8x architectures.")
    queries, keys = mask.BLOCK_SIZE
    tile = 256 if major in (10, 11) else 128
    if queries % tile:
        raise ValueError(f"Block sparse tensors have block size {queries}, which must be a multiple of {tile}.")
    if keys % 128 or (major == 9 and keys != 128):
        raise ValueError("Block sparse tensors require BLOCK_SIZE_KV to be a multiple of 128.")


@contextmanager
def gpus_of_tests(count: int, free: int = 70 * GIB, **others: Any) -> Iterator[Machine]:
    """Run a block on a machine with some GPUs; see `pretend`."""
    with pytest.MonkeyPatch.context() as patch:
        machine = pretend(patch, count, free, **others)
        with Devices(machine):
            yield machine


def interpreter(folder: Path, gpus: int) -> Path:
    """Write a command that runs Python's `-m MODULE` on a machine with some GPUs."""
    script = folder / "python"
    here = Path(__file__).parents[2]
    script.write_text(
        f'#!/bin/sh\nPYTHONPATH="{here}:$PYTHONPATH" exec "{sys.executable}" -W ignore -c '
        f'"from tests.support.cuda_double import run; run({gpus})" "$@"\n'
    )
    script.chmod(0o755)
    return script


def run(gpus: int) -> None:
    """Run ``-m MODULE ARGUMENTS`` of the command line."""
    sys.argv = sys.argv[2:]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with gpus_of_tests(gpus):
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
