"""The arg-max of `kernels/cpp/choose.h` is torch's, whatever stands in the logits."""

from __future__ import annotations

import pytest
import torch

from dspark_compile.codegen.cpp import isa
from dspark_compile.kernels.cpp.choose import NativeChooser

SIZES = (1, 15, 255, 256, 257, 511, 4096, 4103)
LEVELS = [x for x in ("avx512", "avx2", "portable") if x in isa.available()]


def rows(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows with ties, NaN, infinities, in blocks and behind the last one."""
    z = torch.randn(10, size)
    z[1] = 3.0
    z[2, size // 2] = z[2, -1] = 9.0
    z[3, -1] = torch.nan
    z[4, size // 3] = torch.nan
    z[5, size // 3] = torch.inf
    z[6] = -torch.inf
    z[7, : size // 2] = -torch.inf
    z[8] = -0.0
    z[8, size // 2] = 0.0
    z[9] = -z[9].abs() - 1
    return z.to(dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arg_max(monkeypatch, level, dtype):
    monkeypatch.setattr(isa, "detect", lambda: level)
    for size in SIZES:
        z = rows(size, dtype)
        tokens, done = torch.zeros(10, dtype=torch.long), torch.zeros(10, dtype=torch.bool)
        choose = NativeChooser(z, tokens, done, uniform=None, seen=None, eos=[], pad=0)
        assert choose() == 10
        assert torch.equal(tokens, z.argmax(-1)), size


@pytest.mark.parametrize("bad", ["a nan", "an infinity", "nothing", "a nan beside masked ones"])
@pytest.mark.parametrize("how", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_there_is_nothing_to_draw_from(bad, how):
    """As in transformers, whose torch.multinomial raises; what is masked is nothing bad."""
    z = torch.randn(3, 300)
    z[:, ::2] = -torch.inf
    tokens, done = torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool)
    given = {"uniform": torch.rand(3), "seen": None, "eos": [], "pad": 0}
    assert NativeChooser(z, tokens, done, **given, **how)() == 3
    assert bool((tokens % 2 == 1).all())
    if bad == "nothing":
        z[1] = -torch.inf
    else:
        z[1, 7] = torch.inf if bad == "an infinity" else torch.nan
    if bad == "a nan":
        z[1, ::2] = 0.0
    with pytest.raises(RuntimeError, match="probabilities to draw from are inf, nan"):
        NativeChooser(z, tokens, done, **given, **how)()
    done[1] = True  # a row that has ended is not looked at
    assert NativeChooser(z, tokens, done, **given, **how)() == 2
