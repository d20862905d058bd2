"""Show what the GPU's kernels compile to, for GPUs that are not here: registers, shared memory, instructions.

    python -m benchmarks.inference.kernels [--quick] [--json] [--capabilities 80 86 89 90 100]

Needs torch for CUDA, 2.11 or later, and gcc, but no GPU and no driver: a library that the program builds answers what
torch asks of CUDA while it compiles. The program compiles a layer of tf_exemplar at its true width, as a worker does,
and the pooling of its tokens, and takes the kernels apart with Triton's own tools. Where flash-attn-4 is installed, it
does so with that, too. It shows what a kernel needs and whether a GPU has that, not how fast the kernel is: only
`benchmarks/gpu.sh` on a GPU can measure that.

as torch does it   softcap by `torch.tanh`, tiles of torch's choice
spilled            bytes a thread that do not fit its registers
instructions       in the loop over whole blocks, for each score of a thread; and branches among them
"""

import argparse
import importlib.util
import json
import math
import os
import re
import runpy
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.common import Shape, arguments_parser, table
from census_tf_dagster.inference import attention, model
from census_tf_dagster.inference.attention_choice import FLASH, QUERY_BLOCKS
from census_tf_dagster.inference.engine import LONGEST_ROW

GPUS = {
    80: ("A100", 108, 166_912),
    86: ("A10G", 80, 101_376),
    89: ("L4, L40S", 58, 101_376),
    90: ("H100", 132, 232_448),
    100: ("B200", 148, 232_448),
}
"""By compute capability: names, multiprocessors, most bytes of shared memory a block may take (CUDA's guide, table of
compute capabilities)."""

HEADS = 16
WAYS = {
    "ours": "attention with Triton",
    "torch": "attention as torch does it",
    "flash": "attention with FlashAttention 4",
    "pooling": "pooling",
}

STUB = """
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
"""


class Compiled(Exception):  # noqa: N818
    """Everything is compiled; nothing can run."""


def pretend(capability: int) -> list[Any]:
    """Make torch compile for a GPU that is not here; return the list in which compiled kernels will be."""
    from torch._dynamo import device_interface
    from torch._dynamo.variables import streams
    from torch._inductor import config, output_code
    from torch._inductor.fx_passes import fuse_attention, joint_graph, pad_mm
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    _, multiprocessors, shared = GPUS[capability]
    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(
        name="", major=major, minor=minor, multi_processor_count=multiprocessors, warp_size=32, gcnArchName="",
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048 if minor == 0 else 1536,
        shared_memory_per_block_optin=shared, L2_cache_size=50 << 20, total_memory=24 << 30,
    )  # fmt: skip
    found: list[Any] = []

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        utils = SimpleNamespace(get_device_properties=lambda *_: {"max_shared_mem": shared})

    def stop(*_: Any) -> None:
        raise Compiled

    def keep(self: Any) -> Any:
        found.append(self.kernel)
        return SimpleNamespace(config=self.config, n_regs=0, n_spills=0, shared=0, cache_hash=None, store_cubin=False)

    def nothing(*_: Any, **__: Any) -> None: ...

    answers: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": lambda: True,
            "get_device_properties": lambda *_: properties,
            "get_device_capability": lambda *_: (major, minor),
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": nothing,
            "_lazy_init": nothing,
            "current_stream": lambda *_: SimpleNamespace(cuda_stream=0),
        },
        device_interface.CudaInterface: {
            "get_compute_capability": staticmethod(lambda *_: capability),
            "get_device_properties": staticmethod(lambda *_: properties),
        },
        device_interface.CudaInterface.Worker: {"get_device_properties": staticmethod(lambda *_: properties)},
        streams.SymbolicStreamState: {"__init__": lambda self: setattr(self, "cur_stream_stack", [])},
        fake_tensor: {"init_gpu_context": nothing},
        # These make tensors to compile patterns that nothing here has.
        fuse_attention: {"_sfdp_init": nothing},
        joint_graph: {"_sfdp_init": nothing},
        pad_mm: {"_pad_mm_init": nothing, "should_pad": lambda *_, **__: False},
        triton_helpers: {"set_driver_to_gpu": nothing},
        triton_heuristics.TritonCompileResult: {"make_launcher": keep},
        output_code.CompiledFxGraph: {"__call__": stop},
        config: {"compile_threads": 1, "use_static_triton_launcher": False},
    }
    for place, values in answers.items():
        for name, value in values.items():
            setattr(place, name, value)
    driver.set_active(Driver())
    return found


