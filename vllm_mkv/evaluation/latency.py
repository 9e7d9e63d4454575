# SPDX-License-Identifier: Apache-2.0
"""Inter-token latency as a line over the context: its fit, where it crosses stock's, a table and a plot.

What a step reads from the cache grows with the context, and the rest does not, so

    inter-token latency = slope * batch * context + intercept
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_mkv.output import check_drawing, write_drawing

NOISY = 0.1
"""Spread of repeats above which a benchmark says so."""


@dataclass(frozen=True)
class Line:
    """slope: seconds per token of context and request. intercept: seconds. r2: None where there are two points only."""

    slope: float
    intercept: float
    r2: float | None

    def at(self, tokens: float) -> float:
        return self.slope * tokens + self.intercept


def fit_line(tokens: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line of least squares through latencies over cached tokens of the whole batch.

    Raises:
        ValueError: there are fewer than two different contexts.
    """
    if len(set(tokens)) < 2:
        raise ValueError("one context is one point, and a line needs two; give more of them: --contexts 1024 4096")
    x, y = np.asarray(tokens, float), np.asarray(seconds, float)
    slope, intercept = np.polyfit(x, y, 1)
    total = ((y - y.mean()) ** 2).sum()
    residual = ((y - slope * x - intercept) ** 2).sum()
    # Two points are always on a line, and equal ones have nothing to explain.
    r2 = float(1 - residual / total) if len(set(tokens)) > 2 and total > 0 else None
    return Line(float(slope), float(intercept), r2)


def break_even(line: Line, stock: Line) -> tuple[str, float | None]:
    """Where `line` is below `stock`: "always", "never", or "above" or "below" so many tokens of the batch."""
    # Differences at rounding's size are none.
    slope, intercept = line.slope - stock.slope, line.intercept - stock.intercept
    slope = 0.0 if abs(slope) <= 1e-9 * abs(stock.slope) else slope
    intercept = 0.0 if abs(intercept) <= 1e-9 * abs(stock.intercept) else intercept
    if slope * intercept < 0:
        return ("above" if slope < 0 else "below"), -intercept / slope
    return ("always" if min(slope, intercept) < 0 else "never"), None


def latency_row(
    cache: Mapping[str, Any], batch: int, windows: Mapping[int, Sequence[tuple[float, float]]], stock: Line | None
) -> tuple[dict[str, Any], Line]:
    """What was measured of one cache, and its line.

    Args:
        cache: "name", "budget" and "bytes_per_token".
        windows: per context, of every repeat the cached tokens per request and the inter-token latency in seconds.
        stock: None where this is the stock cache.
    """
    medians = {context: np.median(np.asarray(found), axis=0) for context, found in windows.items()}
    line = fit_line([batch * cached for cached, _ in medians.values()], [seconds for _, seconds in medians.values()])
    where, tokens = break_even(line, stock) if stock else (None, None)
    points = [
        {
            "context": context,
            "inter_token_ms": 1e3 * float(medians[context][1]),
            "least_ms": 1e3 * min(seconds for _, seconds in found),
            "most_ms": 1e3 * max(seconds for _, seconds in found),
            "tokens_per_second": batch / float(medians[context][1]),
        }
        for context, found in windows.items()
    ]
    row = {
        **cache,
        "refused": None,
        "slope_us": 1e9 * line.slope,
        "intercept_ms": 1e3 * line.intercept,
        # A slope that noise has turned upside down is none to compare with.
        "slope_ratio": 1.0 if stock is None else line.slope / stock.slope if stock.slope > 0 else None,
        "r2": line.r2,
        "faster": where,
        "break_even_context": None if tokens is None else tokens / batch,
        "contexts": points,
    }
    return row, line


