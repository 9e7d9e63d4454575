# SPDX-License-Identifier: Apache-2.0
"""What `vllm-mkv info` prints. Needs neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_mkv.adapter import Adapter, QualityRow, choose_budget, digest
from vllm_mkv.evaluation.widths import draw_widths, widths_table
from vllm_mkv.output import check_drawing

ITEMSIZE = 2
"""Bytes of bfloat16 and float16, in which almost every model is served."""


def print_info(folder: Path, budget: float | None, plot: str | None) -> None:
    """Prints what the adapter in `folder` is and costs at a budget; draws its widths where `plot` names a file."""
    if plot:
        check_drawing(plot)
    adapter = Adapter.load(folder)
    config = adapter.config
    asked = choose_budget(budget, config)
    allocation = adapter.path.replay(asked, itemsize=ITEMSIZE)
    used = allocation.bytes_per_token(block_size=16, itemsize=ITEMSIZE)
    stock = adapter.shape.stock_bytes_per_token(ITEMSIZE)
    model = config.model
    facts = {
        "adapter": str(folder),
        "digest": digest(folder),
        "base model": config.base_model_name_or_path + (f", revision {config.revision}" if config.revision else ""),
        "attention": f"{model.architecture}: {model.num_hidden_layers} layers, {model.num_attention_heads} query "
        f"heads, {model.num_key_value_heads} KV heads of {model.head_size}",
        "basis": f"{config.basis}, {config.group_heads} KV heads per latent group",
        "path": f"{len(adapter.path.steps)} steps through {', '.join(map(str, adapter.path.widths))} bits",
        "budget": f"{asked:g} asked, {used / stock:.4f} reached",
        "bytes per token": f"{used:,} instead of {stock:,}, at {ITEMSIZE} bytes per number and 16 tokens per page",
        "made": "\n".join(nested_lines(config.made)),
    }
    console = Console()
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(value))  # what an adapter says is no markup
    console.print(table)
    if config.quality:
        console.print(quality_rows(config.quality))
    console.print(widths_table(allocation))
    if plot:
        draw_widths(allocation, f"{folder.name} at {used / stock:.3f} of the cache", plot)
        print(f"drew {plot}")


def nested_lines(found: dict[str, Any]) -> list[str]:
    """A line for every key, with those of dictionaries below it, two columns to the right."""
    lines = []
    for key, value in found.items():
        if isinstance(value, dict):
            lines += [str(key), *(f"  {line}" for line in nested_lines(value))]
        else:
            lines.append(f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return lines


def quality_rows(rows: Sequence[QualityRow]) -> Table:
    """The measured quality of `AdapterConfig.quality`."""
    table = Table(title="measured quality")
    for name in ("cache", "budget", "perplexity", "KL", "same top token"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for row in rows:
        numbers = (f"{row['budget']:.3f}", f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}")
        table.add_row(Text(row.get("name", "mkv")), *numbers)
    return table
