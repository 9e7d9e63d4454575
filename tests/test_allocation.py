# SPDX-License-Identifier: Apache-2.0
"""Allocation paths: their replay for any budget, their bounds, and tensor-parallel shards."""

from itertools import pairwise

import numpy as np
import pytest

from mkv_kernels.layout import KEY, VALUE, side_bytes
from vllm_mkv.allocation import AllocationPath, CacheShape, check_width_ladder, split_groups

SHAPE = CacheShape(num_layers=3, num_groups=4, group_width=64)
BUDGETS = (0.26, 0.3, 0.375, 0.4999, 0.5, 0.51, 0.75, 0.99, 1.0)


def path_of(*steps, shape=SHAPE):
    return AllocationPath(shape, np.array(steps, dtype=np.int32).reshape(-1, 5))


@pytest.mark.parametrize("widths", [(16, 0), (16, 8, 4, 2, 0), (16, 4)])
@pytest.mark.parametrize("shape", [SHAPE, CacheShape(1, 1, 16), CacheShape(2, 1, 112), CacheShape(5, 3, 48)])
def test_a_uniform_path_is_valid(shape, widths):
    path = AllocationPath.uniform(shape, widths)
    path.validate()
    assert path.widths == tuple(w for w in widths if w == 16 or w in path.steps[:, 4])


def test_a_uniform_round_goes_by_layers_and_takes_values_before_keys():
    path = AllocationPath.uniform(CacheShape(2, 2, 32))
    assert path.steps.tolist() == [
        [layer, group, side, 1, 0] for layer in (0, 1) for side in (VALUE, KEY) for group in (0, 1)
    ]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
def test_replay_is_never_above_the_budget(uneven_path, itemsize, block_size, num_shards):
    engine = {"block_size": block_size, "itemsize": itemsize, "num_shards": num_shards}
    for path in (AllocationPath.uniform(SHAPE), uneven_path(SHAPE), AllocationPath.uniform(SHAPE, (16, 8, 4, 0))):
        least = path.smallest().budget(**engine)
        for budget in (least, *BUDGETS, 0.3 + 1e-9):
            assert path.replay(budget, **engine).budget(**engine) <= budget
        with pytest.raises(ValueError, match="use at least") as refusal:
            path.replay(0.99 * least, **engine)
        assert 0 <= float(str(refusal.value).split()[-1]) - least < 1e-4


def test_alignment_counts_in_pages_of_few_tokens():
    path = AllocationPath.uniform(SHAPE, (16, 8, 4, 2, 0))
    for budget in (0.3, 0.4, 0.6, 0.9):
        found = path.replay(budget, block_size=1)
        assert found.budget(block_size=1) <= budget
        # What fits in pages of many tokens does not in those of one: the path is gone down farther.
        assert path.replay(budget).budget(block_size=1) > budget
        assert found.budget() < path.replay(budget).budget()


def test_ranks_that_share_a_group_repeat_the_cache_and_what_it_is_compared_with():
    path = AllocationPath.uniform(SHAPE)
    whole = path.replay(1.0, num_shards=8)
    assert (whole.ranks == 64).all()
    assert whole.budget(num_shards=8) == whole.budget() == 1.0
    assert path.replay(0.5, num_shards=8) == path.replay(0.5)


def test_replay_stops_at_the_first_allocation_that_fits(uneven_path):
    path = uneven_path(SHAPE)
    step = 16 / (2 * 3 * 4 * 64)
    for budget in BUDGETS:
        assert budget - step < path.replay(budget).budget() <= budget


def test_smaller_budgets_take_from_every_rank_or_leave_it(uneven_path):
    path = uneven_path(SHAPE, seed=1)
    ranks = [path.replay(budget).ranks for budget in BUDGETS]
    for smaller, larger in pairwise(ranks):
        assert (smaller <= larger).all()
    assert (ranks[-1] == 64).all()
    assert ranks[0].min() == 16


def test_uniform_ranks_are_equal_at_round_budgets():
    path = AllocationPath.uniform(SHAPE)
    for budget, rank in ((1.0, 64), (0.75, 48), (0.5, 32), (0.25, 16)):
        assert (path.replay(budget).ranks == rank).all()


def test_bytes_are_the_sum_over_the_ranks(uneven_path):
    allocation = uneven_path(SHAPE).replay(0.6)
    assert allocation.bytes_per_token(block_size=16, itemsize=2) == 2 * allocation.ranks.sum()
    assert allocation.bytes_per_token(block_size=16, itemsize=4) == 4 * allocation.ranks.sum()


