"""Reading feature maps as rotations: the arrays that `features` computes, compared with those
of the two layouts of RoPE. `raise_rope` finds the nodes and writes the op."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import fx

from dspark_compile.passes.base import Problem
from dspark_compile.passes.features import NONE, Array, Features, Term
from dspark_compile.passes.graph import shape


@dataclass(frozen=True)
class Columns:
    """A coefficient: which columns of which source (``part`` of a complex one)."""

    node: fx.Node
    part: str
    start: int
    stop: int
    step: int


@dataclass(frozen=True)
class Rotation:
    """What a node computes, if it is a rotation of the features of ``x``.

    Attributes:
        offset, width: the features of ``x`` that the result has, rotated or not.
        rotary_dim: how many of them, the first ones, are rotated.
        interleaved: which pairs.
        ordered: False if ``x`` holds interleaved pairs and the result half-split ones.
        clockwise: sin enters with the opposite sign.
    """

    x: fx.Node
    offset: int
    width: int
    rotary_dim: int
    interleaved: bool
    ordered: bool
    clockwise: bool
    cos: Columns
    sin: Columns


def match_rotation(value: tuple[Term, ...], features: Features) -> Rotation | Problem | None:
    """Read the arrays of a node as a rotation followed by untouched features."""
    sign = np.stack([t.sign for t in value])
    second = np.stack([t.source2 for t in value])
    products = ((sign != 0) & (second != NONE)).sum(0)
    plain = ((sign != 0) & (second == NONE)).sum(0)
    if not (products == 2).any():
        return None
    rotary = int((products == 2).sum())
    width = len(products)
    ordered = (products[:rotary] == 2).all() and (products[rotary:] == 0).all()
    if not ordered or (plain[:rotary] != 0).any() or (plain[rotary:] != 1).any():
        return Problem("the rotated features are not the first ones, each with two products")
    if rotary % 2:
        return Problem(f"an odd number of features ({rotary}) is rotated")
    # The two products of every rotated feature, in slots.
    slots = np.argsort((sign == 0)[:, :rotary], axis=0, kind="stable")[:2]
    a, b = (_gather(value, slot, rotary) for slot in slots)
    shared = sorted({*a.source, *a.source2} & {*b.source, *b.source2})
    best: Problem | None = None
    for x in shared:
        found = _with_source(a, b, int(x), rotary, width, features)
        if isinstance(found, Rotation):
            return _with_rest(found, value, features, width)
        best = best or found
    return best or Problem("the two products of a feature share no tensor to rotate")


def _gather(value: tuple[Term, ...], slot: Array, rotary: int) -> Term:
    columns = np.arange(rotary)

    def pick(name: str) -> Array:
        return np.stack([getattr(t, name) for t in value])[slot, columns]

    return Term(*(pick(n) for n in ("sign", "source", "index", "source2", "index2")))


def _split(term: Term, x: int) -> tuple[Array, Array, Array] | None:
    """``(feature of x, coefficient's source, its column)`` of every product."""
    first, second = term.source == x, term.source2 == x
    if not (first | second).all():
        return None
    data = np.where(first, term.index, term.index2)
    source = np.where(first, term.source2, term.source)
    return data, source, np.where(first, term.index2, term.index)


def _with_source(
    a: Term, b: Term, x: int, rotary: int, width: int, features: Features
) -> Rotation | Problem:
    left, right = _split(a, x), _split(b, x)
    node = features.sources[x][0]
    if left is None or right is None:
        return Problem(f"some products are not of {node.name}", "", node)
    offset = int(min(left[0].min(), right[0].min()))
    position, half = np.arange(rotary), rotary // 2
    half_split = (position + half) % rotary
    pairs = position ^ 1
    deinterleaved = np.where(position < half, 2 * position, 2 * (position - half) + 1)
    for interleaved, ordered, own, other in (
        (False, True, position, half_split),
        (True, True, position, pairs),
        (False, False, deinterleaved, deinterleaved[half_split]),
    ):
        straight = (left[0] - offset == own) & (right[0] - offset == other)
        crossed = (right[0] - offset == own) & (left[0] - offset == other)
        if not (straight | crossed).all():
            continue
        cos_sign, sin_sign = (
            np.where(straight, p, q) for p, q in ((a.sign, b.sign), (b.sign, a.sign))
        )
        cos, sin = (
            tuple(np.where(straight, p[i], q[i]) for i in (1, 2))
            for p, q in ((left, right), (right, left))
        )
        first = (position % 2 == 0) if interleaved else (position < half)
        turn = np.where(first, -1, 1)
        clockwise = bool((sin_sign == -turn).all())
        if not (cos_sign == 1).all() or not (clockwise or (sin_sign == turn).all()):
            return Problem(
                "the signs are not a rotation's",
                "rotate as x * cos + cat(-x2, x1) * sin",
                node,
            )
        c, s = (_columns(s, i, interleaved, features) for s, i in (cos, sin))
        if isinstance(c, Problem):
            return c
        if isinstance(s, Problem):
            return s
        return Rotation(node, offset, rotary, rotary, interleaved, ordered, clockwise, c, s)
    return Problem(
        "a feature is not mixed with its partner of either layout",
        "pair feature i with i + R/2, or 2i with 2i + 1",
        node,
    )


def _columns(
    source: Array, index: Array, interleaved: bool, features: Features
) -> Columns | Problem:
    """The coefficient's columns as a slice, at half width where pairs share them."""
    if (source != source[0]).any():
        return Problem("cos or sin of one rotation comes from several tensors")
    node, part = features.sources[int(source[0])]
    half = len(index) // 2
    one, two = (index[0::2], index[1::2]) if interleaved else (index[:half], index[half:])
    wanted = one if (one == two).all() else index
    step = int(wanted[1] - wanted[0]) if len(wanted) > 1 else 1
    start, stop = int(wanted[0]), int(wanted[-1]) + 1
    if step < 1 or not (wanted == start + step * np.arange(len(wanted))).all():
        return Problem("the columns of cos or sin are in no regular order", "", node)
    if start == 0 and step == 1 and stop == len(wanted) == shape(node)[-1]:
        return Columns(node, part, 0, stop, 1)
    return Columns(node, part, start, stop, step)


def _with_rest(
    rotation: Rotation, value: tuple[Term, ...], features: Features, width: int
) -> Rotation | Problem:
    """Add the features that pass through, which must follow the rotated ones in ``x``."""
    rotary = rotation.rotary_dim
    if width == rotary:
        return rotation
    rest = np.arange(rotary, width)
    slot = np.argsort((np.stack([t.sign for t in value]) == 0), axis=0, kind="stable")[0]
    sign, source, index = (
        np.stack([getattr(t, name) for t in value])[slot[rest], rest]
        for name in ("sign", "source", "index")
    )
    x = features.id(rotation.x)
    if (sign != 1).any() or (source != x).any() or (index != rotation.offset + rest).any():
        return Problem("the features beside the rotated ones are not x's own", "", rotation.x)
    return Rotation(**{**rotation.__dict__, "width": width})
