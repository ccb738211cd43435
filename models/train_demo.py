"""Train the small demonstration model that ``make demo`` runs, from scratch, on a CPU.

The script does everything in one go and can be stopped and started again:

1. *Data.*  It collects the Python source of the running interpreter's standard library (without
   tests, IDLE, third-party packages and generated tables) and, with ``--docs DIR``, the reST
   sources of the Python documentation (on Debian: ``apt-get download python3.11-doc`` and
   ``dpkg -x python3.11-doc*.deb DIR``).  Without ``--docs`` it uses the topics that
   ``pydoc_data`` carries.  About 3 % of the bytes, whole files, are held out.
2. *Tokenizer.*  A byte-level BPE of exactly 4096 entries, learned from the training files only; a
   line break and the indentation after it can be one token.
3. *Model.*  A ``transformers.Qwen3ForCausalLM`` with random weights, trained with Muon (matrices)
   and AdamW (the rest).  The learning rate follows *training time* and not the number of steps, so
   that ``--minutes 60`` is 60 minutes of work on a slow machine too.  It is the processor time of
   one process, so that a busy machine, a low priority or a pause cost nothing but patience.  It
   starts with short windows and ends with windows of up to 2048 tokens
   (``STAGES``).
4. *Export.*  ``models/demo/``: weights in bfloat16, tokenizer, held-out text, prompts, the licence
   of the text and a ``training.json`` with the numbers that the model card quotes.

Usage::

    python models/train_demo.py --minutes 60 --docs DIR --compile
    python models/train_demo.py --export-only      # export the last checkpoint, any time

The shipped model went on from a smaller one's weights, which ``widen`` makes a larger model of that
computes the same::

    python models/train_demo.py --work OTHER --start models/demo --layers 8 --intermediate 1792 \\
        --minutes 45 --lr 1.5e-3 --docs DIR --compile
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import platform
import shutil
import sysconfig
import time

import torch
import torch.nn.functional as F
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dspark_compile.models.checkpoint_file import align
from dspark_compile.models.demo_text import (
    CONTEXT,
    EOT,
    VOCAB,
    Windows,
    collect,
    encode,
    make_prompts,
    train_tokenizer,
)

OUT = pathlib.Path(__file__).resolve().parent / "demo"

# (share of the training time at which the stage ends, tokens per window, step by step).
# Short windows first: on a CPU they buy more tokens.
STAGES = (
    (0.30, (128,)),
    (0.75, (256,)),
    (1.00, (256, 256, 512, 256, 1024, 256, 512, 256, 256, 2048)),
)
STEP_TOKENS = 4096  # at least; two windows if they are longer

# -------------------------------------------------------------------------------------- model


def build_model(layers: int, intermediate: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    # The usual smaller start for the layers that write to the residual stream.
    scale = 1 / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def widen(model: Qwen3ForCausalLM, layers: int, intermediate: int, seed: int) -> Qwen3ForCausalLM:
    """A model of more ``layers`` and MLPs of ``intermediate`` neurons that computes the same.

    A new layer is a copy of the one before it that writes nothing to the residual stream yet: the
    two projections that do are zero.  The new layers are spread evenly.  A new neuron takes its
    gate from one old neuron of the layer and its input from another, so that it is like none of
    them, and writes nothing yet either.
    """
    old_layers, old_width = model.config.num_hidden_layers, model.config.intermediate_size
    if layers < old_layers or intermediate < old_width:
        raise ValueError(
            f"cannot widen {old_layers} layers of {old_width} neurons to {layers} of {intermediate}"
        )
    wide = build_model(layers, intermediate)
    generator = torch.Generator().manual_seed(seed)
    sources = [i * old_layers // layers for i in range(layers)]
    state = model.state_dict()
    taken: dict[str, torch.Tensor] = {}
    for name in wide.state_dict():
        parts = name.split(".")
        copied = False
        if parts[1] == "layers":
            here = int(parts[2])
            copied = here > 0 and sources[here] == sources[here - 1]
            parts[2] = str(sources[here])
        source = state[".".join(parts)].float()
        if copied and parts[-2] in ("o_proj", "down_proj"):
            source = torch.zeros_like(source)
        more = intermediate - old_width
        if parts[-2] in ("gate_proj", "up_proj"):
            rows = torch.randint(old_width, (more,), generator=generator)
            source = torch.cat([source, source[rows]])
        elif parts[-2] == "down_proj":
            source = torch.cat([source, source.new_zeros(source.shape[0], more)], dim=1)
        taken[name] = source
    wide.load_state_dict(taken)
    return wide


def parameter_count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def make_loss(model: Qwen3ForCausalLM, compiled: bool):
    """The summed loss of a batch; ``compiled`` compiles one layer and the head, in seconds."""

    def head(hidden, labels):
        logits = model.lm_head(hidden)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")

    if compiled:
        head = torch.compile(head, dynamic=False)
        for layer in model.model.layers:
            layer.compile(dynamic=False)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
            return head(hidden, batch[:, 1:])

    return loss


@torch.no_grad()
def evaluate(model, documents: list[torch.Tensor], length: int, most: int | None = None):
    """(mean loss per token, number of tokens) over the packed documents, windows of ``length``.

    Every token but the first is scored exactly once, in float32 arithmetic over the autocast
    forward pass; the first tokens of a window see little context, as in training.
    """
    stream = torch.cat(documents)
    if most:
        stream = stream[:most]
    total, count = 0.0, 0
    model.eval()
    torch.compiler.set_stance("force_eager")
    for start in range(0, len(stream) - 1, length):
        window = stream[start : start + length + 1][None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=window[:, :-1], use_cache=False).logits
        labels = window[:, 1:].flatten()
        total += F.cross_entropy(logits.float().flatten(0, 1), labels, reduction="sum").item()
        count += labels.numel()
    torch.compiler.set_stance("default")
    model.train()
    return total / count, count


# ----------------------------------------------------------------------------------- training


def learning_rate(progress: float, peak: float) -> float:
    warm = 0.04
    if progress < warm:
        return peak * max(progress, 0.001) / warm
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / (1 - warm))))
    return peak * (0.02 + 0.98 * cosine)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest (semi-)orthogonal matrices, batched."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for the matrices of the layers.

    In a few thousand steps it gets much further than AdamW.  The processes share the work: each
    one computes the updates of its part of the matrices, and the sum tells everybody all of them.
    """

    def __init__(self, parameters, lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, rank: int = 0, world: int = 1):
        for group in self.param_groups:
            shapes: dict = {}
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                shapes.setdefault(p.shape, []).append(p)
            flat = torch.zeros(sum(p.numel() for p in group["params"]))
            updates, offset = {}, 0
            for p in group["params"]:
                updates[p] = flat[offset : offset + p.numel()].view_as(p)
                offset += p.numel()
            for same in shapes.values():
                mine = same[rank::world]
                if mine:
                    directions = [
                        p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in mine
                    ]
                    for p, update in zip(mine, orthogonalize(torch.stack(directions))):
                        updates[p].copy_(update)
            if world > 1:
                torch.distributed.all_reduce(flat)
            for p, update in updates.items():
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.4 * max(p.shape) ** 0.5 * group["lr"])


