"""Compiles every variant of the GPU kernels without a GPU, disassembles it and checks it against limits.

    python benchmarks/gpu_codegen.py [--quick] [--into DIR]

The operators are called on tensors without memory, and each kernel is compiled for each target instead of being
launched, so that it is specialized as in a real call. Reported for each hot loop over values: width of loads and
stores, instructions per value, local memory. Needs Triton, whose package has NVIDIA's disassembler.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from common import RESULTS, write
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from batchnorm.activations import Activation
from batchnorm.ops.gpu import operators
from batchnorm.ops.gpu.cut import WARPS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WALKS = {
    "channels last": ((256, 64, 56, 56), torch.channels_last),
    "planes": ((256, 64, 56, 56), torch.contiguous_format),
    "short planes": ((256, 512, 7, 7), torch.contiguous_format),
    "rows": ((8192, 1024), torch.contiguous_format),
    "joined rows": ((131072, 37), torch.contiguous_format),
}
# Instructions per value: statistics and normalize as asked of them, the gradients as they were when first recorded.
MOST = {"measure": 9.0, "normalize": 9.0, "gradients": 17.0, "apply": 18.0}
MORE = 2.5  # for a residual, which is one reading more
MOST_STACK = 8  # bytes: for sm_100 ptxas keeps one value of one variant there, and reads it once a row of tiles
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Variant:
    """A call whose kernels are compiled."""

    walk: str
    dtype: torch.dtype
    activation: str
    residual: bool = False
    mask: bool = False

    def __str__(self) -> str:
        fused = " + ".join(
            ["BN", *(["add"] if self.residual else []), *([self.activation] if self.activation != "none" else [])]
        )
        return f"{self.walk}, {str(self.dtype)[6:]}, {fused}{', mask' if self.mask else ''}"

    @property
    def limited(self) -> bool:
        """Whether it is held to so many instructions: exp, erf and masks take more."""
        return self.activation in ("none", "relu") and not self.mask and self.dtype != torch.float64


VARIANTS = (
    *(Variant(walk, torch.bfloat16, "relu") for walk in WALKS),
    *(Variant(walk, torch.float32, "none") for walk in ("planes", "short planes", "rows")),
    *(Variant(walk, torch.bfloat16, "relu", residual=True) for walk in ("channels last", "planes")),
    Variant("channels last", torch.float16, "relu6"),
    Variant("planes", torch.bfloat16, "silu"),
    Variant("rows", torch.bfloat16, "gelu"),
    Variant("rows", torch.float32, "relu", mask=True),
    Variant("planes", torch.float64, "none"),
)
QUICK = VARIANTS[:2]


@dataclass(frozen=True)
class Launch:
    """A kernel, and what it was launched with."""

    kernel: Any
    arguments: list[Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """What it computes."""
        gradients = self.options.get("GRADIENTS")
        names = {"sums": "gradients" if gradients else "measure", "maps": "apply" if gradients else "normalize"}
        return names.get(self.kernel.__name__, f"{self.kernel.__name__} (per channel)")

    @property
    def values(self) -> int:
        """Values per thread and turn of the hot loop; 0 where the kernel has none over values."""
        return self.options.get("BLOCK_ROWS", 0) * self.options.get("BLOCK_COLUMNS", 0) // (32 * WARPS)


@dataclass(frozen=True)
class Code:
    """A kernel as compiled for a target.

    Attributes:
        instructions: per value of the hot loop; None of what is not NVIDIA's, or has no such loop.
        widths: bytes of the loads and stores in that loop; of other targets those anywhere.
        registers, stack: per thread; bytes.
        local: accesses to local memory within the hot loop.
    """

    variant: Variant
    kernel: str
    target: str
    instructions: float | None
    widths: tuple[int, ...]
    registers: int | None
    stack: int
    local: int

    def wrong(self) -> str:
        """What passes a limit; empty where nothing does."""
        said = []
        if self.stack > MOST_STACK:
            said.append(f"{self.local} accesses to local memory in the hot loop, {self.stack} bytes of stack")
        if self.instructions is not None and self.variant.limited:
            most = MOST[self.kernel] + (MORE if self.variant.residual else 0.0)
            if self.instructions > most:
                said.append(f"{self.instructions:.1f} instructions per value, at most {most:g}")
            if set(self.widths) != {16}:
                said.append(f"loads and stores of {self.widths} bytes, not 16")
        return "; ".join(said)


class _Target:
    """Stands in for a GPU's driver: a kernel is compiled for the chosen target, and never loaded."""

    def __init__(self) -> None:
        self.chosen = 0

    def get_current_target(self) -> GPUTarget:
        return list(TARGETS.values())[self.chosen]

    def get_current_device(self) -> int:
        return self.chosen

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def launches(variant: Variant) -> list[Launch]:
    """What a training step launches, forward and backward, in order."""
    shape, memory_format = WALKS[variant.walk]
    x = torch.empty(shape, dtype=variant.dtype, device="meta").contiguous(memory_format=memory_format)
    channels = shape[1]
    vector = torch.empty(channels, device="meta", dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    statistics = torch.empty(3, channels, dtype=torch.float64, device="meta")
    batches = torch.empty((), dtype=torch.int64, device="meta")
    mask = torch.empty((shape[0], *shape[2:]), dtype=torch.bool, device="meta") if variant.mask else None
    act, residual = Activation(variant.activation).code, x if variant.residual else None
    found: list[Launch] = []

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        plain = [jit.MockTensor(each.dtype) if isinstance(each, Tensor) else each for each in args]
        found.append(Launch(self, plain, options))

    real, jit.JITFunction.run = jit.JITFunction.run, noted
    try:
        moved = (vector, vector, batches, 0.1)
        operators.forward_(x, vector, vector, 1e-5, *moved, act, 0.0, residual, mask)
        y = x if variant.residual else None  # kept in the residual's place
        operators.backward(
            x, x, statistics, vector, vector, 1e-5, act, 0.0, None, y, mask, True, True, variant.residual
        )
    finally:
        jit.JITFunction.run = real
    return found


def compiled(variants: tuple[Variant, ...]) -> Iterator[Code]:
    """Every variant for every target; kernels per channel once."""
    target = _Target()
    driver.set_active(target)  # pyright: ignore[reportArgumentType]
    seen = set()
    for variant in variants:
        for launch in launches(variant):
            for number, name in enumerate(TARGETS):
                target.chosen = number
                made = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)
                if (launch.values or made.hash) and (name, made.hash) not in seen:
                    seen.add((name, made.hash))
                    yield (
                        _nvidias(variant, launch, name, made)
                        if "cubin" in made.asm
                        else _amds(variant, launch, name, made.asm["amdgcn"])
                    )


