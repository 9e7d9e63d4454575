# SPDX-License-Identifier: Apache-2.0
"""Quality against bytes: KL divergence over bytes per token, projected caches as a line and their rivals as points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_mkv.output import check_drawing, write_drawing

LEAST_KL = 1e-6
"""What is below is rounding, and would stretch the logarithmic axis: it is drawn here."""


def title(evaluation: dict[str, Any]) -> str:
    name, tokens, context = (evaluation[key] for key in ("model", "tokens", "context"))
    return f"{Path(name).name}, {tokens:,} tokens in windows of {context}"


def draw_curve(evaluation: dict[str, Any], file: str | Path) -> None:
    """Draws what `vllm_mkv.evaluation.evaluate.evaluate` returns.

    Raises:
        ValueError: the file's type is not one that matplotlib writes, its folder does not exist, or there is nothing to
            draw beside the full model.
    """
    from matplotlib.figure import Figure

    check_drawing(file)
    stock, *rows = evaluation["rows"]
    if not rows:
        raise ValueError("there is nothing to draw beside the full model; give --budgets or --against")
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    points = sorted((row["bytes_per_token"], max(row["kl"], LEAST_KL), row["name"]) for row in rows)
    ours = [(used, kl) for used, kl, name in points if name == "mkv"]
    theirs = [(used, kl) for used, kl, name in points if name != "mkv"]
    if ours:
        axes.plot(*zip(*ours, strict=True), marker="o", label="MKV")
    if theirs:
        axes.plot(*zip(*theirs, strict=True), marker="x", linestyle="none", color="black", label="other caches")
    for used, kl, name in points:
        if name != "mkv":
            # Caches of one number of bits lie close together: their names go to different sides.
            corrected = name.endswith("_nc")
            side, shift = ("right", -5) if name.startswith("turboquant") and not corrected else ("left", 5)
            height, lift = ("top", -4) if corrected else ("bottom", 4)
            axes.annotate(name, (used, kl), (shift, lift), textcoords="offset points", fontsize=8, ha=side, va=height)
    axes.set_yscale("log")
    axes.set(
        xlabel="bytes per token",
        ylabel="KL divergence from the full model (nats per token)",
        xlim=(0, 1.12 * points[-1][0]),
        title=title(evaluation),
    )
    share = axes.secondary_xaxis(
        "top",
        functions=(lambda used: used / stock["bytes_per_token"], lambda budget: budget * stock["bytes_per_token"]),
    )
    share.set_xlabel("budget: share of the model's own cache")
    axes.grid(alpha=0.3)
    axes.legend()
    write_drawing(file, figure)
