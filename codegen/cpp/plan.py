"""From a graph of dialect ops to the stages of a native program.

One stage for each kernel, with its neighbours taken in:

    linears that share an input            one product over all their weights
    a norm in front of products            the product's prologue
    a residual addition behind a product   its epilogue
    ATen nodes between kernels             printed loops (`glue`)

Views are not stages: they are evaluated on fake tensors, and a kernel reads its operand where that
says it lies. What has to be copied is copied by a printed loop.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.codegen.cpp import emit, glue, sampling
from dspark_compile.codegen.cpp.fusions import LINEARS, MLPS, NORMS, Fusions
from dspark_compile.codegen.cpp.program import PlanError, Program
from dspark_compile.kernels import cpp
from dspark_compile.kernels.cpp import attention as attention_kernels
from dspark_compile.kernels.cpp import batched as batched_kernels
from dspark_compile.kernels.cpp import cache as cache_kernels
from dspark_compile.kernels.cpp import grouped as grouped_kernels
from dspark_compile.kernels.cpp import linear as linear_kernels
from dspark_compile.kernels.cpp import moe as moe_kernels
from dspark_compile.kernels.cpp import moe_quantized as int_experts
from dspark_compile.kernels.cpp import norm as norm_kernels
from dspark_compile.kernels.cpp import quantized as quantized_kernels
from dspark_compile.kernels.cpp import rope as rope_kernels
from dspark_compile.kernels.cpp._launch import MAX_ROWS, Call
from dspark_compile.passes.graph import argument, aten, dialect_name, is_dialect_op, is_op
from dspark_compile.passes.turned_weights import of_turned

VIEWS = frozenset(
    {
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default,
        aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.squeeze.default, aten.expand.default, aten.slice.Tensor,
        aten.select.int, aten.alias.default, aten.detach.default, aten.unbind.int,
        aten.split.Tensor, aten.split_with_sizes.default, aten.lift_fresh_copy.default,
        aten.view_as_real.default,
    }
)  # fmt: skip
_OTHERS = (
    "rope", "cache_append_", "cache_append_int8_", "qk_norm_rope_append_",
    "qk_norm_rope_append_int8_", "attention", "attention_int8", "mla_attention", "matmul",
)  # fmt: skip
# Where cosines and sines stand among an op's arguments.
ANGLES = {"rope": (1, 2), "qk_norm_rope_append_": (5, 6), "qk_norm_rope_append_int8_": (5, 6)}
QUANTIZED = ("linear_int8", "linear_int4", "gated_mlp_int8", "gated_mlp_int4")
PRODUCTS = (*LINEARS, *MLPS, *QUANTIZED)
INT_EXPERTS = ("moe_experts_int8", "moe_experts_int4")
EXPERTS = ("moe_router", "moe_experts", "grouped_linear", *INT_EXPERTS)


def reason(node: fx.Node) -> str | None:
    """Why ``node`` cannot be part of a native program; None if it can."""
    if node.op != "call_function":
        return f"{node.op} {node.target}"
    if node.target is operator.getitem or node.target in VIEWS or sampling.part_of_race(node):
        return None
    if node.target in sampling.STAGES or sampling.race(node):
        return sampling.reason(node)
    if of_turned(node):
        x, weight, bias = (
            None if a is None else a.meta["val"]  # type: ignore[union-attr]
            for a in (*node.args[:2], argument(node, 2, "bias"))
        )
        with emit.deferred():
            return batched_kernels.supports_turned(x, weight, bias)
    if is_dialect_op(node):
        name = dialect_name(node)
        if name not in (*PRODUCTS, *NORMS, *_OTHERS, *EXPERTS):
            return f"{name} has no stage"
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        if name in ("attention", "attention_int8"):
            rows = args[0].shape[2]
            if isinstance(rows, int) and rows > MAX_ROWS:
                return f"{rows} query rows, not 1 to {MAX_ROWS}"
        with emit.deferred():
            return cpp.supports(name, *args, **kwargs)
    if is_op(node, aten.bmm.default):
        with emit.deferred():
            return cpp.supports("matmul", *(x.meta["val"] for x in node.args))  # type: ignore[union-attr]
    return glue.reason(node)


class Planner:
    """Plans ``nodes``, which read ``inputs`` and each other.

    Raises:
        PlanError: a stage would need what it cannot get.
    """

    def __init__(self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node]):
        self.program = Program()
        self.nodes = _early_first(nodes, inputs)
        self.fusions = Fusions(self.nodes)
        self.values: dict[fx.Node, Any] = {}
        for number, node in enumerate(inputs):
            value = node.meta["val"]
            self.values[node] = value
            if isinstance(value, Tensor):
                self.program.add_input(value, number)
        self.inputs = set(inputs)
        self.done: set[fx.Node] = set()
        self._glue: glue.Glue | None = None
        self._glue_names: list[str] = []

    def plan(self) -> None:
        """Fill ``program`` with the stages of every node."""
        for node in self.nodes:
            if node in self.done:
                continue
            name = dialect_name(node)
            if of_turned(node):
                self._turned(node)
                continue
            if name:
                self._check(node)
            if name in LINEARS:
                self._linears(node)
            elif name in MLPS:
                self._mlp(node)
            elif name in NORMS:
                self._norm(node)
            elif name == "matmul" or is_op(node, aten.bmm.default):
                self._matmul(node)
            elif name:
                self._other(node, name)
            elif node in self.fusions.totals:
                self.values[node] = self.values[self.fusions.totals[node]].reshape(
                    node.meta["val"].shape
                )
            elif node.target is operator.getitem:
                base = self.values.get(node.args[0])  # type: ignore[arg-type]
                self.values[node] = None if base is None else base[node.args[1]]  # type: ignore[index]
            elif node.target in VIEWS:
                self._view(node)
            elif sampling.part_of_race(node):
                continue  # its end draws
            elif node.target in sampling.STAGES or sampling.race(node):
                self._sampling(node)
            else:
                self._loops(node)
        self.flush()

    def get(self, x: Any) -> Any:
        """The value of a node, or of what is no node."""
        if not isinstance(x, fx.Node):
            return x
        if self.values.get(x) is None:
            raise PlanError(f"{x.name} is read and was not computed")
        return self.values[x]

    def _check(self, node: fx.Node) -> None:
        """`reason` went by the graph's strides; here are the real ones.

        A norm that was taken in has no value: its product reads rows, which are made to fit.
        """
        known = lambda x: self.values.get(x, x.meta["val"])  # noqa: E731
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known)
        with emit.deferred():
            why = cpp.supports(dialect_name(node), *args, **kwargs)
        if why is not None:
            raise PlanError(f"{node.name}: {why}")

    def add(self, call: Call, name: str) -> None:
        """A stage, behind the loops that are pending."""
        self.flush()
        self.program.add(call, name)

    def flush(self) -> None:
        """Make a stage of the pending loops."""
        if self._glue is None:
            return
        pending, self._glue = self._glue, None
        nbytes = sum(x.numel() * x.element_size() for x in pending.outs)
        values = (*pending.tensors, *pending.sizes)
        call = Call(pending.source(), values, nbytes, tuple(pending.outs))
        self.program.add(call, "+".join(self._glue_names[:3]))
        self._glue_names = []

    def _loops(self, node: fx.Node) -> None:
        value = node.meta["val"]
        out: Any
        if is_op(node, aten.copy_.default):
            out = self.get(node.args[0])
        elif isinstance(value, Tensor):
            out = _like(value)
        else:
            out = tuple(_like(x) for x in value)
        large = (out if isinstance(out, Tensor) else out[0]).numel() > glue.SMALL
        if self._glue is not None and (large or self._glue.elements > glue.SMALL):
            self.flush()
        self._glue = self._glue or glue.Glue()
        try:
            self._glue.add(node, self.get, out)
        except glue.NotGlue as error:
            raise PlanError(str(error)) from None
        self._glue_names.append(node.name)
        self.values[node] = out

    def _copied(self, x: Tensor, shape: Sequence[int], name: str) -> Tensor:
        """A contiguous copy of ``x``, in another shape."""
        out = x.new_empty(x.shape)
        graph = fx.Graph()
        node = graph.call_function(aten.clone.default, (x,))
        node.name = f"{name}_copy"
        node.meta["val"] = out
        if self._glue is not None and max(out.numel(), self._glue.elements) > glue.SMALL:
            self.flush()
        self._glue = self._glue or glue.Glue()
        try:
            self._glue.add(node, lambda y: y, out)
        except glue.NotGlue as error:
            raise PlanError(str(error)) from None
        self._glue_names.append(node.name)
        return out.reshape(shape)

    def _known(self, x: Tensor) -> bool:
        pending = self._glue.outs if self._glue is not None else []
        key = x.untyped_storage()._cdata
        return self.program.knows(x) or any(p.untyped_storage()._cdata == key for p in pending)

    def _view(self, node: fx.Node) -> None:
        if self.fusions.source(node) in self.fusions.prologues:
            # Only products read it, and they look through it.
            self.values[node] = node.meta["val"]
            return
        args = fx.node.map_arg(node.args, self.get)
        kwargs = fx.node.map_arg(node.kwargs, self.get)
        base = args[0]
        if node.target is aten._unsafe_view.default or node.target is aten.view.default:
            result = aten.reshape.default(*args, **kwargs)
        elif node.target is aten.lift_fresh_copy.default:
            result = base
        else:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        first = result[0] if isinstance(result, (list, tuple)) else result
        if not self._known(first):
            result = self._copied(base, first.shape, node.name)
        self.values[node] = result

    def rows(self, x: Tensor, name: str) -> Tensor:
        """``x [..., K]`` as ``[M, K]`` with contiguous rows."""
        flat = x.reshape(-1, x.shape[-1])
        if not self._known(flat):
            flat = self._copied(x, flat.shape, name)
        if flat.stride(-1) != 1 and flat.shape[-1] != 1:
            flat = self._copied(flat, flat.shape, name)
        return flat

    def contiguous(self, x: Any, name: str) -> Any:
        """``x``, copied where it is not contiguous."""
        if not isinstance(x, Tensor) or x.is_contiguous():
            return x
        return self._copied(x, x.shape, name)

    def _operand(self, x: fx.Node) -> tuple[Tensor, linear_kernels.Norm | None]:
        """What a product reads: rows, and the norm in front of them."""
        norm_node = self.fusions.prologues.get(self.fusions.source(x))
        if norm_node is None:
            return self.rows(self.get(x), x.name), None
        name = dialect_name(norm_node)
        if name.startswith("add_"):
            value = self.values[self.fusions.totals[norm_node]]
        else:
            value = self.get(norm_node.args[0])
        weight, bias, eps, offset, in_compute = _norm_arguments(norm_node)
        weight, bias = self.get(weight), self.get(bias)
        other = weight if weight is not None else bias
        prologue = emit.Prologue(
            value.dtype if other is None else other.dtype,
            centre="layer" in name,
            first=not in_compute and value.dtype != torch.float32,
        )
        rows = self.rows(value, x.name)
        return rows, linear_kernels.Norm(prologue, weight, bias, eps, offset)

    def _residual(self, node: fx.Node, out: Tensor) -> Tensor | None:
        other = self.fusions.residuals.get(node)
        if other is None:
            return None
        value = self.contiguous(self.get(other), node.name)
        return value.reshape(-1, out.shape[-1])

    def _linears(self, node: fx.Node) -> None:
        """``node`` with every other linear on its input."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        group = [node]
        if node not in self.fusions.residuals:
            group = [
                user
                for user in self.nodes
                if user in x.users
                and user not in self.done
                and dialect_name(user) in LINEARS
                and not of_turned(user)
                and user.args[0] is x
                and user not in self.fusions.residuals
                and all(w is None or w in self.values for w in user.args[1:3])
            ]
        rows, norm = self._operand(x)
        lead = x.meta["val"].shape[:-1]
        parts: list[tuple[Tensor, Tensor | None, Tensor]] = []
        for user in group:
            self._check(user)
            weight = self.get(user.args[1])
            bias = self.contiguous(self.get(argument(user, 2, "bias")), user.name)
            if dialect_name(user) == "merged_linear":
                sizes = user.args[3]
                outs = [rows.new_empty((*lead, n)) for n in sizes]  # type: ignore[union-attr]
                parts += linear_kernels.merged_parts(weight, bias, sizes, outs)  # type: ignore[arg-type]
                self.values[user] = outs
            else:
                out = rows.new_empty((*lead, weight.shape[0]))
                parts.append((weight, bias, out))
                self.values[user] = out
            self.done.add(user)
        residual = self._residual(node, self.values[node]) if len(parts) == 1 else None
        call = linear_kernels.linear_call(rows, parts, residual=residual, norm=norm)
        self.add(call, "+".join(user.name for user in group))

    def _mlp(self, node: fx.Node) -> None:
        name = dialect_name(node)
        rows, norm = self._operand(node.args[0])  # type: ignore[arg-type]
        args = [self.get(a) for a in node.args[1:]]
        if name == "gated_mlp":
            gate, up, down, *biases, activation = args[:7]
        elif name == "gated_mlp_merged":
            gate, up = args[0].chunk(2)
            down, both, last, activation = args[1:5]
            biases = [*((None, None) if both is None else both.chunk(2)), last]
        else:
            gate, up, down = None, args[0], args[1]
            biases, activation = [None, *args[2:4]], args[4]
        biases = [self.contiguous(b, node.name) for b in biases]
        lead = node.args[0].meta["val"].shape[:-1]  # type: ignore[union-attr]
        out = rows.new_empty((*lead, down.shape[0]))
        call = linear_kernels.mlp_call(
            rows, gate, up, down, tuple(biases), activation, out,  # type: ignore[arg-type]
            residual=self._residual(node, out), norm=norm,
        )  # fmt: skip
        self.values[node] = out
        self.add(call, node.name)

    def _norm(self, node: fx.Node) -> None:
        name = dialect_name(node)
        added = name.startswith("add_")
        fused = node in self.fusions.totals
        parts = {u.args[1]: u for u in node.users if u.target is operator.getitem} if added else {}
        result = parts.get(0) if added else node
        total = self.values[self.fusions.totals[node]] if fused else None
        if total is not None:
            total = total.reshape(node.meta["val"][1].shape)
        if result is not None and result in self.fusions.prologues:
            # The products do it; those of ``add_`` are only here if the sum is a product's.
            self.values[node] = (result.meta["val"], total) if added else node.meta["val"]
            return
        weight, bias, eps, offset, in_compute = _norm_arguments(node)
        out_dtype = node.args[-1] if isinstance(node.args[-1], torch.dtype) else None
        x = self.get(node.args[0]) if total is None else total
        residual = self.get(node.args[1]) if added and total is None else None
        x = self.contiguous(x, node.name) if x.stride(-1) != 1 else x
        call, y, summed = norm_kernels.norm_call(
            x, residual, self.get(weight), self.get(bias), eps, offset, in_compute, out_dtype,
            "layer" in name,
        )  # fmt: skip
        if call is None:
            raise PlanError(f"{node.name} has no rows")
        self.add(call, node.name)
        self.values[node] = (y, summed if total is None else total) if added else y

    def _other(self, node: fx.Node, name: str) -> None:
        args = fx.node.map_arg(node.args, self.get)
        kwargs = dict(node.kwargs)
        if name in ANGLES:  # cosine and sine in turns, say, as one table has them
            args = tuple(
                self.contiguous(a, node.name) if i in ANGLES[name] and a.stride(-1) != 1 else a
                for i, a in enumerate(args)
            )
        if name in QUANTIZED:
            x = args[0]
            rows = self.rows(x, node.name).reshape(x.shape)
            flat = [self.contiguous(a, node.name) for a in args[1:]]
            call, self.values[node] = quantized_kernels.call_of(name, (rows, *flat))
        elif name == "moe_router":
            call, self.values[node] = moe_kernels.router_of(
                self.rows(args[0], node.name), args[0],
                [self.contiguous(a, node.name) if i in (2, 3) else a for i, a in enumerate(args)],
            )  # fmt: skip
        elif name == "moe_experts":
            call, self.values[node] = self._experts(node, args)
        elif name == "grouped_linear":
            x, ends, weight, bias = args
            rows, ends = self.rows(x, node.name), self.contiguous(ends, node.name)
            bias = [self.contiguous(t, node.name) for t in bias]
            call, self.values[node] = grouped_kernels.call_of(rows, ends, weight, bias)
        elif name in INT_EXPERTS:
            rows = self.rows(args[0], node.name)
            flat = [
                [self.contiguous(t, node.name) for t in a] if i in range(12, 15) else a
                for i, a in enumerate(args)
            ]
            flat[1:3] = [self.contiguous(t, node.name) for t in args[1:3]]
            call, self.values[node] = int_experts.call_of(name, rows, flat)
        elif name == "rope":
            made = rope_kernels.rope_call(*args, **kwargs)
            if made is None:
                raise PlanError(f"{node.name}: its rows have too many strides")
            call, self.values[node] = made
        elif name == "cache_append_":
            call = cache_kernels.append_call(args[0], None, args[1], args[2])
        elif name == "cache_append_int8_":
            call = cache_kernels.append_call(*args)
        elif name in ("qk_norm_rope_append_", "qk_norm_rope_append_int8_"):
            call, self.values[node] = cache_kernels.prepare_of(name, args)
        else:
            call, self.values[node] = attention_kernels.call_of(name, args, kwargs)
        self.add(call, node.name)

    def _turned(self, node: fx.Node) -> None:
        """A linear whose weight lies ``[in, out]``."""
        x, weight = (self.get(a) for a in node.args[:2])
        bias = self.contiguous(self.get(argument(node, 2, "bias")), node.name)
        with emit.deferred():
            why = batched_kernels.supports_turned(x, weight, bias)
        if why is not None:
            raise PlanError(f"{node.name}: {why}")
        call, out = batched_kernels.bmm_call(self.rows(x, node.name)[None], weight.t()[None], bias)
        self.values[node] = out.reshape(node.meta["val"].shape)
        self.add(call, node.name)

    def _matmul(self, node: fx.Node) -> None:
        x, weight = (self.get(a) for a in node.args)
        swapped = batched_kernels.other_way(x, weight)
        if swapped:
            x, weight = weight.mT, x.mT
        with emit.deferred():
            why = cpp.supports("matmul", x, weight)  # by the real strides
        if why is not None:
            raise PlanError(f"{node.name}: {why}")
        rows = x.flatten(0, -3)
        if not self._known(rows) or rows.stride(-1) != 1:
            rows = self._copied(x, rows.shape, node.name)
        call, out = batched_kernels.bmm_call(rows, weight.flatten(0, -3))
        out = out.unflatten(0, x.shape[:-2])
        self.values[node] = out.mT if swapped else out
        self.add(call, node.name)

    def _sampling(self, node: fx.Node) -> None:
        found = sampling.race(node)
        x = self.contiguous(self.get(found[0] if found else node.args[0]), node.name)
        if node.target is aten._softmax.default:
            call, self.values[node] = sampling.softmax(x, node.meta["val"].dtype)
        elif node.target is aten.topk.default:
            call, self.values[node] = sampling.topk(x, node.meta["val"][0].shape[-1])
        else:
            uniform = self.program.random(x.numel() // x.shape[-1])
            shape, race = node.meta["val"].shape, found is not None
            call, self.values[node] = sampling.draw(x, uniform, shape, race)
        self.add(call, node.name)

    def _experts(self, node: fx.Node, args: Any) -> tuple[Call, Tensor]:
        x, indices, weights, *rest = args
        k = indices.shape[-1]
        rows = self.rows(x, node.name)
        chosen = [self.contiguous(t, node.name).reshape(-1, k) for t in (indices, weights)]
        stacks, biases, others = rest[:3], rest[3:6], rest[6:]
        biases = [[self.contiguous(t, node.name) for t in b] for b in biases]
        others = [self.contiguous(t, node.name) for t in others]
        out = x.new_empty((*x.shape[:-1], stacks[2][0].shape[-2]))
        flat = out.reshape(-1, out.shape[-1])
        call = moe_kernels.experts_call(rows, flat, *chosen, *stacks, *biases, *others)  # type: ignore[arg-type]
        return call, out


def _like(value: Tensor) -> Tensor:
    """Memory with the strides of ``value``, if each of its elements has a place of its own."""
    size = 1
    for stride, length in sorted(zip(value.stride(), value.shape)):
        if length != 1 and stride != size:
            return value.new_empty(value.shape)
        size *= length
    return value.new_empty_strided(value.shape, value.stride())


def _early_first(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """Loops and views that only need inputs go first, into one stage.

    Not those of an input that a kernel writes: they may want the new value. (One that ``copy_``
    writes is read before, wherever the reader stands: the graph is functional but for caches.)
    """
    ready = set(inputs)
    for node in nodes:
        if is_dialect_op(node):
            schema = node.target._schema  # type: ignore[union-attr]
            for argument_, value in zip(schema.arguments, node.args):
                if argument_.alias_info is not None and argument_.alias_info.is_write:
                    ready.discard(value)  # type: ignore[arg-type]
    early = []
    for node in nodes:
        if is_dialect_op(node) or is_op(node, aten.copy_.default):
            continue
        if all(x in ready for x in node.all_input_nodes):
            ready.add(node)
            early.append(node)
    chosen = set(early)
    return [*early, *(n for n in nodes if n not in chosen)]


def _norm_arguments(node: fx.Node) -> tuple[Any, Any, float, float, bool]:
    """(weight, bias, eps, weight offset, whether the weight joins before the rounding)."""
    name = dialect_name(node)
    rest = list(node.args[2:] if name.startswith("add_") else node.args[1:])
    weight = rest.pop(0)
    bias = rest.pop(0) if "layer" in name else None
    defaults: list[Any] = [None, 0.0, False]
    eps, offset, in_compute = [*rest, *defaults[len(rest) :]][:3]
    return weight, bias, eps, offset, in_compute
