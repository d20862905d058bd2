"""Show which kernels take a run's time on the device, grouped by what they compute; on a CPU, which operators of torch.

`engine --profile` uses it. The groups go by the names of kernels, so a kernel with a new name is in `others` until
`GROUPS` has it; the longest kernels are therefore shown with their names, too.
"""

import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import table

GROUPS = {
    "attention": r"flex|triton_tem|flash|fmha|sdpa|attention",
    "matrix products": r"gemm|nvjet|cutlass|aten::(mm|bmm|addmm|baddbmm)\b",
    "layer norm": r"norm",
    "GELU": r"gelu",
    "pooling": r"sum_kernel|aten::sum\b|index_add|index_reduce|segment|scatter|cumsum|pool",
    "copies and casts": r"copy|memcpy|memset|cast",
    "table lookup": r"index|gather|embedding",
}
"""What a kernel computes, by a pattern in its name; the first match counts."""
OTHERS = "others"
LONGEST = 8
"""Kernels that are shown with their names."""
WIDTH = 70
"""Most characters of a name."""


def group(name: str) -> str:
    """Return the group of a kernel."""
    return next((kind for kind, pattern in GROUPS.items() if re.search(pattern, name, re.I)), OTHERS)


def show_profile(run: Callable[[], object], device: str, attention_flops: float) -> dict[str, Any]:
    """Run once under torch's profiler; print the groups and the longest kernels, and return the figures.

    Parameters
    ----------
    run
        Computes, and returns when the device is done.
    device
        ``cuda`` or ``cpu``.
    attention_flops
        Useful FLOPs of attention in the run, its causal half.
    """
    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        started = time.monotonic()
        run()
        wall = time.monotonic() - started
    kernels: Counter[str] = Counter()
    for event in found.key_averages():
        if (event.device_type == DeviceType.CUDA) == on_gpu:
            kernels[event.key] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    total = kernels.total()
    groups: Counter[str] = Counter()
    for name, seconds in kernels.items():
        groups[group(name)] += seconds
    rows = [[kind, f"{seconds:.4f}", f"{seconds / total:.1%}"] for kind, seconds in groups.most_common()]
    rows += [[f"  {name[:WIDTH]}", f"{took:.4f}", f"{took / total:.1%}"] for name, took in kernels.most_common(LONGEST)]
    table(["kernels", "seconds", "share"], rows)
    rest = 1 - (groups["attention"] + groups["matrix products"]) / total
    rate = attention_flops / groups["attention"] / 1e12 if groups["attention"] else 0.0
    print(
        f"device busy {total:.3f} of {wall:.3f} s; everything but products and attention {rest:.1%}; attention "
        f"{rate:,.3f} useful TFLOP/s (causal half)"
    )
    answer = {"seconds": wall, "busy": total, "rest": rest, "attention_flops_per_second": rate * 1e12}
    return {**answer, "groups": dict(groups), "kernels": dict(kernels.most_common(LONGEST))}
