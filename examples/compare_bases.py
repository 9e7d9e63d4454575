# SPDX-License-Identifier: Apache-2.0
"""Perplexity and KL of a model at several budgets, for each basis and number of KV heads per latent group.

    python examples/compare_bases.py examples/books-4m --text BOOKS_FOLDER \\
        --valid-text examples/data/the_time_machine.txt

Bases are fitted on the one text and measured on the other, through transformers; ranks are uniform.
"""

from __future__ import annotations

import argparse
import json

import torch
from rich.console import Console
from rich.table import Table

from vllm_mkv.fit.calibrate import fit_bases, new_adapter
from vllm_mkv.fit.data import token_windows
from vllm_mkv.fit.model import Source, choose_group_heads
from vllm_mkv.fit.quality import measure, projected_caches

BUDGETS = (0.75, 0.5, 0.375, 0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", nargs="+", required=True, help="to fit on")
    parser.add_argument("--valid-text", nargs="+", required=True, help="to measure on")
    parser.add_argument("--windows", type=int, default=200, help="to fit on (default: 200)")
    parser.add_argument("--valid-windows", type=int, default=64, help="to measure on (default: 64)")
    parser.add_argument("--context", type=int, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    source = Source(args.model)
    fingerprint, tokenizer = source.fingerprint, source.tokenizer
    windows, valid = (
        token_windows(text, tokenizer, num_windows=number, context=args.context, seed=args.seed)
        for text, number in ((args.text, args.windows), (args.valid_text, args.valid_windows))
    )
    model = source.load("float32", "auto")
    group_sizes = sorted({1, choose_group_heads(fingerprint, None)})
    rows = []
    for basis in ("pca", "query"):
        for group_heads in group_sizes:
            bases = fit_bases(model, fingerprint, windows, basis=basis, group_heads=group_heads)
            adapter = new_adapter(args.model, fingerprint, bases, basis=basis, group_heads=group_heads)
            allocations = [adapter.path.replay(budget, itemsize=4) for budget in BUDGETS]
            caches = projected_caches(adapter, allocations, itemsize=4)
            found = measure(model, valid, caches, stock_bytes=adapter.shape.stock_bytes_per_token(4))
            rows += [{"basis": basis, "group_heads": group_heads, **row} for row in found]
    table = Table(title=f"{args.model}, {args.valid_windows} x {args.context} tokens of {' '.join(args.valid_text)}")
    for column in ("basis", "J", "budget", "perplexity", "KL", "same top token"):
        table.add_column(column, justify="right")
    for row in rows:
        label = "stock" if row["name"] == "stock" else f"{row['budget']:.3f}"
        figures = (f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}")
        table.add_row(row["basis"], str(row["group_heads"]), label, *figures)
    Console().print(table)
    print(json.dumps({"torch": torch.__version__, "arguments": vars(args), "rows": rows}))


if __name__ == "__main__":
    main()
