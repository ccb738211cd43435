"""Where fewer than 95 % of a family's sites are raised, or more graphs are made than Dynamo alone
makes, and why."""

from __future__ import annotations

KNOWN_GAPS: dict[tuple[str, str], str] = {
    ("apertus", "mlp"): "the activation (xIELU) has slopes that are parameters",
    ("bitnet", "mlp"): "a norm stands between the activation and the last linear",
    ("deepseek_v4", "mlp"): "gate and up are clamped before they meet",
    ("gemma3n_text", "mlp"): (
        "the sparse layers subtract a quantile of the gate's features before the activation"
    ),
    ("hy_v4", "norm"): ("these give 1 / rms alone, which scales another product of the same input"),
    ("inkling2_text", "attention"): (
        "the sink is computed for each query; the op takes one number for each head"
    ),
    ("minimax_m3_vl_text", "mlp"): "gate and up are clamped, and up is added to one",
    ("inkling_text", "experts"): (
        "its shared experts, stacked: all compute every token, with a weight for each; the routed "
        "ones are raised"
    ),
    ("openai-gpt", "attention"): (
        "the mask is multiplied with the scores, and that it holds only 0 and 1 is not known"
    ),
    ("prophetnet", "attention"): (
        "an .item() in decode breaks the graph beside attention, whose weights then leave it"
    ),
    ("qwen4_exp_text", "mlp"): (
        "no MLPs: low-rank gates whose features are divided before the activation; as Dynamo "
        "breaks the graph, they count in place of the sites it did not compile again"
    ),
    ("qwen4_exp_text", "rope"): (
        "Dynamo breaks the graph around the rotation and compiles it alone, the second time with "
        "a symbolic number of rotated features"
    ),
    ("zamba2", "mlp"): "low-rank adapters are added to gate and up",
    ("zaya", "norm"): "the q/k norm clamps the root of the squares, in place of an eps under it",
}
"""(family, kind) -> reason. An entry that is no longer needed fails the test that would use it."""

GUARDED_BY_TRACING: dict[str, str] = {}
"""family -> why tracing to ATen adds guards. Its graphs are compared with those of AOTAutograd
(``backend="aot_eager"``), which adds the same ones, in place of Dynamo alone."""
