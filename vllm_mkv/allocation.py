# SPDX-License-Identifier: Apache-2.0
"""Which coordinates get how many bits, for any budget.

An allocation path is the order in which the blocks of 16 coordinates of every (layer, latent group, side) step down
through the widths. Replaying it until the bytes fit gives ranks and tiers for any budget: one adapter serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np

from mkv_kernels.layout import BLOCK, WIDTHS, GroupWidths, PageLayout, rank_of, side_bytes

T = TypeVar("T")


@dataclass(frozen=True)
class CacheShape:
    """The cache of a model, in latent groups.

    Args:
        num_layers: attention layers.
        num_groups: latent groups per layer.
        group_width: coordinates per latent group, `group_heads * head_size`.
    """

    num_layers: int
    num_groups: int
    group_width: int

    @property
    def num_blocks(self) -> int:
        """Blocks of 16 coordinates per latent group and side."""
        return self.group_width // BLOCK

    def stock_bytes_per_token(self, itemsize: int) -> int:
        """Bytes per token of the model's own cache, keys and values."""
        return 2 * self.num_layers * self.num_groups * self.group_width * itemsize


@dataclass(frozen=True)
class Allocation:
    """Block widths of a whole model: `widths[layer][group]` = (key block widths, value block widths)."""

    shape: CacheShape
    widths: tuple[tuple[GroupWidths, ...], ...]

    @property
    def ranks(self) -> np.ndarray:
        """`[layers, groups, 2]`: stored coordinates of every latent group's key and value."""
        return np.array([[[rank_of(side) for side in group] for group in layer] for layer in self.widths])

    def layout(self, layer: int, *, block_size: int, itemsize: int, shard: int = 0, num_shards: int = 1) -> PageLayout:
        """The layer's pages on one of `num_shards` tensor-parallel ranks, padded to the largest of them."""
        layouts = [PageLayout(widths, block_size, itemsize) for widths in split_groups(self.widths[layer], num_shards)]
        padded = max(layout.bytes_per_token for layout in layouts)
        return PageLayout(layouts[shard].widths, block_size, itemsize, padded)

    def bytes_per_token(self, *, block_size: int, itemsize: int, num_shards: int = 1) -> int:
        """Of all layers and shards, as the cache specs declare them: scales, alignment and padding included."""
        return sum(
            num_shards
            * self.layout(layer, block_size=block_size, itemsize=itemsize, num_shards=num_shards).bytes_per_token
            for layer in range(self.shape.num_layers)
        )

    def budget(self, *, block_size: int = 16, itemsize: int = 2, num_shards: int = 1) -> float:
        """Bytes per token divided by the bytes per token of the model's own cache.

        Where tensor-parallel ranks outnumber the latent groups, which serving takes of single KV heads alone, vLLM
        repeats the model's own cache just as this one, once for every rank that shares a head.
        """
        replicas = max(1, num_shards // self.shape.num_groups)
        used = self.bytes_per_token(block_size=block_size, itemsize=itemsize, num_shards=num_shards)
        return used / (self.shape.stock_bytes_per_token(itemsize) * replicas)


def split_groups(groups: Sequence[T], num_shards: int) -> list[tuple[T, ...]]:
    """Groups of each tensor-parallel rank: consecutive ones, or a shared one where ranks outnumber them.

    Raises:
        ValueError: the latent groups do not divide into the ranks, or there are none.
    """
    if num_shards < 1:
        raise ValueError(f"{num_shards} tensor-parallel ranks hold no cache; use 1 at least")
    if len(groups) % num_shards == 0:
        size = len(groups) // num_shards
        return [tuple(groups[i : i + size]) for i in range(0, len(groups), size)]
    if num_shards % len(groups) == 0:
        replicas = num_shards // len(groups)
        return [(groups[rank // replicas],) for rank in range(num_shards)]
    raise ValueError(
        f"{len(groups)} latent groups per layer do not divide into {num_shards} tensor-parallel ranks; use an adapter "
        f"with fewer heads per group (`vllm-mkv calibrate --group-heads 1`) or another --tensor-parallel-size"
    )


@dataclass(frozen=True)
class AllocationPath:
    """The order in which blocks step down.

    Args:
        shape: the cache that is allocated.
        steps: int `[num_steps, 5]`, rows of layer, latent group, side (0 key, 1 value), block and its new width.
    """

    shape: CacheShape
    steps: np.ndarray

    @classmethod
    def uniform(cls, shape: CacheShape, widths: Sequence[int] = (16, 0), min_rank: int = BLOCK) -> AllocationPath:
        """All latent groups alike: every one loses its least important block before any loses its next.

        Within such a round early layers go first, and in a layer values before keys.
        """
        check_width_ladder(widths)
        kept = min_rank // BLOCK
        order = [
            (layer, group, side, block, width)
            for _, width in pairwise(widths)
            for block in range(shape.num_blocks - 1, kept - 1 if width == 0 else -1, -1)
            for layer in range(shape.num_layers)
            for side in (1, 0)
            for group in range(shape.num_groups)
        ]
        return cls(shape, np.array(order, dtype=np.int32).reshape(-1, 5))

    def validate(self) -> None:
        """Raises ValueError naming the first step that is no step down from the widths before it."""
        if self.steps.ndim != 2 or self.steps.shape[1] != 5 or not np.issubdtype(self.steps.dtype, np.integer):
            raise ValueError(f"its shape is {list(self.steps.shape)}, not [steps, 5] of integers")
        shape = self.shape
        limits = (shape.num_layers, shape.num_groups, 2, shape.num_blocks)
        widths = np.full(limits, 16)
        for number, (*where, width) in enumerate(self.steps.tolist()):
            if any(not 0 <= index < limit for index, limit in zip(where, limits, strict=True)):
                raise ValueError(f"step {number} names block {where}, outside {list(limits)}")
            place = tuple(where)
            if width not in WIDTHS or width >= widths[place]:
                raise ValueError(f"step {number} takes block {where} from {widths[place]} bits to {width}")
            widths[place] = width
            block = where[3]
            if block + 1 < shape.num_blocks and widths[(*where[:3], block + 1)] > width:
                raise ValueError(f"step {number} gives block {where} fewer bits than the less important one after it")

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The widths that occur on the path, most bits first."""
        return tuple(w for w in WIDTHS if w == 16 or w in set(self.steps[:, 4].tolist()))

    def replay(self, budget: float, *, block_size: int = 16, itemsize: int = 2, num_shards: int = 1) -> Allocation:
        """The first allocation of the path whose bytes per token fit the budget.

        Args:
            budget: bytes per token, as a share of the model's own cache; in (0, 1].
            block_size, itemsize, num_shards: of the engine, since they decide alignment and padding.

        Raises:
            ValueError: the budget is not in (0, 1], or smaller than what the path ends at.
        """
        check_budget(budget)
        split_groups(range(self.shape.num_groups), num_shards)
        replicas = max(1, num_shards // self.shape.num_groups)
        affordable = budget * self.shape.stock_bytes_per_token(itemsize) * replicas
        for allocation, dense in self._walk(itemsize, num_shards):
            if dense <= affordable:
                found = allocation()
                # Alignment can cost more than the dense sum where pages are of very few tokens.
                if found.budget(block_size=block_size, itemsize=itemsize, num_shards=num_shards) <= budget:
                    return found
        least = self.smallest().budget(block_size=block_size, itemsize=itemsize, num_shards=num_shards)
        raise ValueError(
            f"budget {budget:g} is smaller than the smallest that this adapter's allocation path reaches; "
            f"use at least {math.ceil(least * 1e4) / 1e4:g}"
        )

    def smallest(self) -> Allocation:
        """What the path ends at."""
        *_, (allocation, _) = self._walk(itemsize=2, num_shards=1)
        return allocation()

    def _walk(self, itemsize: int, num_shards: int) -> Iterator[tuple[Callable[[], Allocation], int]]:
        """Yields, before the first step and after each, a way to get the allocation and its dense bytes per token."""
        shape = self.shape
        widths = [
            [[[16] * shape.num_blocks, [16] * shape.num_blocks] for _ in range(shape.num_groups)]
            for _ in range(shape.num_layers)
        ]
        # Groups of a rank add up; every rank declares as many bytes as the one that needs most.
        size = max(1, shape.num_groups // num_shards)
        full = 2 * side_bytes((16,) * shape.num_blocks, itemsize)
        shards = [[full * size] * (shape.num_groups // size) for _ in range(shape.num_layers)]
        layer_bytes = [full * size] * shape.num_layers
        total = num_shards * sum(layer_bytes)

        def frozen() -> Allocation:
            return Allocation(shape, tuple(tuple((tuple(k), tuple(v)) for k, v in layer) for layer in widths))

        yield frozen, total
        for layer, group, side, block, width in self.steps.tolist():
            blocks = widths[layer][group][side]
            before = side_bytes(tuple(blocks), itemsize)
            blocks[block] = width
            shards[layer][group // size] += side_bytes(tuple(blocks), itemsize) - before
            total += num_shards * (max(shards[layer]) - layer_bytes[layer])
            layer_bytes[layer] = max(shards[layer])
            yield frozen, total


def check_width_ladder(widths: Sequence[int]) -> None:
    """Raises ValueError unless `widths` start at 16 and fall through known widths."""
    if list(widths) != sorted(set(widths) & set(WIDTHS), reverse=True) or not widths or widths[0] != 16:
        raise ValueError(f"widths {list(widths)} must start at 16 and fall through some of {list(WIDTHS[1:])}")


def check_budget(budget: object) -> None:
    """Raises ValueError unless `budget` is a number in (0, 1]."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ValueError(f"budget {budget!r} is not a number; give a share of the model's own cache such as 0.5")
    if not 0 < budget <= 1:
        shown = f"{budget:g}" if isinstance(budget, float) else budget
        raise ValueError(f"budget {shown} is not in (0, 1]; give a share of the model's own cache such as 0.5")
