# SPDX-License-Identifier: Apache-2.0
"""The allocation path of least predicted damage per byte.

What it costs to give a block of a (layer, latent group, side) the width b is taken for e(layer, side) times the block's
measured error at b, and costs add up. Then the best next step is the one with the least cost per byte saved, and where
fewer bits save fewer bytes at a higher cost, taking best next steps is the Lagrangian allocation of every budget up to
single blocks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from mkv_kernels.layout import KEY, WIDTHS, side_bytes
from vllm_mkv.allocation import AllocationPath, CacheShape, check_width_ladder, split_groups

ITEMSIZE = 2
"""Bytes of the 16-bit tier that steps are weighed with: those of bfloat16 and float16."""


def least_damage_path(
    shape: CacheShape, damage: np.ndarray, widths: Sequence[int] = WIDTHS, num_shards: int = 1
) -> AllocationPath:
    """Orders all steps down the ladder of `widths`.

    Args:
        damage: float64 `[layers, groups, 2, blocks, widths]`: the cost of every block at each of `layout.WIDTHS`.
        widths: that blocks may have, falling from 16.
        num_shards: tensor-parallel ranks that have equal bytes after every round of steps: group by group, the ones
            that matter most on every rank first, they have equal widths. 1 for none.

    Raises:
        ValueError: the widths are no ladder, or the groups do not divide into the ranks.
    """
    check_width_ladder(widths)
    sides = [
        _Side(layer, groups, side, damage[layer, groups, side], tuple(widths), shape.num_blocks)
        for layer in range(shape.num_layers)
        for groups in tied_groups(damage[layer], num_shards)
        for side in (0, 1)
    ]
    heap = [(*move, number) for number, side in enumerate(sides) if (move := side.best_move())]
    heapq.heapify(heap)
    steps: list[tuple[int, int, int, int, int]] = []
    while heap:
        _, block, width, number = heapq.heappop(heap)
        steps += sides[number].take(block, width)
        if move := sides[number].best_move():
            heapq.heappush(heap, (*move, number))
    return AllocationPath(shape, np.array(steps, dtype=np.int32).reshape(-1, 5))


def tied_groups(damage: np.ndarray, num_shards: int) -> list[list[int]]:
    """Latent groups of a layer that always have equal widths: one of each shard, in order of what dropping it costs.

    Args:
        damage: [groups, 2, blocks, widths].
    """
    total = damage[..., -1].sum((1, 2))
    shards = split_groups(range(len(damage)), num_shards)
    # A group that several ranks hold copies of is one group.
    ranked = [sorted(groups, key=lambda group: -total[group]) for groups in dict.fromkeys(shards)]
    return [list(groups) for groups in zip(*ranked, strict=True)]


class _Side:
    """Keys or values of tied latent groups on their way down."""

    def __init__(
        self, layer: int, groups: list[int], side: int, damage: np.ndarray, ladder: tuple[int, ...], num_blocks: int
    ) -> None:
        self.layer, self.groups, self.side, self.ladder = layer, groups, side, ladder
        self.damage = damage.sum(0).tolist()
        self.widths = [16] * num_blocks

    def best_move(self) -> tuple[float, int, int] | None:
        """Cost per byte saved, block and new width of the best next step; None at the end."""
        return min(self._moves(), default=None)

    def _moves(self) -> Iterator[tuple[float, int, int]]:
        before = side_bytes(tuple(self.widths), ITEMSIZE)
        for block, width in enumerate(self.widths):
            after_it = self.widths[block + 1] if block + 1 < len(self.widths) else 0
            if after_it == width:
                continue
            for lower in self.ladder:
                # Keys without any coordinate attend to every token alike: that is not done for a few bytes.
                if not after_it <= lower < width or (lower == 0 and block == 0 and self.side == KEY):
                    continue
                self.widths[block] = lower
                saved = before - side_bytes(tuple(self.widths), ITEMSIZE)
                self.widths[block] = width
                if saved > 0:
                    cost = self.damage[block][WIDTHS.index(lower)] - self.damage[block][WIDTHS.index(width)]
                    yield cost / (saved * len(self.groups)), block, lower

    def take(self, block: int, width: int) -> list[tuple[int, int, int, int, int]]:
        self.widths[block] = width
        return [(self.layer, group, self.side, block, width) for group in self.groups]
