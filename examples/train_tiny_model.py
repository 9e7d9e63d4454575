# SPDX-License-Identifier: Apache-2.0
"""Train the small Llama-architecture model that this repository bundles, from nothing, on a CPU.

    python examples/train_tiny_model.py --text BOOKS_FOLDER STORIES.txt --valid-text HELD_OUT.txt \\
        --output examples/books-4m

A tenth of the training windows repeat an earlier passage of the same window, so that the model learns to copy from
afar; copy accuracy by distance is measured at the end. Stop it at any time; the same command resumes where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
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


def draw_batch(stream: np.ndarray, batch: int, length: int, step: int, args: argparse.Namespace) -> torch.Tensor:
    """`batch` windows of `length + 1` tokens; depends on seed and step alone, so that a resumed run is equal."""
    random = np.random.default_rng([args.seed, step])
    starts = random.integers(0, len(stream) - length - 1, batch)
    windows = stream[starts[:, None] + np.arange(length + 1)]
    for window in windows[random.random(batch) < args.repeats]:
        span = int(random.integers(32, length // 3))
        source = int(random.integers(0, length - 2 * span))
        target = int(random.integers(source + span, length + 1 - span))
        window[target : target + span] = window[source : source + span].copy()
    return torch.from_numpy(windows)


def loss_of(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, stream: np.ndarray, length: int) -> float:
    windows = torch.from_numpy(stream[: len(stream) // (length + 1) * (length + 1)].reshape(-1, length + 1))
    losses = [loss_of(model, chunk).item() * len(chunk) for chunk in windows.split(8)]
    return math.exp(sum(losses) / len(windows))


@torch.inference_mode()
def copy_accuracy(model: LlamaForCausalLM, stream: np.ndarray, length: int, span: int = 32) -> dict[str, float]:
    """Share of tokens guessed right in a passage, when new and when it stands `distance` tokens earlier too."""
    random = np.random.default_rng(0)
    out: dict[str, list[float]] = {"new": []}
    for distance in COPY_DISTANCES:
        if distance + span > length:
            continue
        starts = random.integers(0, len(stream) - length - 1, 32)
        windows = torch.from_numpy(stream[starts[:, None] + np.arange(length + 1)])
        first = length - span - distance
        source, target = slice(first, first + span), slice(first + distance, first + distance + span)
        windows[:, target] = windows[:, source]
        with torch.autocast("cpu", torch.bfloat16):
            hits = model(input_ids=windows[:, :-1], use_cache=False).logits.argmax(-1) == windows[:, 1:]
        # The first tokens of a passage cannot be known to be a repetition: count from its fifth.
        out["new"].append(hits[:, max(first + 4, 0) : first + span - 1].float().mean().item())
        out[str(distance)] = [hits[:, target][:, 4:-1].float().mean().item()]
    return {name: round(sum(values) / len(values), 3) for name, values in out.items()}


def make_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)]


def train(model: LlamaForCausalLM, stream: np.ndarray, args: argparse.Namespace) -> list[float]:
    """Windows are half as long for the first 70 % of the steps: the same tokens a step, less attention to pay for."""
    optimizers = make_optimizers(model, args)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / 50, 1.0, (args.steps - s) / (0.6 * args.steps)))
        for o in optimizers
    ]
    checkpoint = args.output / "checkpoint.pt"
    state: dict[str, Any] = {"step": 0, "losses": []}
    parts: list[Any] = [model, *optimizers, *schedulers]
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
    model.train()
    with tqdm(total=args.steps, initial=state["step"], desc="train") as progress:
        for step in range(state["step"], args.steps):
            length = args.context // 2 if step < 0.7 * args.steps else args.context
            loss = loss_of(model, draw_batch(stream, args.tokens_per_step // length, length, step, args))
            if not torch.isfinite(loss):
                raise SystemExit(f"the loss is {loss.item()} at step {step}; lower --lr")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for part in parts[1:]:
                part.step()
            model.zero_grad()
            state["losses"].append(round(loss.item(), 4))
            progress.set_postfix(loss=f"{np.mean(state['losses'][-50:]):.3f}", refresh=False)
            progress.update()
            if (step + 1) % 200 == 0 or step + 1 == args.steps:
                torch.save(
                    {"step": step + 1, "losses": state["losses"], "parts": [p.state_dict() for p in parts]},
                    checkpoint.with_suffix(".new"),
                )
                checkpoint.with_suffix(".new").rename(checkpoint)
    return state["losses"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="text files, or folders of them")
    parser.add_argument("--valid-text", nargs="+", type=Path, help="held-out text to measure perplexity and copying on")
    parser.add_argument("--output", type=Path, required=True, help="folder for weights, tokenizer and report")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--repeats", type=float, default=0.1, help="share of windows that repeat an earlier passage")
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
        "training_tokens": args.steps * args.tokens_per_step,
        "corpus_tokens": len(stream),
        "seconds": round(time.perf_counter() - start),
        "seed": args.seed,
        "loss": [round(float(np.mean(losses[i : i + 50])), 3) for i in range(0, len(losses), 50)],
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
