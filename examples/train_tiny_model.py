# SPDX-License-Identifier: Apache-2.0
"""Train the small Llama-architecture model that this repository bundles, from nothing, on a CPU.

    python examples/train_tiny_model.py --text BOOKS_FOLDER STORIES.txt --valid-text HELD_OUT.txt \\
        --output examples/books-4m

Four stages: text, of whose windows a tenth repeat an earlier passage; drills, in which random tokens are repeated and
nothing but copying can foretell them; both together, at distances up to the whole context; and text in which passages
of text or of random tokens stand twice. Copy accuracy by distance is measured at last. Stop it at any time; the same
command resumes where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
COPY_DISTANCES = (64, 128, 256, 512, 960)


def read_documents(paths: list[Path]) -> list[str]:
    files = [file for path in paths for file in (sorted(path.glob("**/*.txt")) if path.is_dir() else [path])]
    if not files:
        raise SystemExit(f"no .txt file under {', '.join(map(str, paths))}")
    return [part.strip() for file in files for part in file.read_text("utf-8").split(END) if part.strip()]


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """All documents as one stream of tokens, each preceded by the end-of-text token."""
    ids: list[int] = []
    for document in tqdm(documents, desc="tokenise", leave=False):
        ids.append(tokenizer.eos_token_id)
        ids.extend(tokenizer(document)["input_ids"])
    return np.asarray(ids, dtype=np.int64)


@dataclass(frozen=True)
class Stage:
    """Steps of one kind.

    lengths: tokens per window as shares of the context, each for an equal part of the steps.
    repeats: share of windows in which a passage of the text stands once more further on.
    drills: share of windows that repeat a passage of random tokens to the end.
    islands: share of windows of text in which a passage of random tokens stands, and once more further on.
    distances: of a drill's repetition, least and largest, as shares of the window.
    """

    name: str
    steps: int
    tokens_per_step: int
    lengths: tuple[float, ...]
    repeats: float
    drills: float
    lr: float
    islands: float = 0.0
    distances: tuple[float, float] = (0.25, 0.5)


STAGES = (
    Stage("text", 1200, 8192, (0.5,) * 7 + (1.0,) * 3, repeats=0.1, drills=0.0, lr=4e-3),
    Stage("drills", 400, 2048, (1 / 16,), repeats=0.0, drills=1.0, lr=1e-3),
    Stage("both", 300, 8192, (0.25, 0.5, 1.0), repeats=0.1, drills=0.1, lr=1.5e-3, distances=(1 / 16, 15 / 16)),
    Stage("passages", 120, 8192, (0.25, 0.5, 1.0), repeats=0.1, drills=0.05, lr=1e-3, islands=0.2),
)


def draw_batch(
    stream: np.ndarray, stage: Stage, step: int, args: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows `[batch, length + 1]` and the weights `[batch, length]` of their predictions.

    The draw depends on seed, stage and step alone, so that a resumed run is equal.
    """
    random = np.random.default_rng([args.seed, step, STAGES.index(stage)])
    length = round(args.context * stage.lengths[step * len(stage.lengths) // stage.steps])
    starts = random.integers(0, len(stream) - length - 1, stage.tokens_per_step // length)
    windows = stream[starts[:, None] + np.arange(length + 1)]
    weights = np.ones((len(windows), length), dtype=np.float32)
    for row, kind in enumerate(random.random(len(windows))):
        if kind < stage.drills:
            least, largest = (int(share * length) for share in stage.distances)
            distance = int(random.integers(least, largest + 1))
            windows[row] = np.resize(random.integers(1, args.vocab_size, distance), length + 1)
            weights[row, :distance] = 0  # nothing can foretell the passage itself
        elif kind < stage.drills + stage.islands + stage.repeats:
            span = int(random.integers(32, length // 3))
            source = int(random.integers(0, length - 2 * span))
            target = int(random.integers(source + span, length + 1 - span))
            if kind < stage.drills + stage.islands:
                windows[row, source : source + span] = random.integers(1, args.vocab_size, span)
                weights[row, max(source - 1, 0) : source + span - 1] = 0
            windows[row, target : target + span] = windows[row, source : source + span].copy()
    return torch.from_numpy(windows), torch.from_numpy(weights)


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return losses.mean() if weights is None else (losses * weights.flatten()).sum() / weights.sum()


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, stream: np.ndarray, length: int) -> float:
    windows = torch.from_numpy(stream[: len(stream) // (length + 1) * (length + 1)].reshape(-1, length + 1))
    losses = [loss_of(model, chunk).item() * len(chunk) for chunk in windows.split(8)]
    return math.exp(sum(losses) / len(windows))


@torch.inference_mode()
def copy_accuracy(
    model: LlamaForCausalLM, stream: np.ndarray, length: int, span: int = 32
) -> dict[str, dict[str, float]]:
    """Share of tokens guessed right in a passage that is new, and in one that stands `distance` tokens earlier too.

    Passages of the text, which a model may foretell without copying, and of random tokens, which it cannot.
    """
    random = np.random.default_rng(0)
    out: dict[str, dict[str, float]] = {}
    for kind in ("text", "random"):
        new: list[float] = []
        out[kind] = {}
        for distance in (d for d in COPY_DISTANCES if d + span <= length):
            windows = stream[random.integers(0, len(stream) - length - 1, 32)[:, None] + np.arange(length + 1)]
            first = length - span - distance
            source, target = slice(first, first + span), slice(first + distance, first + distance + span)
            if kind == "random":
                windows[:, source] = random.integers(1, model.config.vocab_size, (32, span))
            windows[:, target] = windows[:, source]
            with torch.autocast("cpu", torch.bfloat16):
                guesses = model(input_ids=torch.from_numpy(windows[:, :-1]), use_cache=False).logits.argmax(-1)
            hits = (guesses == torch.from_numpy(windows[:, 1:])).float()
            # The first tokens of a passage cannot be known to be a repetition: count from its fifth.
            new.append(hits[:, first + 4 : first + span - 1].mean().item())
            out[kind][str(distance)] = round(hits[:, target][:, 4:-1].mean().item(), 3)
        out[kind]["new"] = round(sum(new) / len(new), 3)
    return out


def make_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def train(model: LlamaForCausalLM, stream: np.ndarray, args: argparse.Namespace) -> dict[str, list[float]]:
    """Runs the stages that are not done yet, and returns the losses of each."""
    checkpoint = args.output / "checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else {"losses": {}, "parts": []}
    losses: dict[str, list[float]] = saved["losses"]
    for stage in STAGES:
        done = losses.setdefault(stage.name, [])
        optimizers = make_optimizers(model, stage.lr)
        schedulers = [torch.optim.lr_scheduler.LambdaLR(o, partial(warm_up_and_decay, stage)) for o in optimizers]
        parts: list[Any] = [model, *optimizers, *schedulers]
        if 0 < len(done) < stage.steps or (done and stage is STAGES[-1]):
            for part, state in zip(parts, saved["parts"], strict=True):
                part.load_state_dict(state)
        elif len(done) == stage.steps and saved["parts"]:
            model.load_state_dict(saved["parts"][0])
        run_stage(model, stream, stage, parts, losses, args)
    return losses


def warm_up_and_decay(stage: Stage, step: int) -> float:
    return min((step + 1) / 50, 1.0, (stage.steps - step) / (0.6 * stage.steps))


def run_stage(
    model: LlamaForCausalLM,
    stream: np.ndarray,
    stage: Stage,
    parts: list[Any],
    losses: dict[str, list[float]],
    args: argparse.Namespace,
) -> None:
    model.train()
    done = losses[stage.name]
    for step in tqdm(range(len(done), stage.steps), initial=len(done), total=stage.steps, desc=stage.name):
        loss = loss_of(model, *draw_batch(stream, stage, step, args))
        if not torch.isfinite(loss):
            raise SystemExit(f"the loss is {loss.item()} at step {step} of {stage.name}; lower the stage's lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in parts[1:]:
            part.step()
        model.zero_grad()
        done.append(round(loss.item(), 4))
        if len(done) % 100 == 0 or len(done) == stage.steps:
            checkpoint = args.output / "checkpoint.pt"
            torch.save(
                {"losses": losses, "parts": [part.state_dict() for part in parts]}, checkpoint.with_suffix(".new")
            )
            checkpoint.with_suffix(".new").rename(checkpoint)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="text files, or folders of them")
    parser.add_argument("--valid-text", nargs="+", type=Path, help="held-out text to measure perplexity and copying on")
    parser.add_argument("--output", type=Path, required=True, help="folder for weights, tokenizer and report")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=704)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    documents = read_documents(args.text)
    tokenizer = train_tokenizer(documents, args.vocab_size)
    stream = encode(tokenizer, documents)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            head_dim=args.head_size,
            max_position_embeddings=args.context,
            tie_word_embeddings=True,
            initializer_range=0.04,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    losses = train(model, stream, args)
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    report = {
        "parameters": model.num_parameters(),
        "training_tokens": sum(stage.steps * stage.tokens_per_step for stage in STAGES),
        "corpus_tokens": len(stream),
        "seconds": round(time.perf_counter() - start),
        "seed": args.seed,
        "loss": {
            name: [round(float(np.mean(of[i : i + 50])), 3) for i in range(0, len(of), 50)]
            for name, of in losses.items()
        },
    }
    if args.valid_text:
        valid = encode(tokenizer, read_documents(args.valid_text))
        report["perplexity"] = round(perplexity(model, valid, args.context), 2)
        report["copy_accuracy"] = copy_accuracy(model, valid, args.context)
    (args.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.output / "checkpoint.pt").unlink()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
