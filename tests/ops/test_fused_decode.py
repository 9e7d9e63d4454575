# SPDX-License-Identifier: Apache-2.0
"""The decode kernel against float64 and its twin, on caches that are full of NaN."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mkv_kernels.fused import combine, launch
from mkv_kernels.fused import decode as module
from mkv_kernels.fused.decode import DecodeWorkspace, decode
from mkv_kernels.fused.splits import choose_splits, visible_tokens
from mkv_kernels.fused.table import SideShape, tier_sizes
from mkv_kernels.layout import PageLayout

SCALE = 0.2
LENGTHS = (1, 15, 16, 17, 63)
HALF = torch.float16


def run(layer, step, **options):
    return layer.decode(step, **options)


# Uneven ranks of 16, 48, 112, 128 and the full width; tiers alone, together, and another in every group.
SHAPES = {
    "uneven-ranks": ([("16x4", "16x1"), ("16x1", "16x4"), ("16x3", "16x3"), ("16x1", "16x1")], {}, 5),
    "j2-heads7-d64": ([("16x7", "16x3"), ("16x1", "16x8")], {"J": 2, "M": 7, "dtype": HALF}, 3),
    "j4-heads1-d96": ([("16x7", "16x24"), ("16x1", "16x3")], {"J": 4, "M": 1, "d": 96}, 2),
    "j8-heads1-d128": (
        [("16x1 8x2 4x12 2x8", "8x1 4x6 2x8")],
        {"J": 8, "M": 1, "d": 128, "block_size": 32},
        1,
    ),
    "head-256": ([("16x1", "16x16"), ("16x16", "16x1")], {"M": 1, "d": 256, "block_size": 128}, 1),
    "folded-d96": (
        [("16x1 4x2", "16x1 4x2 2x1"), ("4x6", "4x1")],
        {"M": 7, "d": 96, "fold_up": True},
        2,
    ),
    "8-bits": ([("8x4", "8x3"), ("8x1", "8x4")], {"block_size": 64}, 2),
    "4-bits": ([("4x4", "4x3"), ("4x1", "4x4")], {"dtype": HALF}, 2),
    "2-bits": ([("2x4", "2x3"), ("2x1", "2x4")], {"M": 8}, 2),
    "all-tiers": ([("16x1 8x2 4x3 2x1", "16x2 8x1 4x1 2x2"), ("2x1", "16x8")], {"J": 2, "dtype": HALF}, 4),
    "a-tier-each": ([("16x2", "2x2"), ("8x3", "4x1"), ("4x2", "8x1"), ("2x4", "16x1")], {"M": 1}, 2),
    "nothing-stored": ([("", "4x4"), ("16x1", ""), ("", "")], {}, 2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_errs_no_more_than_its_twin(make_layer, shape):
    groups, settings, num_splits = SHAPES[shape]
    layer = make_layer(*groups, **settings)
    step = layer.step(LENGTHS, [1] * len(LENGTHS))
    layer.check(run(layer, step, num_splits=num_splits), step)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter's bfloat16 is not that of a GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16(make_layer, shape):
    groups, settings, num_splits = SHAPES[shape]
    layer = make_layer(*groups, **settings | {"dtype": torch.bfloat16})
    step = layer.step(LENGTHS, [1] * len(LENGTHS))
    layer.check(run(layer, step, num_splits=num_splits), step)


@pytest.mark.parametrize("num_splits", [1, 8, 80])
def test_long_contexts(make_layer, num_splits):
    block_size = 16 if num_splits == 1 else 128
    layer = make_layer(("16x1 4x2", "8x1 2x3"), ("16x4", "16x4"), block_size=block_size)
    step = layer.step([1000, 3], [1, 1])
    layer.check(run(layer, step, num_splits=num_splits), step)


@pytest.mark.parametrize(("J", "M", "queries"), [(1, 4, (3, 1, 5)), (2, 8, (2, 2, 2)), (1, 7, (16, 4, 9))])
def test_speculative_queries_and_padding(make_layer, J, M, queries):
    layer = make_layer(("16x1 4x2", "8x1 2x2"), ("4x4", "16x2"), J=J, M=M, dtype=HALF)
    # Requests without a token stand for the padding of a CUDA graph.
    step = layer.step([70, 4, 33], queries, padding=2)
    layer.check(run(layer, step, max_queries=max(queries), num_splits=2), step)


@pytest.mark.parametrize(
    ("J", "dtype", "queries"), [(1, torch.float32, (1, 3, 2, 4)), (2, HALF, (1, 1, 1, 1)), (2, HALF, (1, 4, 1, 3))]
)
@pytest.mark.parametrize(("window", "soft_cap"), [(1, 0.0), (5, 1.0), (16, 0.0), (100, 0.5), (1000, 0.0), (0, 1.0)])
def test_windows_and_soft_caps(make_layer, window, soft_cap, J, dtype, queries):
    groups = ("16x1 4x2", "8x1 2x2"), ("4x4", "16x2")
    layer = make_layer(*groups, J=J, dtype=dtype, window=window, soft_cap=soft_cap)
    step = layer.step((1, 17, 130, 260), queries, padding=1)
    for num_splits in (1, 4):
        layer.check(found := run(layer, step, max_queries=max(queries), num_splits=num_splits), step)
    if window:
        assert layer.poison_before_windows(step) or window == 1000
        again = run(layer, step, max_queries=max(queries), num_splits=num_splits)
        assert torch.equal(again, found), "something before a window was read"


def test_a_soft_cap_of_scores_that_are_far_beyond_it(make_layer):
    layer = make_layer(("16x1 4x2", "8x1 2x2"), soft_cap=2.0)
    step = layer.step((63,), (1,))
    step.query.mul_(1e6)
    torch.testing.assert_close(run(layer, step).double(), layer.expected(step), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fold_up", [False, True])
@pytest.mark.parametrize("num_splits", [1, 3, 12])
def test_tokens_of_no_request_get_the_mean(make_layer, fold_up, num_splits):
    """What lies where their splits would be is of an earlier launch, or was never written."""
    layer = make_layer(("16x1 4x2", "8x1 2x2"), ("4x4", "16x2"), J=1, dtype=HALF, fold_up=fold_up)
    step = layer.step([70, 4], [1, 1])
    expected = run(layer, step, num_splits=num_splits)
    padded = dataclasses.replace(step, query=torch.cat([step.query, step.query]))
    for poison in (1e30, float("inf"), float("nan")):
        found = run(layer, padded, num_splits=num_splits, poison=poison)
        assert torch.equal(found[:2], expected)
        mean = layer.table.value_mean.reshape(-1, layer.d).repeat_interleave(layer.M, 0)
        assert torch.equal(found[2:], mean.to(HALF).expand(2, -1, -1))


def test_a_request_does_not_depend_on_its_neighbours(make_layer):
    layer = make_layer(("16x1 4x2", "8x1 2x2"), ("4x4", "16x2"))
    step = layer.step([33, 100], [1, 1])
    together = run(layer, step, num_splits=2)
    step.query, step.block_table, step.seq_lens = step.query[:1], step.block_table[:1], step.seq_lens[:1]
    step.query_start_loc = step.query_start_loc[:2]
    assert torch.equal(run(layer, step, num_splits=2), together[:1])


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_row_alone(make_layer, dtype, value):
    layer = make_layer(("8x1 4x2", "4x3"), ("4x2 2x2", "8x1 2x2"), dtype=dtype, fold_up=True)
    step = layer.step((40,), (1,))
    before = run(layer, step, num_splits=2)
    step.query[0, 1, 0, 2, 3] = value
    found = run(layer, step, num_splits=2)
    row = layer.M + 2
    assert not found[0, row].isfinite().any()
    others = [head for head in range(layer.num_heads) if head != row]
    assert torch.equal(found[0, others], before[0, others])


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
    queries = [draw(st.integers(1, min(4, length))) for length in lengths]
    return tuple(widths), shape, lengths, queries, draw(st.sampled_from([1, 2, 4])), draw(st.integers(0, 99))


# Shrinking would take minutes in the interpreter; cases are small as they are.
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(case=layers())
def test_any_layer(make_layer, case):
    widths, shape, lengths, queries, num_splits, seed = case
    layer = make_layer(widths=widths, **shape, seed=seed)
    step = layer.step(lengths, queries)
    layer.check(run(layer, step, max_queries=max(queries), num_splits=num_splits), step)


def test_splits_depend_on_shapes_alone_and_fill_the_device(make_layer):
    layer = make_layer(("16x4", "16x4"), ("16x1", "16x1"))
    assert choose_splits(layer.table, 100, 1 << 17, 132) == 2
    assert choose_splits(layer.table, 1, 1 << 17, 132) == 256
    assert choose_splits(layer.table, 1, 300, 132) == 1
    assert visible_tokens(5000, 1, 0) == 5000 and visible_tokens(100, 4, 512) == 100
    assert choose_splits(layer.table, 1, visible_tokens(1 << 17, 4, 512), 132) == 2
    assert choose_splits(layer.table, 88, 1 << 17, 132) == 3
    assert choose_splits(layer.table, 14, 1 << 17, 132) == 16
    programs = layer.table.work[3].tolist()
    assert programs == [[group, split, 3, rank] for group, rank in ((0, 64), (1, 16)) for split in range(3)], (
        "the group with most bytes is first"
    )


@pytest.mark.parametrize("length", [40, 2048, 4500])
def test_values_that_keep_their_excess(make_layer, monkeypatch, length):
    """As bfloat16's do on GPUs: subtracted every 2048 tokens, and behind the last."""
    monkeypatch.setattr(launch.Target, "raises_values", lambda self, dtype: True)
    layer = make_layer(("16x1 4x1", "8x1 4x1 2x1"), M=8, block_size=128, dtype=HALF)
    step = layer.step([length, 17], [1, 1])
    layer.check(run(layer, step, num_splits=1), step)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_launches_allocate_nothing(make_layer, monkeypatch, dtype):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(str(function))
            return function(*args, **(kwargs or {}))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    layer = make_layer(("16x1 4x2", "8x1 2x2"), dtype=dtype)
    step = layer.step([33], [1])
    workspace = DecodeWorkspace.make(layer.table, 1, layer.num_heads, 2)
    output, cache, seen = step.query.new_empty(1, layer.num_heads, 64), layer.cache, set()
    monkeypatch.setattr(module, "_attend_kernel", Kernel())
    monkeypatch.setattr(module, "_attend_codes_kernel", Kernel())
    monkeypatch.setattr(combine, "_combine_kernel", Kernel())
    monkeypatch.setattr(combine, "_up_kernel", Kernel())
    with Recorder():
        decode(step.query, cache, layer.table, *step.integers, SCALE, output, workspace, max_queries=1, num_splits=2)
    assert seen <= {"aten.view.dtype", "aten.detach.default"}