def make_optimizers(model, args) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers; AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    embedding = [model.model.embed_tokens.weight]
    groups = [{"params": embedding, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return [
        Muon(matrices, lr=args.lr, weight_decay=0.1),
        torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True),
    ]


def prepare(args) -> None:
    """Write the corpus, the tokenizer and the encoded files to the work folder."""
    work = pathlib.Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    if (work / "tokens.pt").exists() and not args.restart:
        return
    corpus = collect(args.docs, args.seed)
    (work / "corpus.json").write_text(json.dumps(corpus))
    if args.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.start)
    else:
        tokenizer = train_tokenizer([*corpus["code"].values(), *corpus["text"].values()])
    tokenizer.save_pretrained(work / "tokenizer")
    documents = {part: encode(tokenizer, files) for part, files in corpus.items()}
    sizes = {part: sum(map(len, docs)) for part, docs in documents.items()}
    (work / "sizes.json").write_text(json.dumps(sizes))
    torch.save(documents, work / "tokens.pt")
    (work / "checkpoint.pt").unlink(missing_ok=True)
    print("files", {part: len(docs) for part, docs in documents.items()}, "tokens", sizes)


def train(rank: int, args, claimed) -> None:
    """Train in process ``rank`` of ``args.processes``, which share every step's batch.

    A step has a fixed list of small batches; each process takes the next one that nobody has
    taken (``claimed`` counts them), so a process on a busy core just takes fewer.  The gradients
    are then summed, and every process makes the same update.
    """
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    work = pathlib.Path(args.work)
    several = args.processes > 1
    if several:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{args.store}", rank=rank, world_size=args.processes
        )
    documents = torch.load(work / "tokens.pt")
    model = build_model(args.layers, args.intermediate)
    if args.start:
        start = Qwen3ForCausalLM.from_pretrained(args.start)
        model = widen(start, args.layers, args.intermediate, args.seed)
    optimizers = make_optimizers(model, args)
    windows = Windows(documents["code"], documents["text"], args.seed)
    step, tokens, elapsed = 0, 0, 0.0
    stage = None
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model = build_model(saved["layers"], saved["intermediate"])
        model.load_state_dict(saved["model"])
        optimizers = make_optimizers(model, args)
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        windows.restore(saved["windows"])
        step, tokens, elapsed = saved["step"], saved["tokens"], saved["elapsed"]
    if rank == 0:
        print(f"{parameter_count(model):,} parameters, step {step}, {elapsed / 60:.1f} minutes")

    def save():
        state = {
            "model": model.state_dict(), "step": step,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "tokens": tokens, "elapsed": elapsed, "windows": windows.state(),
            "layers": model.config.num_hidden_layers,
            "intermediate": model.config.intermediate_size,
        }  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").rename(checkpoint)

    budget = args.minutes * 60
    last_save = last_held = elapsed
    recent_loss, recent_tokens, recent_time, limit = 0.0, 0, 0.0, 0
    while elapsed < budget:
        progress = elapsed / budget
        if stage is None or progress >= stage[0]:
            stages = STAGES[1:] if args.start else STAGES
            stage = next(stage for stage in stages if progress < stage[0])
            lengths = stage[1]
            torch._dynamo.reset()
            model.train()
            plain_loss = make_loss(model, compiled=args.compile)
            parameters = list(model.parameters())
            for length in sorted(set(lengths)):  # compile
                rows = max(1, 512 // length)
                plain_loss(torch.zeros(rows, length + 1, dtype=torch.long)).backward()
            model.zero_grad(set_to_none=True)
            if several:
                for parameter in parameters:  # equal already, but for rounding
                    torch.distributed.broadcast(parameter.data, 0)
            if rank == 0:
                print(f"windows of {sorted(set(lengths))}", flush=True)
            mark = time.process_time()
        length = lengths[step % len(lengths)]
        rows, step_tokens = max(1, 512 // length), max(STEP_TOKENS, 2 * length)
        small = [windows.batch(rows, length) for _ in range(step_tokens // (rows * length))]
        limit += len(small)
        total = 0.0
        while True:
            with claimed.get_lock():
                mine = claimed.value
                if mine >= limit:
                    break
                claimed.value += 1
            loss = plain_loss(small[mine - limit]) / step_tokens
            loss.backward()
            total += loss.item()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        # Rank 0 owns the clock: its slot of the sum tells everybody the same progress.
        now = time.process_time()
        spent, mark = (now - mark if rank == 0 else 0.0), now
        flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor([total, spent])])
        if several:
            torch.distributed.all_reduce(flat)
        total, spent = flat[-2].item(), flat[-1].item()
        offset = 0
        for p in parameters:
            p.grad = flat[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, args.lr)
        optimizers[0].step(rank, args.processes)
        optimizers[1].step()
        model.zero_grad(set_to_none=True)
        step += 1
        tokens += step_tokens
        elapsed += spent
        recent_loss += total
        recent_tokens += step_tokens
        recent_time += spent
        if rank == 0 and step % args.log_every == 0:
            print(
                f"step {step} min {elapsed / 60:.2f} epoch {windows.progress():.2f} "
                f"loss {recent_loss / args.log_every:.4f} norm {norm:.2f} "
                f"lr {learning_rate(progress, args.lr):.2e} "
                f"tok/s {recent_tokens / recent_time:.0f}",
                flush=True,
            )
            recent_loss, recent_tokens, recent_time = 0.0, 0, 0.0
        if rank == 0 and elapsed - last_save > 150:
            save()
            last_save = elapsed
        if rank == 0 and elapsed - last_held > 400:
            held, _ = evaluate(model, documents["held_code"], 512, 8_192)
            print(f"held-out code (first 8 k tokens): loss {held:.4f} ppl {math.exp(held):.2f}")
            last_held = elapsed
            mark = time.process_time()
    if rank == 0:
        save()
        (work / "finished").touch()


# ------------------------------------------------------------------------------------- export


def sample(model, tokenizer, prompt: str, new: int = 96) -> str:
    ids = torch.tensor([tokenizer(prompt).input_ids])
    out = model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def export(args) -> None:
    torch.set_num_threads(1)
    work = pathlib.Path(args.work)
    corpus = json.loads((work / "corpus.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    saved = torch.load(work / "checkpoint.pt")
    model = build_model(saved["layers"], saved["intermediate"])
    model.load_state_dict(saved["model"])
    model = model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=False
    )
    OUT.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(OUT)
    (OUT / "model.safetensors").chmod(0o644)
    align(OUT / "model.safetensors")
    tokenizer.save_pretrained(OUT)

    held = corpus["held_code"]
    shipped = ""
    for text in held.values():  # as many of the files as fit 300 kB
        longer = f"{shipped}{EOT}{text}" if shipped else text
        shipped = longer if len(longer.encode()) <= 300_000 else shipped
    (OUT / "heldout.txt").write_text(shipped, encoding="utf-8", newline="\n")
    prompts = make_prompts(tokenizer, held, 24, args.seed)
    (OUT / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")
    licence = pathlib.Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if licence.exists():
        shutil.copyfile(licence, OUT / "LICENSE.python.txt")
        (OUT / "LICENSE.python.txt").chmod(0o644)

    sizes = json.loads((work / "sizes.json").read_text())
    # Of the model that this one went on from; its folder may be the one that is written below.
    path = pathlib.Path(args.start or "") / "training.json"
    before = json.loads(path.read_text()) if args.start and path.exists() else {}
    numbers = {
        "python": platform.python_version(),
        "parameters": parameter_count(model),
        "steps": saved["step"],
        "trained_tokens": saved["tokens"],
        "epochs": round(saved["tokens"] / (sizes["code"] + sizes["text"] / 3), 2),
        "training_minutes": round(saved["elapsed"] / 60, 1),
        "files": {part: len(files) for part, files in corpus.items()},
        "bytes": {p: sum(len(t.encode()) for t in files.values()) for p, files in corpus.items()},
        "tokens": sizes,
        "held_out_files": sorted(held) + sorted(corpus["held_text"]),
        "weights_sha256": hashlib.sha256((OUT / "model.safetensors").read_bytes()).hexdigest(),
    }
    if before:
        kept = ("parameters", "steps", "trained_tokens", "epochs", "training_minutes")
        numbers["start"] = {k: before[k] for k in (*kept, "held_code_1024") if k in before}
    documents = {part: encode(tokenizer, corpus[part]) for part in ("held_code", "held_text")}
    ids = torch.tensor(tokenizer(shipped, verbose=False).input_ids[:4097])
    documents["first_4096"] = [ids]
    for part, length in (
        ("first_4096", 1024), ("held_code", 256), ("held_code", 1024), ("held_code", CONTEXT),
        ("held_text", 1024),
    ):  # fmt: skip
        if args.quick and part != "first_4096":
            continue
        stream = torch.cat(documents[part])
        size = len(tokenizer.decode(stream, skip_special_tokens=True).encode())
        loss, count = evaluate(model, documents[part], length)
        numbers[part if part == "first_4096" else f"{part}_{length}"] = {
            "loss": round(loss, 4),
            "perplexity": round(math.exp(loss), 3),
            "bits_per_byte": round(loss * count / math.log(2) / size, 4),
            "scored_tokens": count,
        }
    numbers["samples"] = [
        {"prompt": p["prompt"], "continuation": sample(model, tokenizer, p["prompt"])}
        for p in prompts[:4]
    ]
    (OUT / "training.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(json.dumps({k: v for k, v in numbers.items() if k != "samples"}, indent=1))
    for item in numbers["samples"]:
        print("-" * 80, item["prompt"] + "\x1b[1m" + item["continuation"] + "\x1b[0m", sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="training time")
    parser.add_argument("--docs", help="folder with the unpacked Python documentation package")
    parser.add_argument("--work", default="/tmp/dspark-train", help="checkpoints; not shipped")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--intermediate", type=int, default=704, help="neurons of an MLP")
    parser.add_argument("--start", help="go on from a smaller model's folder; its tokenizer too")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers")
    parser.add_argument("--restart", action="store_true", help="forget earlier work")
    parser.add_argument("--quick", action="store_true", help="export with one evaluation only")
    parser.add_argument("--export-only", action="store_true", help="only write models/demo/")
    args = parser.parse_args()
    if not args.export_only:
        prepare(args)
        args.store = f"{args.work}/store-{os.getpid()}"
        claimed = multiprocessing.get_context("spawn").Value("q", 0)
        if args.processes > 1:
            torch.multiprocessing.spawn(train, (args, claimed), nprocs=args.processes)
        else:
            train(0, args, claimed)
    export(args)


if __name__ == "__main__":
    main()
