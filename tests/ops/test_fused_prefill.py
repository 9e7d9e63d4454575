# SPDX-License-Identifier: Apache-2.0
"""The prefill kernel against float64 and its twin, on caches that are full of NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mkv_kernels.fused import launch
from mkv_kernels.fused.prefill import prefill

SCALE = 0.2
HALF = torch.float16


def run(layer, step, output=None):
    if layer.dtype == torch.float32 and layer.table.shapes.coded and torch.cuda.is_available():
        pytest.skip("refused on GPUs, see `launch.check_prefill`")
    if output is None:
        shape = (len(step.query), layer.num_heads, layer.d)
        output = torch.full(shape, float("nan"), dtype=layer.dtype, device=step.query.device)
    scores = {"window": layer.window, "soft_cap": layer.soft_cap}
    prefill(step.query, layer.cache, layer.table, *step.integers, SCALE, output, **scores)
    return output


# Whole prompts, chunks behind a cached prefix, and single queries, in one launch.
SEQ_LENS, QUERIES = (63, 17, 100, 16, 1, 90), (63, 2, 41, 15, 1, 1)
SHAPES = {
    "uneven-ranks": ([("16x4", "16x1"), ("16x1", "16x4"), ("16x3", "16x3"), ("16x1", "16x1")], {}),
    "j2-heads7-d64": ([("16x7", "16x3"), ("16x1", "16x8")], {"J": 2, "M": 7, "dtype": HALF}),
    "j4-heads1-d96": ([("16x7", "16x24"), ("16x1", "16x3")], {"J": 4, "M": 1, "d": 96, "block_size": 128}),
    "j8-heads1-d128": ([("16x1 8x2 4x12 2x8", "8x1 4x6 2x8")], {"J": 8, "M": 1, "d": 128, "block_size": 32}),
    "head-256": ([("16x1", "16x16"), ("16x16", "16x1")], {"M": 8, "d": 256, "block_size": 64}),
    "folded-d96": ([("16x1 4x2", "16x1 4x2 2x1"), ("4x6", "4x1")], {"M": 4, "d": 96, "fold_up": True}),
    "a-tier-each": ([("16x2", "2x2"), ("8x3", "4x1"), ("4x2", "8x1"), ("2x4", "16x1")], {"M": 1}),
    "all-tiers": ([("16x1 8x2 4x3 2x1", "16x2 8x1 4x1 2x2"), ("2x1", "16x8")], {"J": 2, "dtype": HALF}),
    "nothing-stored": ([("", "4x4"), ("16x1", ""), ("", "")], {}),
    "no-keys": ([("", "16x4"), ("", "16x1")], {"block_size": 48}),
    "no-values": ([("16x4", ""), ("16x1", "")], {"block_size": 48}),
    "two-tiles": ([("16x8", "16x8"), ("16x1", "16x5"), ("16x5", "16x1"), ("16x2", "")], {"d": 128, "fold_up": True}),
    "one-tile": ([("16x8", "16x4"), ("16x1", "16x3")], {"d": 128, "fold_up": True}),
    "many-tiles": ([("16x9", "16x1"), ("16x1", "16x9")], {"J": 2, "d": 128, "block_size": 48}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_errs_no_more_than_its_twin(make_layer, shape):
    groups, settings = SHAPES[shape]
    layer = make_layer(*groups, **settings)
    step = layer.step(SEQ_LENS, QUERIES)
    layer.check(run(layer, step), step)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter's bfloat16 is not that of a GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16(make_layer, shape):
    groups, settings = SHAPES[shape]
    layer = make_layer(*groups, **settings | {"dtype": torch.bfloat16})
    step = layer.step(SEQ_LENS, QUERIES)
    layer.check(run(layer, step), step)


@pytest.mark.parametrize("shape", ["two-tiles", "one-tile"])
def test_two_tiles_of_values_as_one(make_layer, monkeypatch, shape):
    """As Triton 3.9 has it on Hopper."""
    groups, settings = SHAPES[shape]
    layer = make_layer(*groups, **settings)
    value = layer.table.shapes.value
    assert (value.joined != value) == (shape == "two-tiles") and value.joined.columns == value.columns
    step = layer.step(SEQ_LENS, QUERIES)
    apart = run(layer, step)
    asked = []
    monkeypatch.setattr(launch.Target, "joins_values", lambda self, dtype: asked.append(dtype) or True)
    together = run(layer, step)
    assert asked
    layer.check(together, step)
    assert shape == "two-tiles" or torch.equal(together, apart)


def test_long_prompts_behind_long_prefixes(make_layer):
    layer = make_layer(("16x1 4x2", "8x1 2x3"), block_size=16)
    step = layer.step([1000, 30], [70, 30])
    layer.check(run(layer, step), step)


def test_some_of_a_steps_requests(make_layer):
    """Decodes come first in a step, and prefill is told of the rest; outputs of others stay as they are."""
    layer = make_layer(("16x1 4x2", "8x1 2x2"), ("4x4", "16x2"))
    step = layer.step([70, 33, 50], [1, 20, 50], padding=1)
    whole = run(layer, step)
    part = torch.zeros_like(whole)
    step.block_table, step.seq_lens = step.block_table[1:], step.seq_lens[1:]
    step.query_start_loc = step.query_start_loc[1:]
    run(layer, step, part)
    assert torch.equal(part[1:], whole[1:]) and (part[:1] == 0).all()


@pytest.mark.parametrize(("J", "dtype"), [(1, torch.float32), (2, HALF)])
@pytest.mark.parametrize(("window", "soft_cap"), [(1, 0.0), (5, 1.0), (16, 0.0), (100, 0.5), (1000, 0.0), (0, 1.0)])
def test_windows_and_soft_caps(make_layer, window, soft_cap, J, dtype):
    groups = [("16x1 4x2", "8x1 2x2"), ("4x4", "16x2")]
    # Tiles have few queries here, and each takes the interpreter long.
    check_window(make_layer, groups, window, soft_cap, J, dtype, (17, 2, 9, 37, 1))


@pytest.mark.parametrize(("J", "dtype"), [(1, torch.float32), (2, HALF)])
@pytest.mark.parametrize(("window", "soft_cap"), [(1, 0.0), (15, 0.0), (100, 0.5), (170, 0.0), (1000, 0.0), (0, 1.0)])
def test_windows_and_soft_caps_over_16_bits(make_layer, window, soft_cap, J, dtype):
    check_window(make_layer, [("16x2", "16x1"), ("16x1", "16x4")], window, soft_cap, J, dtype)


def check_window(make_layer, groups, window, soft_cap, J, dtype, queries=(33, 2, 9, 69, 1)):
    """Whole prompts, and chunks that begin within, at the end of and far behind a window."""
    layer = make_layer(*groups, J=J, dtype=dtype, window=window, soft_cap=soft_cap)
    step = layer.step((queries[0], 17, 300, 70, 1), queries)
    found = run(layer, step)
    layer.check(found, step)
    if window:
        assert layer.poison_before_windows(step) or window == 1000
        assert torch.equal(run(layer, step), found), "something before a window was read"


@st.composite
def layers(draw):
    J, M = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1)]))
    block = st.lists(st.sampled_from([16, 8, 4, 2, 0]), min_size=2 * J, max_size=2 * J)
    side = block.map(lambda widths: tuple(sorted(widths, reverse=True)))
    groups = st.lists(st.tuples(side, side), min_size=1, max_size=3)
    # A layer that stores nothing has no cache.
    widths = draw(groups.filter(lambda groups: any(any(side) for group in groups for side in group)))
    shape = {"J": J, "M": M, "d": 32, "fold_up": J == 1 and draw(st.booleans())}
    shape |= {"block_size": draw(st.sampled_from([16, 48, 128])), "dtype": draw(st.sampled_from([torch.float32, HALF]))}
    lengths = draw(st.lists(st.integers(1, 130), min_size=1, max_size=3))
    return tuple(widths), shape, lengths, [draw(st.integers(1, n)) for n in lengths], draw(st.integers(0, 99))


# Shrinking would take minutes in the interpreter; cases are small as they are.
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(case=layers())
def test_any_layer(make_layer, case):
    widths, shape, lengths, queries, seed = case
    layer = make_layer(widths=widths, **shape, seed=seed)
    step = layer.step(lengths, queries)
    layer.check(run(layer, step), step)


def test_codes_in_float32_are_refused_on_a_gpu(make_layer):
    target = launch.Target("cuda", 9)
    with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
        launch.check_prefill(make_layer(("8x2", "16x1")).table.shapes, torch.float32, target)
    launch.check_prefill(make_layer(("8x2", "16x1"), dtype=HALF).table.shapes, HALF, target)
    launch.check_prefill(make_layer(("16x2", "16x1")).table.shapes, torch.float32, target)


def test_errors_name_the_mend(make_layer):
    layer = make_layer(("16x4", "16x4"))
    step = layer.step([33], [33])
    with pytest.raises(ValueError, match="buffer that `store` filled"):
        prefill(step.query[..., :16], layer.cache, layer.table, *step.integers, SCALE, step.query.new_empty(33, 4, 64))
    with pytest.raises(ValueError, match="pass a dense tensor"):
        run(layer, step, step.query.new_empty(33, 64, 4).mT)
    with pytest.raises(ValueError, match="must be the same one of"):
        run(layer, step, step.query.new_empty(33, 4, 64, dtype=HALF))
    with pytest.raises(ValueError, match="pad the pages"):
        layer.memory = layer.memory.flatten()[: 80 * 2050].view(80, 2050)
        prefill(step.query, layer.cache, layer.table, *step.integers, SCALE, step.query.new_empty(33, 4, 64))
