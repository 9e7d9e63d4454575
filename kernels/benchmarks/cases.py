# SPDX-License-Identifier: Apache-2.0
"""What is measured: geometries of models, and layers that a budget leaves of them, uneven as a search leaves them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

from mkv_kernels.codes import MEAN_SQUARED_ERRORS
from mkv_kernels.layout import BLOCK, WIDTHS, BlockWidths, GroupWidths, side_bytes, uniform_widths

RANKS = (1.0, 0.5, 0.25)
TIERS = (0.25, 0.156, 0.094)
GROUP_HEADS = (1, 4)


@dataclass(frozen=True)
class Geometry:
    """Attention of one model."""

    name: str
    query_heads: int
    kv_heads: int
    head_size: int

    def full_bytes(self, itemsize: int) -> int:
        """Bytes per token of the model's own cache, in its own dtype."""
        return 2 * self.kv_heads * self.head_size * itemsize


# The two have the same shapes: what differs under the second name is the draw of the ranks.
GEOMETRIES = {
    geometry.name: geometry for geometry in (Geometry("llama-3.1-8b", 32, 8, 128), Geometry("qwen3-4b", 32, 8, 128))
}


@dataclass(frozen=True)
class Spec:
    """A cache: `kind` is "ranks" (widths 16 and 0) or "tiers" (all widths); `budget` of the model's own bytes."""

    kind: str
    budget: float
    group_heads: int

    @property
    def label(self) -> str:
        return f"{self.kind} {self.budget:g} J{self.group_heads}"


def all_specs(ranks: Iterable[float], tiers: Iterable[float], group_heads: Iterable[int]) -> list[Spec]:
    budgets = [("ranks", budget) for budget in ranks] + [("tiers", budget) for budget in tiers]
    return [Spec(kind, budget, J) for J in group_heads for kind, budget in budgets]


def quick_specs() -> list[Spec]:
    """Every budget with one head per group, the middle ones with four."""
    return [*all_specs(RANKS, TIERS, (1,)), *all_specs(RANKS[1:2], TIERS[1:2], (4,))]


def draw_widths(geometry: Geometry, spec: Spec, itemsize: int, seed: int = 0) -> tuple[GroupWidths, ...]:
    """Block widths of every latent group, within one block's step below the budget.

    Blocks get random weights that fall along the order of importance, at another level and another rate for every
    group and side; then each block gets the width that minimises weight * error + price * bits, at the lowest price
    that the budget allows. So sides are as uneven as their weights, and widths never increase.
    """
    if geometry.kv_heads % spec.group_heads:
        raise ValueError(f"{geometry.kv_heads} KV heads make no groups of {spec.group_heads}: choose a divisor")
    num_groups, n = geometry.kv_heads // spec.group_heads, spec.group_heads * geometry.head_size
    if spec.kind == "ranks" and spec.budget >= 1:
        return uniform_widths(num_groups, n, n, n)
    rng = random.Random(f"{geometry.name} {spec.label} {seed}")
    sides = [_weights(rng, n // BLOCK) for _ in range(2 * num_groups)]
    allowed = (16, 0) if spec.kind == "ranks" else WIDTHS
    target = spec.budget * geometry.full_bytes(itemsize)

    def at(log_price: float) -> list[BlockWidths]:
        return [_choose(weights, allowed, math.exp(log_price), itemsize) for weights in sides]

    low, high = -60.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(side_bytes(widths, itemsize) for widths in at(middle)) <= target:
            high = middle
        else:
            low = middle
    widths = at(high)
    return tuple((widths[2 * group], widths[2 * group + 1]) for group in range(num_groups))


def _weights(rng: random.Random, num_blocks: int) -> list[float]:
    level, decay = rng.uniform(-1, 1), math.exp(rng.uniform(math.log(3), math.log(12)))
    return [math.exp(level - decay * (block + rng.uniform(0, 0.5)) / num_blocks) for block in range(num_blocks)]


def _choose(weights: list[float], allowed: tuple[int, ...], price: float, itemsize: int) -> BlockWidths:
    def cost(weight: float, width: int) -> float:
        return weight * MEAN_SQUARED_ERRORS[width] + price * (8 * itemsize if width == 16 else width)

    # No side is left without anything, as a search would not leave it.
    first = min(allowed[:-1], key=lambda width: cost(weights[0], width))
    return first, *(min(allowed, key=lambda width: cost(weight, width)) for weight in weights[1:])