def test_errors_name_the_mend(make_layer):
    layer = make_layer(("16x4", "16x4"), ("16x1", "16x1"))
    step = layer.step([33], [1])
    with pytest.raises(ValueError, match=r"9 splits; take one of \(1, 2, 3, .*224, 256\)"):
        run(layer, step, num_splits=9, reserved=10)
    with pytest.raises(ValueError, match="prefill any number"):
        run(layer, step, max_queries=17)
    with pytest.raises(ValueError, match="workspace's partial"):
        run(layer, step, num_splits=8, reserved=1)
    workspace = DecodeWorkspace(*(torch.zeros(1 << 16, dtype=layer.dtype).bfloat16() for _ in range(2)))
    output = torch.zeros(1, layer.num_heads, layer.d, dtype=layer.dtype)
    with pytest.raises(ValueError, match=r"workspace's partial is torch\.bfloat16; it should be torch\.float32"):
        decode(
            step.query, layer.cache, layer.table, *step.integers, SCALE, output, workspace, max_queries=1, num_splits=1
        )
    layer.window = -1
    with pytest.raises(ValueError, match=r"a window of -1 .*pass 0 for none"):
        run(layer, step)
    layer.window = 0
    step.seq_lens = step.seq_lens.long()
    with pytest.raises(ValueError, match=r"seq_lens is torch\.int64"):
        run(layer, step)


@pytest.mark.parametrize("widths", [(8,) * 128, (8,) * 65 + (4,) * 63, (2,) * 128, (16,) * 128])
def test_the_largest_groups_have_tiles(widths):
    """As of 8 KV heads of 256; tiles have room for every tier and are not much larger."""
    side = PageLayout(((widths, widths),), 16, 2).groups[0].key
    for words in (8, 16, 32):
        shape = SideShape.of([side], 256, words)
        for size, chunk, tiles in zip(tier_sizes(side), shape.chunks, shape.tiles, strict=True):
            assert size <= chunk * tiles <= 1.5 * size + words


def test_wider_tiers_are_refused():
    side = PageLayout((((8,) * 130, (2,) * 130),), 16, 2).groups[0].key
    with pytest.raises(ValueError, match=r"2080 coordinates of 8 bits .* up to 2048: .*\(--group-heads\)"):
        SideShape.of([side], 256)