def compile_layer(capability: int, precision: str, way: str) -> list[Any]:
    """Compile a layer in one of `WAYS`; return its kernels."""
    from torch._subclasses import FakeTensorMode
    from torch.nn.attention import flex_attention as flex

    found = pretend(capability)
    dtype, shape, length = getattr(torch, precision), Shape("exemplar"), LONGEST_ROW["cuda"]
    width, softcap = shape.width, 10.0
    kernel = attention.TRITON
    if way == "flash":
        kernel = replace(FLASH, query_block=QUERY_BLOCKS[capability // 10])

    def on_gpu(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="cuda")

    def to_device(array: np.ndarray, _: torch.device) -> torch.Tensor:
        return on_gpu(*array.shape, dtype=torch.int32)

    attention.to_device = to_device
    # Blocks for the way back, which nothing here takes.
    flex._transpose_ordered = lambda number, index: (number, index)
    if way == "torch":
        attention.FLOAT32_TILES = {}
    with FakeTensorMode(), torch.inference_mode():
        bias = on_gpu(length, dtype=torch.float32)
        head_dim = width // HEADS
        terms = attention.packed_terms(bias, np.arange(0, length + 1, 2048), softcap, head_dim, kernel)
        if way == "torch":

            def score_mod(score: Any, *position: Any) -> Any:
                *_, key = position
                return softcap * torch.tanh((score + bias[key]) / softcap)

            terms = score_mod, terms[1], 1 / math.sqrt(head_dim), {}

        vector, square = on_gpu(width), on_gpu(width, width)
        projection = model.QkvProjection(vector, vector, on_gpu(3 * width, width), None)
        weights = model.BlockWeights(square, vector, vector, vector, square, vector, square, vector)
        projected = on_gpu(length, width), on_gpu(length, 3 * width)
        attend = attention.packed_attention, terms
        try:
            torch.compile(model.block, dynamic=False)(
                projected, weights, projection, attend, HEADS, torch.nn.functional.gelu
            )
        except Compiled:
            return found
    raise AssertionError("nothing was compiled")


def compile_flash(capability: int) -> bytes:
    """Compile attention with FlashAttention 4; return its machine code."""
    import cutlass
    from torch._inductor import async_compile
    from torch._subclasses import FakeTensorMode

    sources: list[str] = []

    def keep(*named: Any, **_: Any) -> None:
        sources.append(named[-1])

    async_compile.AsyncCompile.cutedsl = keep
    compile_layer(capability, "float16", "flash")
    folder = Path(os.environ["CUTE_DSL_DUMP_DIR"])
    (folder / "attention.py").write_text(sources[0])
    space = runpy.run_path(str(folder / "attention.py"))
    (function,) = (value for name, value in space.items() if name.endswith("_main"))
    units = GPUS[capability][1]
    cutlass.utils.HardwareInfo = lambda *_: SimpleNamespace(get_device_multiprocessor_count=lambda *_: units)
    length, width = 8192, Shape("exemplar").width // HEADS
    queries, keys = length // QUERY_BLOCKS[capability // 10], length // attention.MASK_BLOCK
    with FakeTensorMode():

        def on_gpu(*sizes: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(sizes, dtype=dtype, device="cuda")

        q, k, v = (
            part.transpose(0, 1)[None] for part in on_gpu(length, 3, HEADS, width, dtype=torch.float16).unbind(1)
        )
        out = on_gpu(1, length, HEADS, width, dtype=torch.float16).transpose(1, 2)
        number, index = on_gpu(1, 1, queries), on_gpu(1, 1, queries, keys)
        log_sum, bias = on_gpu(1, HEADS, length, dtype=torch.float32), on_gpu(length, dtype=torch.float32)
        function(q, k, v, log_sum, number, index, number, index, bias, on_gpu(length), out, 0)
    (found,) = folder.glob("*.cubin")
    return found.read_bytes()


def compile_pooling(capability: int) -> Any:
    """Compile the kernel that sums the tokens of a cell, for half precision."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from census_tf_dagster.inference import pooling_kernel

    types = {"values": "*fp16", "bounds": "*i64", "sums": "*fp32", "width": "i32"}
    sizes = {"TOKENS": pooling_kernel.TOKENS, "WIDTH": pooling_kernel.WIDTH}
    aligned = {(argument,): [["tt.divisibility", 16]] for argument in (0, 1, 2, 3)}
    source = ASTSource(pooling_kernel.sum_kernel, types, sizes, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def take_apart(cubin: bytes, scores: float | None) -> dict[str, Any]:
    """Read what a kernel needs out of its machine code.

    Parameters
    ----------
    cubin
        The machine code.
    scores
        Scores that a thread computes in one step of the loop over keys; None: count no instructions.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    counted = {"registers": r"REG:(\d+)", "spilled": r"STACK:(\d+)"}
    found: dict[str, Any] = {name: int(re.findall(pattern, usage)[0]) for name, pattern in counted.items()}
    if scores is None:
        return found
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    instructions = [(int(address, 16), text) for address, text in lines]
    loops = []
    for address, text in instructions:
        target = re.search(r"\bBRA.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append([text for at, text in instructions if int(target[1], 16) <= at <= address])
    # Of the two loops over keys, that over whole blocks asks no mask: the shorter one. Each score takes an exponential.
    whole = min((loop for loop in loops if sum("MUFU.EX2" in text for text in loop) >= scores), key=len)
    found["instructions"] = len(whole) / scores
    found["branches"] = sum(re.search(r"\bBRA\b", text) is not None for text in whole) / scores
    return found


def examine(capability: int, precision: str, way: str) -> dict[str, Any]:
    """Compile one kernel and take it apart."""
    if way == "flash":
        # On Hopper, two groups of 128 threads share a tile of 128 x 128; on Blackwell, a thread has a query's 128 keys.
        threads, scores = {9: (384, 64), 10: (512, 128)}[capability // 10]
        return {"threads": threads, **take_apart(compile_flash(capability), scores)}
    if way == "pooling":
        kernel = compile_pooling(capability)
    else:
        kernels = compile_layer(capability, precision, way)
        kernel = next(one for one in kernels if "flex_attention" in one.metadata.name)
    threads = kernel.metadata.num_warps * 32
    scores = None
    # float32 has no tensor cores: its loops are not comparable.
    if way in ("ours", "torch") and precision == "float16":
        rows, keys = (
            int(re.findall(rf"{name}\s*:.*=\s*(\d+)", kernel.src.fn.src)[0]) for name in ("BLOCK_M", "BLOCK_N")
        )
        scores = rows * keys / threads
    return {"threads": threads, "shared": kernel.metadata.shared, **take_apart(kernel.asm["cubin"], scores)}


def main() -> None:
    """Compile for each GPU in a process of its own, print a table."""
    parser = arguments_parser(__doc__, quick="an H100 alone")
    parser.add_argument("--capabilities", nargs="+", type=int, choices=list(GPUS), help="default: all")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        capability, precision, way = arguments.step
        print(json.dumps(examine(int(capability), precision, way)))
        return
    if not torch.version.cuda:
        parser.error(f"torch {torch.__version__} is not built for CUDA: install one that is (no GPU is needed)")
    rows, answers = [], []
    with tempfile.TemporaryDirectory() as place:
        stub = Path(place) / "libcuda.so.1"
        build = ["gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(stub)]
        subprocess.run(build, input=STUB, text=True, check=True)
        for capability in arguments.capabilities or ([90] if arguments.quick else list(GPUS)):
            name, units, limit = GPUS[capability]
            steps = [(precision, way) for precision in ("float16", "float32") for way in ("ours", "torch")]
            if capability // 10 in QUERY_BLOCKS and importlib.util.find_spec("flash_attn"):
                steps.append(("float16", "flash"))
            for precision, way in [*steps, ("float16", "pooling")]:
                # A cache of its own: torch's does not tell GPUs without a driver apart.
                cache = Path(place) / f"{capability}-{precision}-{way}"
                cache.mkdir()
                env = {**os.environ, "LD_PRELOAD": str(stub), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
                env |= {"TRITON_CACHE_DIR": f"{cache}/triton", "CUTE_DSL_DUMP_DIR": str(cache)}
                env |= {"CUTE_DSL_ARCH": f"sm_{capability}a", "FLASH_ATTENTION_ARCH": f"sm_{capability}"}
                env |= {"FLASH_ATTENTION_NUM_SMS": str(units), "CUTE_DSL_KEEP_CUBIN": "1"}
                module = [sys.executable, "-m", "benchmarks.inference.kernels"]
                step = [*module, "--step", str(capability), precision, way]
                done = subprocess.run(step, env=env, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr[-6000:])
                found = json.loads(done.stdout.splitlines()[-1])
                shared = ""
                if "shared" in found:
                    fits = "" if found["shared"] <= limit else ": more than there is"
                    shared = f"{found['shared'] / 1024:.0f} of {limit / 1024:.0f} KiB{fits}"
                rows.append(
                    [
                        f"{name} (sm_{capability}), {precision}, {WAYS[way]}",
                        f"{found['threads']} x {found['registers']}",
                        f"{found['spilled']:,}",
                        shared,
                        f"{found['instructions']:.1f}; {found['branches']:.1f}" if "instructions" in found else "",
                    ]
                )
                answers.append({"capability": capability, "precision": precision, "way": way, **found})
    print(f"torch {torch.__version__}, heads 128 wide, rows of {LONGEST_ROW['cuda']:,} tokens")
    table(["kernel", "threads x registers", "spilled", "shared memory", "instructions; branches"], rows)
    if arguments.json:
        ours, theirs = (one["instructions"] for one in answers[:2])
        answer = {"ours": ours, "reference": theirs, "ratio": theirs / ours, "unit": "instructions a score"}
        print(json.dumps({**answer, "rows": answers}))


if __name__ == "__main__":
    main()
