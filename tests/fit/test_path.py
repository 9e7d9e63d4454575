# SPDX-License-Identifier: Apache-2.0
"""The path of least damage: legal, best where that can be tried out, and balanced over tensor-parallel ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mkv_kernels.codes import MEAN_SQUARED_ERRORS
from mkv_kernels.layout import KEY, WIDTHS, side_bytes
from vllm_mkv.allocation import AllocationPath, CacheShape
from vllm_mkv.fit.path import least_damage_path, tied_groups

SHAPE = CacheShape(num_layers=3, num_groups=4, group_width=64)


def random_damage(shape: CacheShape, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    size = (shape.num_layers, shape.num_groups, 2, shape.num_blocks)
    falling = np.sort(rng.lognormal(0, 2, size))[..., ::-1]
    return at_all_widths(falling * rng.lognormal(0, 2, (*size[:3], 1)))


def at_all_widths(dropped: np.ndarray) -> np.ndarray:
    """[..] to [.., widths]: the costs of Gaussian coordinates."""
    return dropped[..., None] * np.array([MEAN_SQUARED_ERRORS[width] for width in WIDTHS])


def prefixes(path: AllocationPath):
    """Widths [layers][groups][2][blocks] after every step."""
    widths = np.full((path.shape.num_layers, path.shape.num_groups, 2, path.shape.num_blocks), 16)
    yield widths.copy()
    for layer, group, side, block, width in path.steps.tolist():
        widths[layer, group, side, block] = width
        yield widths.copy()


def damage_of(widths: np.ndarray, damage: np.ndarray) -> float:
    index = np.vectorize(WIDTHS.index)(widths)
    return float(np.take_along_axis(damage, index[..., None], -1).sum())


def bytes_of(widths: np.ndarray) -> int:
    return sum(side_bytes(tuple(side), 2) for side in widths.reshape(-1, widths.shape[-1]).tolist())


@pytest.mark.parametrize("widths", [WIDTHS, (16, 0), (16, 4, 2, 0), (16, 8), (16, 2)])
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_a_path_is_legal_and_goes_to_the_end(widths, num_shards):
    path = least_damage_path(SHAPE, random_damage(SHAPE), widths, num_shards)
    path.validate()
    assert path.widths == widths
    *_, last = prefixes(path)
    assert (last[:, :, KEY, 1:] == widths[-1]).all()
    assert (last[:, :, KEY, 0] == (widths[-1] or widths[-2])).all(), "keys keep a block"
    assert (last[:, :, 1 - KEY] == widths[-1]).all()


@pytest.mark.parametrize("seed", range(5))
def test_damage_that_does_not_fall_along_the_blocks_still_gives_a_legal_path(seed):
    damage = np.random.default_rng(seed).lognormal(0, 3, (3, 4, 2, 4, len(WIDTHS)))
    path = least_damage_path(SHAPE, damage)
    path.validate()


@pytest.mark.parametrize("seed", range(3))
def test_no_allocation_is_cheaper_and_does_less_damage(seed):
    """Against every allocation of one latent group with two blocks a side."""
    shape = CacheShape(num_layers=1, num_groups=1, group_width=32)
    damage = random_damage(shape, seed)
    falling = [pair for pair in itertools.product(WIDTHS, repeat=2) if pair[0] >= pair[1]]
    every = [np.array([[[k, v]]]) for k in falling for v in falling if k[0] > 0]
    found = [(bytes_of(widths), damage_of(widths, damage)) for widths in prefixes(least_damage_path(shape, damage))]
    # The points at some price of a byte; between them lie allocations that no price finds.
    for price in np.logspace(-6, 4, 60):
        best = min(damage_of(widths, damage) + price * bytes_of(widths) for widths in every)
        own = min(cost + price * size for size, cost in found)
        assert own <= best * 1.02 + 4 * price, "but for the byte of a side's scale"


def test_what_matters_more_keeps_more():
    damage = random_damage(SHAPE)
    damage[1] = damage[0] * 100
    allocation = least_damage_path(SHAPE, damage).replay(0.25)
    bits = np.array(allocation.widths).sum((1, 2, 3))
    assert bits[1] > bits[0]


@pytest.mark.parametrize("num_shards", [2, 4])
@pytest.mark.parametrize("widths", [WIDTHS, (16, 0)])
def test_shards_waste_next_to_nothing_at_any_budget(num_shards, widths):
    path = least_damage_path(SHAPE, random_damage(SHAPE), widths, num_shards)
    uneven = least_damage_path(SHAPE, random_damage(SHAPE), widths)
    wasted = 0
    for budget in np.linspace(0.3, 1, 15):
        for of_path, wastes in ((path, False), (uneven, True)):
            allocation = of_path.replay(float(budget), num_shards=num_shards)
            for layer in range(SHAPE.num_layers):
                layouts = [
                    allocation.layout(layer, block_size=16, itemsize=2, shard=shard, num_shards=num_shards)
                    for shard in range(num_shards)
                ]
                waste = sum(16 * layout.bytes_per_token - layout.content_bytes for layout in layouts)
                wasted += wastes * (waste > 16 * num_shards)
                assert wastes or waste <= 16 * num_shards, "more than the byte that makes a token's share even"
    assert wasted > 0, "balancing was of use"


def test_ranks_that_share_a_group_count_it_once():
    assert tied_groups(random_damage(SHAPE)[0], 8) == tied_groups(random_damage(SHAPE)[0], 4)
    path = least_damage_path(SHAPE, random_damage(SHAPE), WIDTHS, 8)
    path.validate()
    assert path.replay(0.3, num_shards=8).budget(num_shards=8) <= 0.3


def test_tied_groups_are_one_of_each_shard_in_the_order_of_their_damage():
    damage = np.array([1.0, 5.0, 2.0, 0.5])[:, None, None, None] * np.ones((4, 2, 4, len(WIDTHS)))
    assert tied_groups(damage, 2) == [[1, 2], [0, 3]]
    assert tied_groups(damage, 1) == [[1], [2], [0], [3]]


@pytest.mark.parametrize("widths", [(8, 4, 0), (16, 4, 8, 0), (16, 5, 0), (16, 4, 4, 0), ()])
def test_widths_that_are_no_ladder_are_refused(widths):
    with pytest.raises(ValueError, match="widths"):
        least_damage_path(SHAPE, random_damage(SHAPE), widths)
