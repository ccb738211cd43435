"""What every launcher shares: the target's limits, a launch as data, rows with strides.

A launcher plans first and runs after. The plan is a `Launch`: kernel, grid, run-time
arguments, constants. Because it is data, `aot` can compile the very same plan for a GPU
that is not there, from tensors on the ``meta`` device.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

TL_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.int8: tl.int8,
}

SIGNATURE = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


@dataclass(frozen=True)
class Target:
    """What tile sizes depend on.

    Attributes:
        backend: ``"cuda"`` or ``"hip"``.
        arch: ``80``, ``90``, … or ``"gfx942"``, ….
        units: multiprocessors, or compute units.
        shared: bytes of shared memory that one program may use.
    """

    backend: str
    arch: int | str
    units: int
    shared: int

    @property
    def warp(self) -> int:
        return 64 if self.backend == "hip" and str(self.arch).startswith("gfx9") else 32


KNOWN_TARGETS = {
    "80": Target("cuda", 80, 108, 166_912),
    "86": Target("cuda", 86, 82, 101_376),
    "89": Target("cuda", 89, 128, 101_376),
    "90": Target("cuda", 90, 132, 232_448),
    "100": Target("cuda", 100, 148, 232_448),
    "120": Target("cuda", 120, 188, 101_376),
    "gfx942": Target("hip", "gfx942", 304, 65_536),
    "gfx950": Target("hip", "gfx950", 256, 163_840),
}


def pdl_ready(target: Target) -> bool:
    """Whether a kernel for ``target`` may start before the one in front of it has ended."""
    from triton.language.extra import cuda

    new = target.backend == "cuda" and int(target.arch) >= 90
    return new and hasattr(cuda, "gdc_wait") and not interpreting()


_HOST = Target("cuda", 90, 4, 232_448)


@functools.lru_cache(maxsize=32)
def _device_target(kind: str, index: int) -> Target:
    if kind != "cuda":
        return _HOST
    properties = torch.cuda.get_device_properties(index)
    units = properties.multi_processor_count
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        known = KNOWN_TARGETS.get(arch)
        return Target("hip", arch, units, known.shared if known else 65_536)
    major = properties.major * 10
    shared = getattr(properties, "shared_memory_per_block_optin", 101_376)
    return Target("cuda", major + properties.minor, units, shared)


def target_of(x: Tensor) -> Target:
    """The target of the device that ``x`` lies on."""
    index = x.device.index
    if x.device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    return _device_target(x.device.type, index or 0)


def device_reason(*tensors: Tensor | None) -> str | None:
    """Why these tensors are not where kernels run; None when they are."""
    given = [t for t in tensors if t is not None]
    device = given[0].device
    for t in given:
        if t.device != device:
            return f"tensors on {device} and {t.device}"
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None
    return f"no Triton device: tensors are on {device.type}"


def dtype_reason(**tensors: Tensor | None) -> str | None:
    """Why a floating tensor's dtype is outside float16, bfloat16, float32."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in FLOATS:
            return f"{name} is {str(t.dtype).removeprefix('torch.')}"
    return None


@dataclass(frozen=True)
class Launch:
    """One kernel launch. ``arguments`` are in the kernel's order; None means unused.

    ``pdl`` launches it as a programmatic dependent of the kernel before it; the kernel must
    then wait for that one itself, and only targets of `pdl_ready` may have it.
    """

    kernel: Any
    grid: tuple[Any, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    pdl: bool = False

    def run(self) -> None:
        """Launch on the device of the first tensor argument."""
        if 0 in self.grid:
            return
        device = next(a.device for a in self.arguments.values() if isinstance(a, Tensor))
        if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
            with torch.cuda.device(device):
                self._run()
        else:
            self._run()

    def _run(self) -> None:
        self.kernel[self.grid](
            **self.arguments,
            **self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            **({"launch_pdl": True} if self.pdl else {}),
        )

    def specialise(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
        """``(signature, constexprs, attrs)`` as `triton.JITFunction` would derive them.

        A tensor counts as 16-byte aligned; None and the integer 1 become constants, and an
        integer divisible by 16 is marked so, unless the kernel says ``do_not_specialize``.
        """
        plain = set(self.kernel.do_not_specialize)
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attrs: dict[tuple[int], Any] = {}
        for i, name in enumerate(self.kernel.arg_names):
            value = self.constants.get(name, self.arguments.get(name))
            divisible = False
            one = _plain_int(value) and value == 1 and name not in plain
            if name in self.constants or value is None or one:
                signature[name] = "constexpr"
                constants[name] = value
                continue
            if isinstance(value, Tensor):
                signature[name] = SIGNATURE[value.dtype]
                divisible = True
            elif _plain_int(value):
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                divisible = value % 16 == 0
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                raise TypeError(f"argument {name} of {self.kernel.__name__}: {value!r}")
            if divisible and name not in plain:
                attrs[(i,)] = [["tt.divisibility", 16]]
        return signature, constants, attrs


def _plain_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Rows:
    """Leading dimensions of several tensors, merged where all their strides allow it.

    Attributes:
        sizes: three sizes, padded with 1 in front.
        strides: for each tensor, three strides.
    """

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        return self.sizes[0] * self.sizes[1] * self.sizes[2]


def merge_rows(sizes: Sequence[int], *strides: Sequence[int]) -> Rows | None:
    """`Rows` of tensors that share ``sizes``; None if more than three dimensions remain."""
    kept: list[tuple[int, list[int]]] = []
    for size, *steps in zip(sizes, *strides):
        if size == 1:
            continue
        if kept:
            outer, outer_steps = kept[-1]
            if all(a == b * size for a, b in zip(outer_steps, steps)):
                kept[-1] = (outer * size, list(steps))
                continue
        kept.append((size, list(steps)))
    if len(kept) > 3:
        return None
    while len(kept) < 3:
        kept.insert(0, (1, [0] * len(strides)))
    return Rows(
        tuple(size for size, _ in kept),
        tuple(tuple(steps[i] for _, steps in kept) for i in range(len(strides))),
    )


def rows_of(*tensors: Tensor) -> tuple[Rows, tuple[Tensor, ...]]:
    """Merged rows over all but the last dimension of tensors with equal leading sizes.

    A tensor whose last stride is not 1 is copied; where the leading dimensions do not merge
    to three, all are.
    """
    given = tuple(t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors)
    lead = given[0].shape[:-1]
    merged = merge_rows(lead, *(t.stride()[:-1] for t in given))
    if merged is None:
        given = tuple(t.contiguous() for t in given)
        merged = merge_rows(lead, *(t.stride()[:-1] for t in given))
        assert merged is not None
    return merged, given


def next_power_of_2(n: int) -> int:
    return 1 << (int(n) - 1).bit_length() if n > 1 else 1


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """``x`` (float32) rounded to DTYPE and back."""
    return x.to(DTYPE).to(tl.float32)
