"""Compiles Triton kernels ahead of time, without a GPU, and reads their resources.

An operator's Triton backend lists every configuration that it ships: `compile_cases() -> list[CompileCase]`, small ones first.
`python -m benchmarks.gates.compile_gate` compiles them all.
"""

import contextlib
import importlib
import io
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refsam_kernels.core.order import allows_tf32

ARCHITECTURES = (80, 90, 100, 120)
# Bytes per CTA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
POINTER_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
# Dtype, channels and tokens of an expression in the decoders that are shipped: nano's, and SAM's for short and long expressions.
DECODERS = (
    (torch.bfloat16, 128, 16),
    (torch.bfloat16, 256, 16),
    (torch.bfloat16, 256, 64),
    (torch.float16, 256, 32),
    (torch.float32, 256, 32),
)
# Bytes that a thread may spill: a few registers, outside the inner loop.
SPILL_LIMIT = 64


class CompilationError(RuntimeError):
    """A kernel could not be compiled; the message is the compiler's."""


@dataclass(frozen=True)
class CompileCase:
    """A Triton kernel as one shipped configuration launches it.

    `signature` gives the type of every argument that is not a constant: "*bf16", "*fp32", "i32", "fp32". Pointers count
    as divisible by 16, as torch's are; "i32:16" says so of an integer, as a launch does of one that is. Values that a
    launch makes constants (None, and integers that are 1) stand in `constants` beside the constexprs.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    precision: str = "ieee"  # of float32 products: "ieee" or "tf32"
    architectures: tuple[int, ...] = ARCHITECTURES  # that ship it
    spill_limit: int | None = SPILL_LIMIT  # None: spills are listed, not judged


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel on a grid of `programs`, to be run, or, with tensors on the meta device, compiled ahead."""

    kernel: Any
    programs: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def choosing(
        cls,
        kernel: Any,
        programs: tuple[int, ...],
        values: Mapping[str, Any],
        num_warps: int = 8,
        num_stages: int = 1,
    ) -> "Launch":
        """A launch with those of the values that the kernel takes, by the names of its parameters without `_ptr`."""
        taken = {name: values[name.removesuffix("_ptr")] for name in kernel.arg_names}
        return cls(kernel, programs, taken, num_warps, num_stages)

    def run(self) -> None:
        """Launches the kernel on the current device and stream; of no programs nothing is launched."""
        if 0 in self.programs:
            return
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        options["default_dot_input_precision"] = "tf32" if allows_tf32() else "ieee"
        self.kernel[self.programs](**self.arguments, **options)

    def compile_case(self, name: str, **options: Any) -> CompileCase:
        """CompileCase with the specialisation that Triton would choose for these arguments.

        `options` are further fields of `CompileCase`.
        """
        signature, constants = {}, {}
        for parameter in self.kernel.params:
            value = self.arguments[parameter.name]
            kind = None
            if not parameter.is_constexpr:
                kind = argument_type(value, specialise=not parameter.do_not_specialize)
            if kind is None:
                constants[parameter.name] = value
            else:
                signature[parameter.name] = kind
        warps, stages = self.num_warps, self.num_stages
        return CompileCase(name, self.kernel, signature, constants, warps, stages, **options)


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel: registers per thread, bytes of shared memory per CTA, bytes spilled per thread.

    `loop_instructions` are the machine instructions of the longest innermost loop; 0 without a loop or a disassembler.
    `waits` says how many groups of asynchronous copies may be under way at each wait of the loops: 0 overlaps nothing.
    """

    registers: int
    shared_bytes: int
    spill_bytes: int
    loop_instructions: int = 0
    waits: tuple[int, ...] = ()


def compile_ahead(case: CompileCase, architecture: int) -> Resources:
    """Compiles for sm_<architecture> (80, 90, ...) with the tools in Triton's wheel; nothing is taken from a cache.

    Raises `CompilationError` with the compiler's message, or if the architecture has less shared memory.
    """
    from triton import knobs

    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        compiled = precompile(case, architecture)
    shared = compiled.metadata.shared
    available = SHARED_MEMORY[architecture]
    if shared > available:
        message = f"needs {shared} bytes of shared memory, there are {available}"
        raise CompilationError(f"{case.name}, sm_{architecture}: {message}")
    registers, spills = read_ptxas_log(log.getvalue())
    instructions = longest_loop(disassembled(compiled.asm["cubin"]))
    waits = tuple(map(int, re.findall(r"async_wait [^\n]*num = (\d+)", compiled.asm["ttgir"])))
    return Resources(registers, shared, spills, instructions, waits)


def disassembled(cubin: bytes) -> str:
    """The machine code as text, by the tool in Triton's wheel; empty if it has none."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def longest_loop(code: str) -> int:
    """Instructions of the longest loop that holds no other, in code as `cuobjdump --dump-sass` writes it."""
    instructions = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;\n]+)", code, re.MULTILINE)
    addresses = [int(address, 16) for address, _ in instructions]
    loops = []
    for address, (_, text) in zip(addresses, instructions, strict=True):
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    innermost = [
        (start, end)
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]
    return max((sum(s <= a <= e for a in addresses) for s, e in innermost), default=0)


def precompile(case: CompileCase, architecture: int) -> Any:
    """Compiles for sm_<architecture> into Triton's cache, where a launch with these arguments finds it; returns Triton's result.

    Raises `CompilationError` with the compiler's message.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", architecture, 32)
    try:
        return triton.compile(source_of(case), target=target, options=options_of(case))
    except Exception as error:  # each stage of the compiler has exceptions of its own
        message = str(error).strip() or type(error).__name__
        raise CompilationError(f"{case.name}, sm_{architecture}: {message}") from error


def options_of(case: CompileCase) -> dict[str, Any]:
    """The compiler's options for a case."""
    options: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return options | {"default_dot_input_precision": case.precision}


def argument_type(value: Any, *, specialise: bool = True) -> str | None:
    """The type of a kernel's argument as `CompileCase.signature` has it; None for a value that a launch makes constant.

    An integer that must not be specialised is neither made constant nor said to be divisible.
    """
    if isinstance(value, Tensor):
        return f"*{POINTER_TYPES[value.dtype]}"
    if value is None or (value == 1 and specialise):
        return None
    if isinstance(value, float):
        return "fp32"
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return f"{kind}:16" if value % 16 == 0 and specialise else kind


def source_of(case: CompileCase) -> Any:
    """The case as Triton's compiler takes it."""
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        kind, _, divisor = case.signature[name].partition(":")
        signature[name] = kind
        if divisor == "16" or kind.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(case.kernel, signature, dict(case.constants), attributes)


def operators_with_triton() -> list[str]:
    """Names of the operators that have a Triton backend."""
    package = Path(__file__).parents[1]
    modules = (*package.glob("*/triton.py"), *package.glob("*/triton/__init__.py"))
    return sorted(path.relative_to(package).parts[0] for path in modules)


def cases_of(operator: str) -> list[CompileCase]:
    """The configurations that an operator's Triton backend ships."""
    return importlib.import_module(
        f"{__package__.rpartition('.')[0]}.{operator}.triton"
    ).compile_cases()


def read_ptxas_log(log: str) -> tuple[int, int]:
    """Registers and bytes of spill stores of the kernel that `ptxas -v` tells about."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores", log)
    if registers is None or spills is None:
        raise CompilationError(f"ptxas said nothing about registers and spills: {log!r}")
    return int(registers[1]), int(spills[1])
