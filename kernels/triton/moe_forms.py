"""Which form the experts' kernels take: few tokens without sorting, or sorted and cut into blocks.

Both read an expert that is hit once. The form without sorting is two launches, but each program of
its second goes through all choices one after the other; sorting is a dozen launches, and a float32
row is written for every choice. `prefers_sorting` compares the two by the cost model of
`linear_tiles` for the numbers of one call; nothing is compiled for it, as both forms of a site are
kernels of fixed tile sizes.
"""

from __future__ import annotations

import functools

from dspark_compile.kernels.triton._launch import Target, cdiv
from dspark_compile.kernels.triton.linear_tiles import ALONE, LAUNCH, SHARE

FEW = 16  # tokens that one tile holds
MAX_PAIRS = 1024  # choices that one program compares at once
# To look whether a choice is the first of its expert, for one program: loads that hit L1, and a
# reduction over four warps. An order of magnitude, like all of this model; not measured.
LOOK = 0.2e-6
SORTING = 14  # launches of `moe.blocks_of` and of the sum over the choices


def experts_hit(experts: int, k: int, tokens: int) -> float:
    """How many experts ``tokens`` with ``k`` choices each are expected to hit."""
    return experts * (1.0 - (1.0 - min(k, experts) / experts) ** tokens)


def _reading(nbytes: float, programs: float, target: Target) -> float:
    """Seconds for ``programs`` that read ``nbytes`` together."""
    return nbytes / (SHARE * min(target.units, max(programs, 1.0) * ALONE))


@functools.lru_cache(maxsize=4096)
def predicted(
    tokens: int, k: int, experts: int, inner: int, features: int, outputs: int, matrices: int,
    itemsize: int, target: Target, block_n: tuple[int, int] = (32, 64), block_m: int = 64,
) -> tuple[float, float]:  # fmt: skip
    """(seconds without sorting, seconds with), of one call.

    Args:
        matrices: 2 with a gate, else 1.
        itemsize: bytes of a weight.
        block_n: columns of a tile of each form; ``block_m``: rows of a sorted block.
    """
    hit, pairs = experts_hit(experts, k, tokens), tokens * k
    up, down = (float(hit * inner * itemsize * n) for n in (features * matrices, outputs))
    few = 2 * LAUNCH + pairs * LOOK
    few += _reading(up, hit * cdiv(inner, block_n[0]), target)
    few += _reading(down, cdiv(outputs, block_n[0]), target)
    blocks = hit + pairs / block_m
    again = blocks / hit  # an expert of several blocks is read by each of them
    ordered = (2 + SORTING) * LAUNCH + _reading(8.0 * pairs * outputs, target.units, target)
    ordered += _reading(again * up, blocks * cdiv(inner, block_n[1]), target)
    ordered += _reading(again * down, blocks * cdiv(outputs, block_n[1]), target)
    return few, ordered


def prefers_sorting(
    tokens: int, k: int, experts: int, inner: int, features: int, outputs: int, matrices: int,
    itemsize: int, target: Target,
) -> bool:  # fmt: skip
    """Whether a call sorts its choices: where it must, or where that is expected to be faster."""
    if tokens > FEW or tokens * k > MAX_PAIRS:
        return True
    few, ordered = predicted(
        tokens, k, experts, inner, features, outputs, matrices, itemsize, target
    )
    return ordered < few
