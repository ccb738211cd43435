"""The attention kernel of one mask predicate.

The template is `dspark_compile.kernels.triton.attention_kernel`, read as text; the result is a
file of the cache directory that says in its first line which predicate it is for.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import ModuleType

from dspark_compile.codegen.triton.predicate import MaskCode, print_predicate
from dspark_compile.codegen.triton.source import load_source

_FUNCTIONS = """\
@triton.jit
def mask_allowed(b, h, q, k, inside{parameters}):
    return {allowed}


@triton.jit
def mask_upper(b, h, q{parameters}):
    return {upper}


@triton.jit
def mask_lower(b, h, q{parameters}):
    return {lower}
"""


@functools.lru_cache(maxsize=256)
def attention_module(text: str) -> tuple[ModuleType, MaskCode]:
    """The module whose ``attention_kernel`` holds the predicate, and the predicate's code."""
    code = print_predicate(text)
    if not code.allowed:
        from dspark_compile.kernels.triton import attention_kernel

        return attention_kernel, code
    return load_source("attention", fill(_template(), code)), code


@functools.lru_cache(maxsize=1)
def _template() -> str:
    from dspark_compile.kernels.triton import attention_kernel

    return Path(attention_kernel.__file__).read_text()


def fill(template: str, code: MaskCode) -> str:
    """The template's text with the predicate in place of its ``# mask: …`` lines."""
    parameters = "".join(f", {p}" for p in code.parameters)
    functions = _FUNCTIONS.format(
        parameters=parameters,
        allowed=code.allowed,
        upper=code.upper or "q",
        lower=code.lower or "q",
    )
    text = re.sub(
        r"# mask: functions\n.*?\n\n# mask: end\n",
        lambda _: functions,
        template,
        flags=re.DOTALL,
    )
    for kind in ("parameters", "arguments"):
        text = re.sub(
            rf"^( *)# mask: {kind}\n",
            lambda match: "".join(f"{match[1]}{p},\n" for p in code.parameters),
            text,
            flags=re.MULTILINE,
        )
    names = ['"M"', '"N"', '"splits"', *(f'"{name}"' for name in code.integers)]
    text = re.sub(
        r"^NOT_SPECIALISED = .*$",
        f"NOT_SPECIALISED = [{', '.join(names)}]",
        text,
        flags=re.MULTILINE,
    )
    return f"# Attention for the mask {code.text!r}, printed into dspark's template.\n{text}"
