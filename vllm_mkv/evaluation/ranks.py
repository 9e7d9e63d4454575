# SPDX-License-Identifier: Apache-2.0
"""Ranks of an allocation, as a table and as a heatmap. Needs neither torch nor vLLM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.table import Table

from mkv_kernels.layout import KEY, VALUE
from vllm_mkv.allocation import Allocation

SIDES = {KEY: "key", VALUE: "value"}


def rank_table(allocation: Allocation) -> Table:
    """Stored coordinates of every latent group's keys and values, one row per layer."""
    ranks = allocation.ranks
    table = Table(title=f"ranks, of {allocation.shape.group_width}; one number per latent group")
    table.add_column("layer", justify="right")
    for name in SIDES.values():
        table.add_column(f"{name} ranks", overflow="fold")
        table.add_column("min/mean/max", justify="right")
    for layer, of_layer in enumerate(ranks):
        cells = [cell for side in SIDES for cell in (" ".join(map(str, of_layer[:, side])), spread(of_layer[:, side]))]
        table.add_row(str(layer), *cells)
    table.add_section()
    table.add_row("all", "", spread(ranks[..., KEY]), "", spread(ranks[..., VALUE]))
    return table


def spread(ranks: np.ndarray) -> str:
    return f"{ranks.min()}/{ranks.mean():.1f}/{ranks.max()}"


def draw_ranks(allocation: Allocation, title: str, file: str | Path) -> None:
    """A heatmap of the ranks, layers down and latent groups across, keys beside values.

    Raises:
        ValueError: the file's type is not one that matplotlib writes, or its folder does not exist.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    file = Path(file)
    kinds = FigureCanvasAgg(Figure()).get_supported_filetypes()
    if file.suffix.lower().removeprefix(".") not in kinds:
        raise ValueError(f"cannot draw to {file}; name a file that ends in .png, .pdf or .svg")
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder {file.parent} to draw into; make it, or name another")
    ranks = allocation.ranks
    layers, groups, _ = ranks.shape
    width, height = max(5.0, 1.6 + 2 * 0.42 * groups), max(2.8, 1.5 + 0.28 * layers)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for side, name in SIDES.items():
        image = axes[side].imshow(
            ranks[..., side], cmap="viridis", vmin=0, vmax=allocation.shape.group_width, aspect="auto"
        )
        axes[side].set(title=name, xlabel="latent group", xticks=_ticks(groups), yticks=_ticks(layers))
        if groups <= 16 and layers <= 48:
            _write_numbers(axes[side], ranks[..., side], allocation.shape.group_width)
    axes[KEY].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), label="rank")
    figure.suptitle(title)
    figure.savefig(file, dpi=150)


def _ticks(count: int, most: int = 16) -> list[int]:
    return list(range(0, count, -(-count // most)))


def _write_numbers(axes: object, ranks: np.ndarray, full: int) -> None:
    for (layer, group), rank in np.ndenumerate(ranks):
        colour = "black" if rank > 0.6 * full else "white"
        axes.text(group, layer, str(rank), ha="center", va="center", fontsize=7, color=colour)  # type: ignore[attr-defined]
