"""Train the model that ships with kvlab on the source code of the Python standard library.

    python scripts/train_model.py --minutes 120 --out runs/new            # from random weights
    python scripts/train_model.py --minutes 60 --init kvlab/model/pretrained --start 0.6 --out runs/more
    python scripts/train_model.py --evaluate kvlab/model/pretrained       # the four quality measures

Needs torch, tokenizers, safetensors and numpy. A CPU is enough; one process per core with
averaged gradients is faster than one process with two threads.

The copy curriculum makes a model of 5.5 million parameters use its context. At first most training
sequences are periodic, so that the model learns early to copy from the context. Then their share
falls, because a model that is trained on repetition repeats itself. Muon (Jordan et al. 2024)
trains the matrices, AdamW the embedding and the norms.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import os
import shutil
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvlab.lab import quality
from kvlab.model import Llama, LlamaConfig, Tokenizer, held_out_tokens, load_model

CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    eos_token_ids=(0,),
)
EOF = "<|eof|>"
NOT_CODE = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "turtledemo"}
TESTS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Stage:
    """Sequences per process, their length, and the share of periodic sequences, from a share of the training time."""

    begins: float
    batch: int
    length: int
    periodic: float


STAGES = (
    Stage(0.00, 6, 256, 0.60),
    Stage(0.22, 4, 512, 0.10),
    Stage(0.45, 4, 512, 0.03),
    Stage(0.75, 2, 1024, 0.03),
)
DECAY_FROM = 0.45


def corpus() -> tuple[list[str], list[str], list[str]]:
    """Sources of this Python: (library, held-out library, tests). A hash of the path decides what is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    library: list[str] = []
    held: list[str] = []
    tests: list[str] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if NOT_CODE & set(parts[:-1]):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if not 200 <= len(text) <= 400_000:
            continue
        is_held = int(hashlib.sha256("/".join(parts).encode()).hexdigest(), 16) % 20 == 0
        if TESTS & set(parts[:-1]):
            tests += [] if is_held else [text]
        else:
            (held if is_held else library).append(text)
    return library, held, tests


def train_tokenizer(texts: list[str], out: Path) -> None:
    """Train a byte-level BPE with single digits, so that any text can be encoded and numbers are regular."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[EOF],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.save(str(out / "tokenizer.json"))


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one token array, with token 0 before each text and at the end. uint16."""
    tokens: list[int] = []
    for text in texts:
        tokens += [0, *tokenizer.encode(text)]
    return np.array([*tokens, 0], dtype=np.uint16)


def sample(data: np.ndarray, stage: Stage, rng: np.random.Generator) -> torch.Tensor:
    """One batch of rows of length + 1 tokens. Some rows repeat a short text or random tokens."""
    n = stage.length + 1
    rows = np.stack([data[i : i + n] for i in rng.integers(0, len(data) - n, stage.batch)])
    for row in rows:
        if rng.random() < stage.periodic:
            period = int(rng.integers(8, 100))
            unit = row[:period].copy() if rng.random() < 0.5 else data[rng.integers(0, len(data), period)]
            row[:] = np.resize(unit, n)
    return torch.from_numpy(rows.astype(np.int64))


def optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    layers = {id(p): p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n}
    rest = [p for p in model.parameters() if id(p) not in layers]
    return [
        torch.optim.Muon(list(layers.values()), lr=0.01, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def fresh_model(init: Path | None) -> Llama:
    """A model to train, with random weights or the weights of a folder."""
    if init is not None:
        return load_model(init).requires_grad_(True).train()
    torch.manual_seed(0)
    model = Llama(CONFIG)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, std=0.02 / (math.sqrt(2 * CONFIG.num_hidden_layers) if deep else 1))
    return model


def loss_of(model: Llama, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy; the forward pass is in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def average_gradients(model: Llama, world: int) -> None:
    """Replace the gradients of every process by their mean."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads]).div_(world)
    dist.all_reduce(flat)
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


def worker(rank: int, world: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One training process. Rank 0 prints the progress and writes the weights once per minute."""
    keep_memory()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    data, held = np.load(args.out / "train.npy"), np.load(args.out / "held.npy")
    model, rng = fresh_model(args.init), np.random.default_rng(args.seed + rank)
    opts = optimizers(model)
    base = [group["lr"] for opt in opts for group in opt.param_groups]
    begin, step, seen, shown = time.monotonic(), 0, 0, 0.0
    log = (args.out / "log.jsonl").open("a", encoding="utf-8") if rank == 0 else None
    while True:
        clock = torch.tensor([(time.monotonic() - begin) / (60 * args.minutes)], dtype=torch.float64)
        dist.broadcast(clock, 0)
        if (done := clock.item()) >= 1:
            break
        share = args.start + (1 - args.start) * done
        stage = [s for s in STAGES if share >= s.begins][-1]
        scale = min(1.0, (step + 2) / 40) * max(0.02, min(1.0, (1 - share) / (1 - DECAY_FROM)))
        for lr, group in zip(base, [g for opt in opts for g in opt.param_groups], strict=True):
            group["lr"] = lr * scale
        loss = loss_of(model, sample(data, stage, rng))
        loss.backward()
        average_gradients(model, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + stage.batch * stage.length * world
        if log and time.monotonic() - shown > 60:
            shown = time.monotonic()
            line = {"done": round(done, 3), "tokens": seen, "train_loss": round(loss.item(), 3)}
            line["held_perplexity"] = round(held_perplexity(model, held), 2)
            print(json.dumps(line), file=log, flush=True)
            print(json.dumps(line), flush=True)
            save(model, args.out)
    if rank == 0:
        save(model, args.out)
    dist.destroy_process_group()


@torch.no_grad()
def held_perplexity(model: Llama, held: np.ndarray, count: int = 24, length: int = 513) -> float:
    """Perplexity on held-out library files in bfloat16, for the training log."""
    batch = quality.windows(held.tolist(), count, length)
    return math.exp(np.mean([loss_of(model, part).item() for part in batch.split(8)]))


def save(model: Llama, out: Path) -> None:
    """Write config.json and FP16 weights in Hugging Face's layout."""
    c = model.config
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tie_word_embeddings,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": True,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    state = {n: p.detach().half().contiguous() for n, p in model.state_dict().items() if n != "lm_head.weight"}
    save_file(state, out / "model.tmp", metadata={"format": "pt"})
    (out / "model.tmp").replace(out / "model.safetensors")


def keep_memory() -> None:
    """Make glibc keep freed memory: otherwise large activations cause page faults in each step (1.4x slower)."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # not glibc: nothing to tune
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
        libc.mallopt(option, value)


def prepare(args: argparse.Namespace) -> None:
    """Collect the corpus, train or copy the tokenizer, and write the token arrays."""
    args.out.mkdir(parents=True, exist_ok=True)
    library, held, tests = corpus()
    if args.init:
        shutil.copy(args.init / "tokenizer.json", args.out / "tokenizer.json")
    else:
        train_tokenizer(library, args.out)
    tokenizer = Tokenizer(args.out)
    once = tokenize(tokenizer, library)
    data = np.concatenate([once, once, tokenize(tokenizer, tests)])  # the library twice: its text is better
    np.save(args.out / "train.npy", data)
    np.save(args.out / "held.npy", tokenize(tokenizer, held))
    print(f"{len(library)} library files, {len(tests)} test files, {len(data) / 1e6:.1f} M tokens")


def evaluate(folder: Path) -> dict[str, dict[str, float]]:
    """The four quality measures on the held-out text of kvlab and on this Python's held-out library files."""
    model, tokenizer = load_model(folder), Tokenizer(folder)
    texts = {"frozen sample": held_out_tokens(tokenizer), "held-out library": tokenize(tokenizer, corpus()[1]).tolist()}
    return {name: quality.report(model, tokenizer, tokens) for name, tokens in texts.items()}


def main() -> None:
    """Parse the arguments, then train or evaluate."""
    parser = argparse.ArgumentParser(description="Train or evaluate the model that ships with kvlab.")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--out", type=Path, default=Path("runs/new"))
    parser.add_argument("--init", type=Path, help="start from this model folder")
    parser.add_argument("--start", type=float, default=0.0, help="share of the schedule to skip (with --init)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.evaluate:
        print(json.dumps(evaluate(args.evaluate), indent=2))
        return
    prepare(args)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            worker, (args.processes, args, f"{folder}/rendezvous"), nprocs=args.processes
        )
    print(json.dumps(evaluate(args.out), indent=2))


if __name__ == "__main__":
    main()
