"""Compile every kernel for NVIDIA GPUs, with every number of warps that may be tried, where no GPU is needed for that.

    python tests/kernels/compiling.py [--once] [compute capability …]

The public functions run on CPU tensors, with launches that compile instead; --once: every kernel in one form only,
which takes seconds and not minutes. Prints kernels, warps, registers and bytes on the stack, where registers spill.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what it does anyway, without a warning

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from autoprune.kernels import distance, masks, moments

POINTERS = {
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
OBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
capability, once, seen = 90, False, set()


def compile_instead(self, *args, grid=None, warmup=False, num_warps=4, **kwargs):
    arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
    constants = {parameter.name for parameter in self.params if parameter.is_constexpr}
    signature = {
        name: "constexpr" if name in constants else POINTERS[value.dtype] if torch.is_tensor(value) else "i32"
        for name, value in ((name, arguments[name]) for name in self.arg_names)
    }
    fixed = {name: arguments[name] for name in constants}
    key = (capability, self.__name__, num_warps, *signature.values(), *sorted(fixed.items()))
    if self.__name__ == "count_and_copy":  # two equal keys are between: the caller goes on, and has ties to count
        arguments["counts"][1] = 2
        arguments["copies"][:2] = 0
    if key in seen or (once and any(other[1] == self.__name__ for other in seen)):
        return
    seen.add(key)
    options = {"num_warps": num_warps}
    compiled = triton.compile(
        ASTSource(fn=self, signature=signature, constexprs=fixed),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([OBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    shown = {name: value for name, value in fixed.items() if name in ("ROWS", "COLUMNS", "GROUPS", "PADDED", "FUSED")}
    usage = f"{registers} registers, {stack} bytes on the stack"
    print(f"sm_{capability} {self.__name__} {shown} warps {num_warps}: {usage}")


def try_all(self, *args, **kwargs):
    for config in self.early_config_prune(self.configs, {}, **kwargs):
        self.fn.run(*args, **kwargs, **config.kwargs, num_warps=config.num_warps)


JITFunction.run = compile_instead
Autotuner.run = try_all
masks.TRITON_DEVICES = {"cpu"}


def main() -> None:
    global capability, once
    once = "--once" in sys.argv
    for wanted in [int(argument) for argument in sys.argv[1:] if argument != "--once"] or [90]:
        capability = wanted
        for dtype, width in ((torch.bfloat16, 576), (torch.float16, 28672), (torch.float32, 40000)):
            weight, norms = torch.zeros(2, width, dtype=dtype), torch.ones(width)
            scores = torch.zeros(2, width, dtype=torch.float32 if dtype is torch.bfloat16 else dtype)
            masks.row_mask(scores, 9)
            masks.prune_rows(weight, norms, 9)
            masks.prune_rows(weight, scores, 9)
            masks.matrix_mask(scores, 1)
            masks.prune_matrix(weight, norms, 1)
            masks.prune_nm(weight, norms, 2, 4)
            masks.nm_mask(scores, 4, 8)
            moments.triton_row_moments(weight, norms)
            moments.triton_row_moments(weight, None)
        masks.nm_mask(torch.zeros(2, 96), 7, 32)
        masks.nm_mask(torch.zeros(2, 96), 1, 3)
        bits = masks.pack(torch.zeros(2, 64, dtype=torch.bool))
        masks.unpack(bits, (2, 64))
        distance.triton_distance(bits, bits)
        distance.triton_digest(bits)


if __name__ == "__main__":
    main()
