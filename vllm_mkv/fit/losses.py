# SPDX-License-Identifier: Apache-2.0
"""The loss of a training run over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_mkv.output import check_drawing, write_drawing


def draw_losses(log: Sequence[dict[str, float]], file: str | Path) -> None:
    """Draws what `vllm_mkv.fit.train.train` returns.

    Raises:
        ValueError: the file's type is not one that matplotlib writes, or its folder does not exist.
    """
    from matplotlib.figure import Figure

    check_drawing(file)
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in log], [row["kl"] for row in log])
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="KL divergence from the full model (nats per token)")
    axes.grid(alpha=0.3, which="both")
    write_drawing(file, figure)