def refused_row(cache: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """Of a cache that this engine does not serve."""
    keys = ("slope_us", "intercept_ms", "slope_ratio", "r2", "faster", "break_even_context")
    return {**cache, "refused": reason, **dict.fromkeys(keys), "contexts": []}


def title(found: Mapping[str, Any]) -> str:
    return f"{Path(found['model']).name}, {found['dtype']}, {found['batch']} requests at once"


def label(row: Mapping[str, Any]) -> str:
    return f"mkv {row['budget']:.3f}" if row["name"] == "mkv" else row["name"]


def lines_table(found: Mapping[str, Any]) -> Table:
    """The lines of what `vllm_mkv.evaluation.bench.benchmark` returns."""
    table = Table(
        title=f"inter-token latency of {escape(title(found))}",
        caption="faster than stock; *: outside of the contexts measured",
    )
    table.add_column("cache", no_wrap=True)
    for column in ("bytes per token", "µs/1k tokens", "x stock", "intercept ms", "R²", "faster"):
        table.add_column(column, justify="right")
    for row in found["rows"]:
        if row["refused"] is not None:
            table.add_row(label(row), f"{row['bytes_per_token']:,}", *4 * ["-"], "refused")
            continue
        table.add_row(
            label(row),
            f"{row['bytes_per_token']:,}",
            f"{row['slope_us']:.1f}",
            "-" if row["slope_ratio"] is None else f"{row['slope_ratio']:.2f}",
            f"{row['intercept_ms']:.2f}",
            "-" if row["r2"] is None else f"{row['r2']:.4f}",
            _faster(row),
        )
    return table


def _faster(row: Mapping[str, Any]) -> str:
    if row["break_even_context"] is None:
        return row["faster"] or "-"
    measured = [point["context"] for point in row["contexts"]]
    outside = not min(measured) <= row["break_even_context"] <= max(measured)
    return f"{row['faster']} {row['break_even_context']:,.0f}" + ("*" if outside else "")


def points_table(found: Mapping[str, Any]) -> Table:
    """Tokens per second at every context, and the spread of the repeats."""
    table = Table(title="tokens/s ± spread of the repeats, by context")
    table.add_column("cache", no_wrap=True)
    for context in found["contexts"]:
        table.add_column(f"{context:,}", justify="right", no_wrap=True)
    for row in found["rows"]:
        points = [f"{point['tokens_per_second']:.1f} ± {_spread(point):.0%}" for point in row["contexts"]]
        table.add_row(label(row), *(points or ["-"] * len(found["contexts"])))
    return table


def _spread(point: Mapping[str, Any]) -> float:
    """Half the range of the repeats, as a share of their median."""
    return (point["most_ms"] - point["least_ms"]) / (2 * point["inter_token_ms"])


def print_latency(found: Mapping[str, Any], console: Console) -> None:
    console.print(lines_table(found))
    console.print(points_table(found))
    for row in found["rows"]:
        if row["refused"] is not None:
            console.print(f"{row['name']} was not measured, vLLM refuses it here: {row['refused']}", markup=False)
    if found["adapter_digest"] is None:
        console.print(
            "There is no adapter: MKV was timed with random bases, which says nothing of quality.", markup=False
        )
    spread = max(_spread(point) for row in found["rows"] for point in row["contexts"])
    if spread > NOISY:
        console.print(
            f"Repeats differ from their median by up to {spread:.0%}: the machine was busy. Trust the lines no further "
            "than R² does, and use more --repeats or a quieter machine.",
            markup=False,
        )
    console.print(found["hardware"], markup=False)


def draw_latency(found: Mapping[str, Any], file: str | Path) -> None:
    """Draws medians, the range of their repeats, and the lines through them.

    Raises:
        ValueError: the file's type is not one that matplotlib writes, or its folder does not exist.
    """
    from matplotlib.figure import Figure

    check_drawing(file)
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    for row in found["rows"]:
        if row["refused"] is not None:
            continue
        contexts, medians, least, most = (
            np.array([point[key] for point in row["contexts"]])
            for key in ("context", "inter_token_ms", "least_ms", "most_ms")
        )
        drawn = axes.errorbar(
            contexts, medians, [medians - least, most - medians], fmt="o", capsize=3, label=label(row)
        )
        ends = np.array([0, contexts.max()])
        line = 1e-6 * row["slope_us"] * found["batch"] * ends + row["intercept_ms"]
        axes.plot(ends, line, color=drawn.lines[0].get_color(), linewidth=1)
    axes.set(xlabel="context (tokens per request)", ylabel="inter-token latency (ms)", title=title(found))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    write_drawing(file, figure)
