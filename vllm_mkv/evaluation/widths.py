# SPDX-License-Identifier: Apache-2.0
"""Widths of an allocation, as a table and as a heatmap. Needs neither torch nor vLLM."""

from __future__ import annotations

from itertools import chain, groupby
from pathlib import Path

import numpy as np
from rich.table import Table

from mkv_kernels.layout import BLOCK, KEY, VALUE, WIDTHS, BlockWidths, rank_of
from vllm_mkv.allocation import Allocation
from vllm_mkv.output import check_drawing, write_drawing

SIDES = {KEY: "key", VALUE: "value"}
ASCENDING = sorted(WIDTHS)
MOST_INCHES = 40.0
"""Height of the tallest heatmap: at 150 dots per inch, two dots for each of 80 x 32 latent groups."""


def widths_table(allocation: Allocation) -> Table:
    """Bits of every latent group's keys and values, one row per layer.

    Where coordinates have 16 bits or none, a latent group is the number of those that have 16: its rank.
    """
    tiers = bool(np.isin(np.array(allocation.widths), (0, 16), invert=True).any())
    coordinates = allocation.shape.group_width
    title = f"per latent group, how many of its {coordinates} coordinates have how many bits"
    table = Table(title=title if tiers else f"ranks, of {coordinates}; one number per latent group")
    table.add_column("layer", justify="right")
    for name in SIDES.values():
        table.add_column(f"{name} {'tiers' if tiers else 'ranks'}", overflow="fold")
        if not tiers:
            table.add_column("min/mean/max", justify="right")
        table.add_column("mean bits", justify="right")
    for layer, groups in enumerate(allocation.widths):
        sides = [[group[side] for group in groups] for side in SIDES]
        listed = [tier_lines(blocks) if tiers else rank_list(blocks) for blocks in sides]
        table.add_row(str(layer), *cells(sides, listed, tiers))
    table.add_section()
    sides = [[group[side] for groups in allocation.widths for group in groups] for side in SIDES]
    listed = [tier_counts(tuple(chain.from_iterable(blocks))) if tiers else "" for blocks in sides]
    table.add_row("all", *cells(sides, listed, tiers))
    return table


def cells(sides: list[list[BlockWidths]], listed: list[str], tiers: bool) -> list[str]:
    """What is listed of the latent groups' keys and values, and their means."""
    row = []
    for blocks, text in zip(sides, listed, strict=True):
        row += [text] if tiers else [text, spread(np.array([rank_of(widths) for widths in blocks]))]
        row.append(f"{np.mean(blocks):.2f}")
    return row


def rank_list(groups: list[BlockWidths]) -> str:
    return " ".join(str(rank_of(widths)) for widths in groups)


def spread(ranks: np.ndarray) -> str:
    return f"{ranks.min()}/{ranks.mean():.1f}/{ranks.max()}"


def tier_lines(groups: list[BlockWidths]) -> str:
    """A line for every run of latent groups whose coordinates have the same bits, such as `0-3: 16b:32 4b:96`."""
    if len(groups) == 1:
        return tier_counts(groups[0])
    lines = []
    for widths, run in groupby(enumerate(groups), key=lambda group: group[1]):
        indices = [index for index, _ in run]
        which = f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
        lines.append(f"{which}: {tier_counts(widths)}")
    return "\n".join(lines)


def tier_counts(widths: BlockWidths) -> str:
    """How many coordinates have how many bits, most bits first: `16b:32 4b:96`."""
    return " ".join(f"{width}b:{BLOCK * widths.count(width)}" for width in WIDTHS if width in widths)


def draw_widths(allocation: Allocation, title: str, file: str | Path) -> None:
    """A heatmap of the widths: layers and their latent groups down, blocks of coordinates across, keys beside values.

    Raises:
        ValueError: the file's type is not one that matplotlib writes, or its folder does not exist.
    """
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure

    check_drawing(file)
    shape = allocation.shape
    levels = np.searchsorted(ASCENDING, np.array(allocation.widths))
    rows = shape.num_layers * shape.num_groups
    height = float(np.clip(1.5 + 0.07 * rows, 2.8, MOST_INCHES))
    figure = Figure(figsize=(max(6.0, 2.2 + 2 * 0.14 * shape.num_blocks), height), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    # Cividis looks the same to the colour-blind, and one colour per width is easier told apart than a gradient.
    colours = {
        "cmap": colormaps["cividis"].resampled(len(WIDTHS)),
        "norm": BoundaryNorm(np.arange(len(WIDTHS) + 1) - 0.5, len(WIDTHS)),
    }
    for side, name in SIDES.items():
        image = axes[side].imshow(
            levels[:, :, side].reshape(rows, shape.num_blocks), aspect="auto", interpolation="nearest", **colours
        )
        axes[side].set(title=name, xlabel=f"block of {BLOCK} coordinates", xticks=ticks(shape.num_blocks, 16))
        if shape.num_groups > 1:
            for layer in range(1, shape.num_layers):
                axes[side].axhline(layer * shape.num_groups - 0.5, color="white", linewidth=0.5)
    labelled = ticks(shape.num_layers, int(5 * height))
    middles = [(layer + 0.5) * shape.num_groups - 0.5 for layer in labelled]
    axes[KEY].set_yticks(middles, [str(layer) for layer in labelled])
    axes[KEY].set_ylabel("layer" if shape.num_groups == 1 else f"layer, each of {shape.num_groups} latent groups")
    bar = figure.colorbar(
        image,
        ax=list(axes),
        ticks=range(len(WIDTHS)),
        label="bits per coordinate",
        shrink=min(1.0, 4 / height),
        anchor=(0.0, 1.0),
    )
    bar.minorticks_off()
    bar.ax.set_yticklabels([str(width) for width in ASCENDING])
    figure.suptitle(title)
    write_drawing(file, figure)


def ticks(count: int, most: int) -> list[int]:
    """At most so many of `count` places, evenly apart."""
    return list(range(0, count, -(-count // most)))
