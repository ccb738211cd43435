"""The passes, in order. This file is the pipeline."""

from __future__ import annotations

import functools

from torch import fx

from dspark_compile.passes.absorb_mla import AbsorbMLA
from dspark_compile.passes.add_norm import AddNorm
from dspark_compile.passes.audit import Audit
from dspark_compile.passes.base import Pass, PassContext
from dspark_compile.passes.fuse_dequantize_weight import FuseDequantizeWeight
from dspark_compile.passes.fuse_quantized_experts import FuseQuantizedExperts
from dspark_compile.passes.join_writes import JoinWrites
from dspark_compile.passes.kv_int8 import FuseDequantize, KVInt8
from dspark_compile.passes.merge_linears import MergeLinears
from dspark_compile.passes.normalize import Normalize
from dspark_compile.passes.prove_masks import ProveMasks
from dspark_compile.passes.qk_rope_append import QKRopeAppend
from dspark_compile.passes.raise_attention import RaiseAttention
from dspark_compile.passes.raise_cache import RaiseCache
from dspark_compile.passes.raise_linear import RaiseLinear
from dspark_compile.passes.raise_mlp import RaiseMLP
from dspark_compile.passes.raise_moe_cuts import RaiseMoECuts
from dspark_compile.passes.raise_moe_dense import RaiseMoEDense
from dspark_compile.passes.raise_moe_experts import RaiseMoEExperts
from dspark_compile.passes.raise_moe_gather import RaiseMoEGather
from dspark_compile.passes.raise_moe_loop import RaiseMoELoop
from dspark_compile.passes.raise_moe_router import RaiseMoERouter
from dspark_compile.passes.raise_moe_table import RaiseMoETable
from dspark_compile.passes.raise_norm import RaiseNorm
from dspark_compile.passes.raise_quantized import RaiseQuantized
from dspark_compile.passes.raise_rope import RaiseRope
from dspark_compile.passes.real_parts import RealParts
from dspark_compile.passes.repeat_kv import RepeatKV
from dspark_compile.passes.verifier import verify
from dspark_compile.passes.write_in_place import WriteInPlace

# Raise: decomposed forms become dialect ops.
RAISE: list[type[Pass]] = [
    Normalize,
    JoinWrites,
    RaiseQuantized,
    RaiseLinear,
    RaiseNorm,
    RaiseRope,
    RealParts,
    RaiseMLP,
    RaiseMoECuts,
    RaiseMoEExperts,
    RaiseMoEGather,
    RaiseMoEDense,
    RaiseMoETable,
    RaiseMoELoop,
    RaiseMoERouter,
    RaiseAttention,
    RepeatKV,
    RaiseCache,
    ProveMasks,
]
# Optimise: dialect to dialect.
OPTIMISE: list[type[Pass]] = [
    AddNorm,
    AbsorbMLA,
    FuseDequantize,
    FuseDequantizeWeight,
    FuseQuantizedExperts,
    MergeLinears,
]
# Finish: write caches in place, compress them if asked, and say what was missed.
FINISH: list[type[Pass]] = [
    WriteInPlace,
    KVInt8,
    QKRopeAppend,
    Audit,
]


def pipeline() -> list[type[Pass]]:
    """Every pass before lowering, in order."""
    return [*RAISE, *OPTIMISE, *FINISH]


@functools.cache
def pass_names() -> tuple[str, ...]:
    """The names that ``Options(disable=...)`` takes."""
    return tuple(dict.fromkeys(p.name for p in pipeline()))


def run_pipeline(module: fx.GraphModule, ctx: PassContext) -> None:
    """Run every enabled pass on ``module`` in place, verifying between them if asked."""
    for pass_type in pipeline():
        instance = pass_type()
        if not instance.enabled(ctx):
            continue
        instance.run(module.graph, ctx)
        if ctx.options.verify:
            verify(module.graph, ctx, after=instance.name)
        if ctx.options.keep_programs:
            ctx.report.programs[f"after {instance.name}"] = str(module.graph)
    module.graph.lint()
    module.recompile()
