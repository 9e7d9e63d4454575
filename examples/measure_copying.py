# SPDX-License-Identifier: Apache-2.0
"""Copy accuracy by distance: does a cache still hold what stood far back? For budgets of an adapter and other caches.

    python examples/measure_copying.py examples/books-4m --text examples/data/the_time_machine.txt \\
        --budgets 0.25 0.156 0.094 --against int4,int3,int2,turboquant3,turboquant2

A passage of 32 random tokens stands in text, and once more `distance` tokens later: the share of its second appearance
that is foretold can come from the cache alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_mkv.evaluation.rivals import rival_caches
from vllm_mkv.evaluation.subject import Subject
from vllm_mkv.fit.attention import intercepted
from vllm_mkv.fit.data import read_text
from vllm_mkv.fit.quality import Cache, projected_caches

DISTANCES = (64, 128, 256, 512, 960)
SPAN = 32
KNOWN = 4
"""Tokens of a passage after which it can be known to be a repetition."""


def windows_with_copies(
    stream: np.ndarray, vocabulary: int, distance: int, length: int, count: int, seed: int
) -> torch.Tensor:
    """int64 [count, length]; the second passage is at the end."""
    random = np.random.default_rng([seed, distance])
    windows = stream[random.integers(0, len(stream) - length, count)[:, None] + np.arange(length)]
    second = length - SPAN
    windows[:, second - distance : second - distance + SPAN] = random.integers(1, vocabulary, (count, SPAN))
    windows[:, second:] = windows[:, second - distance : second - distance + SPAN]
    return torch.from_numpy(windows)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL|ADAPTER")
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 file that the passages stand in")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.25, 0.156, 0.094])
    parser.add_argument("--against", type=lambda names: names.split(","), default=[], metavar="int4,..")
    parser.add_argument("--windows", type=int, default=64, help="per distance (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    subject = Subject.find(args.model, adapter=None, model=None, revision=None, trust_remote_code=False)
    source = subject.source
    itemsize, length = source.itemsize, source.config.max_position_embeddings
    tokenizer = source.tokenizer
    stream = np.array(tokenizer(read_text(args.text), verbose=False)["input_ids"])
    model = source.load("float32", "auto")
    caches: list[Cache | None] = [None]
    if subject.adapter is not None:
        caches += projected_caches(subject.adapter, subject.allocations(args.budgets, "path"), itemsize)
    caches += rival_caches(args.against, source.fingerprint)
    distances = [distance for distance in DISTANCES if distance + SPAN <= length]
    table = Table(title=f"copy accuracy of {args.model} by distance, {args.windows} windows of {length} tokens each")
    for column in ("cache", "x smaller", *map(str, distances)):
        table.add_column(column, justify="left" if column == "cache" else "right")
    rows = []
    for cache in tqdm(caches, unit="cache", disable=None):
        used = subject.stock_bytes if cache is None else cache.bytes_per_token
        row = {"name": "stock" if cache is None else cache.name, "bytes_per_token": used}
        for distance in distances:
            windows = windows_with_copies(stream, source.config.vocab_size, distance, length, args.windows, args.seed)
            with contextlib.nullcontext() if cache is None else intercepted(model, cache.handler):
                last = [model(part, use_cache=False, logits_to_keep=SPAN).logits for part in windows.split(8)]
            guesses = torch.cat(last)[:, KNOWN - 1 : -1].argmax(-1)
            wanted = windows[:, KNOWN - SPAN :]
            row[str(distance)] = float((guesses == wanted).float().mean())
        rows.append(row)
        accuracies = [f"{row[str(distance)]:.3f}" for distance in distances]
        table.add_row(str(row["name"]), f"{subject.stock_bytes / used:.2f}", *accuracies)
    Console().print(table)
    print(json.dumps({"arguments": {**vars(args), "text": str(args.text)}, "rows": rows}))


if __name__ == "__main__":
    main()