def test_scales_count_as_bytes():
    path = AllocationPath.uniform(CacheShape(1, 1, 64), (16, 4))
    allocation = path.replay(0.3)
    assert allocation.widths[0][0] == ((4,) * 4, (4,) * 4)
    assert allocation.bytes_per_token(block_size=16, itemsize=2) == 2 * (64 // 2 + 1)
    assert side_bytes((16, 4, 4, 0), 2) == 32 + 16 + 1


def test_every_shard_declares_the_largest_shards_bytes():
    # One group of the first shard gives half its keys away; the layer gains nothing until the second shard does too.
    path = path_of((0, 0, 0, 3, 0), (0, 0, 0, 2, 0), (0, 2, 0, 3, 0), (0, 2, 0, 2, 0))
    full = SHAPE.stock_bytes_per_token(2)
    budget = (full - 4 * 32) / full
    allocation = path.replay(budget, num_shards=2)
    assert allocation.ranks[0, :, 0].tolist() == [32, 64, 32, 64]
    layouts = [allocation.layout(0, block_size=16, itemsize=2, shard=shard, num_shards=2) for shard in (0, 1)]
    assert layouts[0].bytes_per_token == layouts[1].bytes_per_token


def test_shards_hold_consecutive_groups_and_share_where_they_outnumber_them():
    groups = tuple(range(4))
    assert split_groups(groups, 1) == [(0, 1, 2, 3)]
    assert split_groups(groups, 2) == [(0, 1), (2, 3)]
    assert split_groups(groups, 8) == [(0,), (0,), (1,), (1,), (2,), (2,), (3,), (3,)]


@pytest.mark.parametrize("num_groups, num_shards", [(3, 2), (4, 3), (4, 6), (5, 2)])
def test_groups_that_do_not_divide_into_shards_are_refused(num_groups, num_shards):
    path = AllocationPath.uniform(CacheShape(2, num_groups, 32))
    with pytest.raises(ValueError, match=f"{num_groups} latent groups per layer.*{num_shards}.*--group-heads 1"):
        path.replay(0.5, num_shards=num_shards)


@pytest.mark.parametrize("budget", [0, -0.5, 1.0001, 7, float("nan"), float("inf")])
def test_a_budget_outside_0_to_1_is_refused(budget):
    with pytest.raises(ValueError, match=r"budget .* is not in \(0, 1\]"):
        AllocationPath.uniform(SHAPE).replay(budget)


@pytest.mark.parametrize("budget", ["0.5", None, True, [0.5]])
def test_a_budget_that_is_no_number_is_refused(budget):
    with pytest.raises(ValueError, match="is not a number"):
        AllocationPath.uniform(SHAPE).replay(budget)


def test_a_budget_below_the_smallest_ranks_names_the_smallest_that_works():
    path = AllocationPath.uniform(SHAPE)
    with pytest.raises(ValueError, match=r"use at least 0\.25$"):
        path.replay(0.2)
    assert path.replay(0.25).budget() == 0.25


@pytest.mark.parametrize(
    "steps, reason",
    [
        ([(3, 0, 0, 3, 0)], "step 0 names block .* outside"),
        ([(0, 4, 0, 3, 0)], "outside"),
        ([(0, 0, 2, 3, 0)], "outside"),
        ([(0, 0, 0, 4, 0)], "outside"),
        ([(0, 0, 0, -1, 0)], "outside"),
        ([(0, 0, 0, 3, 5)], "from 16 bits to 5"),
        ([(0, 0, 0, 3, 16)], "from 16 bits to 16"),
        ([(0, 0, 0, 3, 4), (0, 0, 0, 3, 8)], "step 1 takes block .* from 4 bits to 8"),
        ([(0, 0, 0, 3, 0), (0, 0, 0, 1, 0)], "step 1 gives block .* fewer bits than the less important one"),
    ],
)
def test_steps_that_are_no_steps_down_are_refused(steps, reason):
    with pytest.raises(ValueError, match=reason):
        path_of(*steps).validate()


@pytest.mark.parametrize("steps", [np.zeros((2, 4), np.int32), np.zeros(5, np.int32), np.zeros((2, 5), np.float32)])
def test_steps_of_another_form_are_refused(steps):
    with pytest.raises(ValueError, match=r"not \[steps, 5\] of integers"):
        AllocationPath(SHAPE, steps).validate()


@pytest.mark.parametrize("widths", [(), (8, 0), (16, 16, 0), (16, 0, 4), (16, 5, 0)])
def test_a_width_ladder_starts_at_16_and_falls(widths):
    with pytest.raises(ValueError, match="must start at 16 and fall"):
        check_width_ladder(widths)
