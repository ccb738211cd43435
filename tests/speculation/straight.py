"""The draft, read off the algorithm one row, one head, one feature at a time.

float64 lists of vectors instead of batched tensors; nothing is shared with the implementation but
the names of weights.
"""

from __future__ import annotations

import math

import torch


class Straight:
    """A draft's block for one request, from a state dict and a plain dict of sizes."""

    def __init__(self, weights, config, embedding, head):
        self.w = {k: v.detach().double() for k, v in weights.items()}
        self.c = config
        self.embedding, self.head = embedding.double(), head.double()

    # -- small parts

    def rms(self, x, weight=None):
        y = x / math.sqrt(float((x * x).sum()) / len(x) + self.c.rms_norm_eps)
        return y if weight is None else y * weight

    def turn(self, x, position):
        width = len(x)
        theta = self.c.rope_parameters["rope_theta"]
        part = self.c.rope_parameters.get("partial_rotary_factor", 1.0)
        proportional = self.c.rope_parameters.get("rope_type") == "proportional"
        turned = width if proportional else int(width * part)
        out = x.clone()
        for i in range(turned // 2):
            if proportional and i >= int(part * width // 2):
                continue
            angle = position * theta ** (-2 * i / turned)
            a, b = x[i], x[i + turned // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + turned // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def act(self, x):
        if self.c.hidden_act == "silu":
            return x / (1 + torch.exp(-x))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def linear(self, name, x):
        y = self.w[f"{name}.weight"] @ x
        bias = self.w.get(f"{name}.bias")
        return y if bias is None else y + bias

    def heads(self, x, count):
        return [x[i * self.c.head_dim : (i + 1) * self.c.head_dim] for i in range(count)]

    def keys_values(self, i, x, position):
        """Keys and values of one token in layer i, a vector a head."""
        p, g = f"layers.{i}.self_attn", self.c.num_key_value_heads
        raw = self.heads(self.linear(f"{p}.k_proj", x), g)
        same = self.c.attention_k_eq_v
        values = raw if same else self.heads(self.linear(f"{p}.v_proj", x), g)
        knorm = self.w.get(f"{p}.k_norm.weight")
        keys = [self.turn(k if knorm is None else self.rms(k, knorm), position) for k in raw]
        if self.c.family == "gemma4":
            values = [self.rms(v) for v in values]
        return keys, values

    # -- the block

    def hidden(self, taps, anchor, position):
        """Rows after the final norm. taps: one concatenated vector for each context token, whose
        positions are 0, 1, ...; the anchor stands at ``position``, right behind them."""
        c = self.c
        assert len(taps) == position
        context = [self.rms(self.w["fc.weight"] @ t, self.w["hidden_norm.weight"]) for t in taps]
        ids = [anchor] + [c.mask_token_id] * (c.block_size - 1)
        rows = [self.embedding[i] * c.embed_scale for i in ids]
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        gemma = c.family == "gemma4"
        for i in range(c.num_hidden_layers):
            n = f"layers.{i}"
            keys, values = [], []
            for j, h in enumerate(context):
                k, v = self.keys_values(i, h, j)
                keys.append(k), values.append(v)
            normed = [self.rms(x, self.w[f"{n}.input_layernorm.weight"]) for x in rows]
            for r, x in enumerate(normed):
                k, v = self.keys_values(i, x, position + r)
                keys.append(k), values.append(v)
            out = []
            for r, x in enumerate(normed):
                queries = self.heads(self.linear(f"{n}.self_attn.q_proj", x), c.num_attention_heads)
                qnorm = self.w.get(f"{n}.self_attn.q_norm.weight")
                mixed = []
                for h, q in enumerate(queries):
                    q = self.turn(q if qnorm is None else self.rms(q, qnorm), position + r)
                    g = h * c.num_key_value_heads // c.num_attention_heads
                    allowed = [
                        j
                        for j in range(len(keys))
                        if c.layer_types[i] == "full_attention"
                        or (
                            position + r - j < c.sliding_window
                            and (c.sliding_window_non_causal or j < position or j <= position + r)
                        )
                    ]
                    scores = torch.stack([q @ keys[j][g] * scale for j in allowed])
                    share = torch.softmax(scores, 0)
                    mixed.append(sum(s * values[j][g] for s, j in zip(share, allowed)))
                o = self.linear(f"{n}.self_attn.o_proj", torch.cat(mixed))
                if gemma:
                    o = self.rms(o, self.w[f"{n}.post_attention_layernorm.weight"])
                x = rows[r] + o
                before = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
                m = self.rms(x, self.w[f"{n}.{before}.weight"])
                m = self.linear(
                    f"{n}.mlp.down_proj",
                    self.act(self.linear(f"{n}.mlp.gate_proj", m))
                    * self.linear(f"{n}.mlp.up_proj", m),
                )
                if gemma:
                    m = self.rms(m, self.w[f"{n}.post_feedforward_layernorm.weight"])
                y = x + m
                out.append(y * self.w[f"{n}.layer_scalar"] if gemma else y)
            rows = out
        rows = [self.rms(x, self.w["norm.weight"]) for x in rows]
        return rows if c.sample_from_anchor else rows[1:]

    # -- the sequential stage

    def sequence(self, rows, anchor, choose):
        """Tokens, logits and confidences, left to right."""
        c, previous = self.c, anchor
        state = torch.zeros(c.markov_rank, dtype=torch.float64)
        tokens, logits, confidences = [], [], []
        for h in rows:
            u = self.head @ h
            if c.final_logit_softcapping is not None:
                u = torch.tanh(u / c.final_logit_softcapping) * c.final_logit_softcapping
            e = None
            if c.markov_rank:
                e = self.w["markov_head.markov_w1.weight"][previous]
                code = e
                if c.markov_head_type == "gated":
                    code = (
                        torch.sigmoid(self.linear("markov_head.gate_proj", torch.cat([h, e]))) * e
                    )
                elif c.markov_head_type == "rnn":
                    z = self.linear("markov_head.joint_proj", torch.cat([state, e, h]))
                    gate, cand, o = z[: len(e)], z[len(e) : 2 * len(e)], z[2 * len(e) :]
                    gate = torch.sigmoid(gate)
                    state = gate * state + (1 - gate) * torch.tanh(cand)
                    code = torch.tanh(o)
                u = u + self.w["markov_head.markov_w2.weight"] @ code
            if c.enable_confidence_head:
                features = torch.cat([h, e]) if c.confidence_head_with_markov else h
                confidences.append(self.linear("confidence_head.proj", features)[0])
            previous = choose(u)
            tokens.append(previous), logits.append(u)
        return tokens, torch.stack(logits), torch.stack(confidences) if confidences else None