def _nvidias(variant: Variant, launch: Launch, target: str, made: Any) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [_TOOLS / "cuobjdump", "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loop = _hot_loop(text) if launch.values else []
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text)[0]
    accesses = [line for line in loop if re.search(r"\b(LDG|STG)\b", line)]
    return Code(
        variant,
        launch.name,
        target,
        len(loop) / launch.values if launch.values else None,
        tuple(sorted({_width(line) for line in accesses})),
        int(registers),
        int(stack),
        sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in loop),
    )


def _hot_loop(text: str) -> list[str]:
    """The instructions of the innermost loop that reads or writes memory."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)
    at = {int(address, 16): number for number, (address, _) in enumerate(found)}
    instructions = [instruction for _, instruction in found]
    loops = []
    for end, instruction in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", instruction)
        start = at.get(int(jump[1], 16), end) if jump else end
        body = instructions[start : end + 1]
        if start < end and any("LDG" in each or "STG" in each for each in body):
            loops.append(body)
    if not loops:
        raise AssertionError("the kernel has no loop over values: has the disassembler's text changed?")
    return min(loops, key=len)


def _width(line: str) -> int:
    """Bytes of one LDG or STG."""
    bits = re.search(r"\.(128|64|U16|S16|U8|S8)\b", line)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[bits[1]] if bits else 4


def _amds(variant: Variant, launch: Launch, target: str, text: str) -> Code:
    words = {"dwordx4": 16, "dwordx2": 8, "dwordx3": 12, "dword": 4, "short": 2, "ushort": 2, "ubyte": 1, "byte": 1}
    accesses = re.findall(r"(?:global|buffer)_(?:load|store)_(\w+)", text)
    stack = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)
    registers = re.findall(r"\.vgpr_count:\s*(\d+)", text)
    found = tuple(sorted({words[each.partition("_d16")[0]] for each in accesses if each.partition("_d16")[0] in words}))
    return Code(variant, launch.name, target, None, found, int(registers[0]), int(stack[0]), 0)


def report(codes: list[Code], wrong: list[str]) -> list[str]:
    """The page."""
    lines = [
        "# What compilers make of the GPU kernels",
        "",
        f"`python benchmarks/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`: Triton {triton.__version__}, torch "
        f"{torch.__version__}. Compiled and disassembled, not run: nothing here is a time.",
        "Instructions are those of the hot loop per value; widths are of its loads and stores, in bytes (for gfx942 of "
        "all in the kernel).",
        "",
        f"{len(codes)} kernels, {len(wrong)} beyond a limit.",
        *[f"- {each}" for each in wrong],
        "",
        "| kernel | target | kernels | instructions, median | most | most allowed | registers, most | stack, most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kernel in MOST:
        for target in TARGETS:
            own = [code for code in codes if (code.kernel, code.target) == (kernel, target) and code.variant.limited]
            counts = [code.instructions for code in own if code.instructions is not None]
            median, most = (f"{statistics.median(counts):.1f}", f"{max(counts):.1f}") if counts else ("", "")
            registers, stack = max(code.registers or 0 for code in own), max(code.stack for code in own)
            limit = f"{MOST[kernel]:g}" if counts else ""
            lines.append(f"| {kernel} | {target} | {len(own)} | {median} | {most} | {limit} | {registers} | {stack} |")
    lines += [
        "",
        "| variant | kernel | target | instructions | widths | registers | stack |",
        "|---|---|---|---|---|---|---|",
    ]
    for code in codes:
        count = "" if code.instructions is None else f"{code.instructions:.1f}"
        widths = " ".join(map(str, code.widths))
        lines.append(
            f"| {code.variant} | {code.kernel} | {code.target} | {count} | {widths} | {code.registers} | {code.stack} |"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Compile, write the page, and return 1 if a kernel passes a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two variants, and no page unless --into says where")
    parser.add_argument("--into", type=Path, help="the folder of the page; benchmarks/results unless --quick")
    given = parser.parse_args(arguments)
    codes = list(compiled(QUICK if given.quick else VARIANTS))
    wrong = [f"{code.variant}, {code.kernel}, {code.target}: {code.wrong()}" for code in codes if code.wrong()]
    lines = report(codes, wrong)
    if given.into is not None or not given.quick:
        write((given.into or RESULTS) / "gpu-codegen.md", "\n".join(lines) + "\n")
    print("\n".join(lines if not given.quick else lines[: lines.index("") + 8 + len(wrong)]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
