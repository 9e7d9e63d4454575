# SPDX-License-Identifier: Apache-2.0
"""Every byte of a page belongs to one region at most, and the declared bytes are those of the regions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mkv_kernels.layout import (
    ALIGNMENT,
    BLOCK,
    SCALE_BYTES,
    WIDTHS,
    PageLayout,
    check_block_size,
    check_widths,
    side_bytes,
    uniform_widths,
)

block_widths = st.lists(st.sampled_from(WIDTHS), min_size=4, max_size=4).map(lambda w: tuple(sorted(w, reverse=True)))
group_widths = st.tuples(block_widths, block_widths)


def spans(layout: PageLayout) -> list[tuple[int, int]]:
    """(offset, bytes) of every region and every row of scales."""
    found = []
    for group in layout.groups:
        for side in (group.key, group.value):
            for region in side.regions:
                bits = 8 * layout.itemsize if region.width == 16 else region.width
                found.append((region.offset, layout.block_size * region.size * bits // 8))
            if side.scale_offset is not None:
                found.append((side.scale_offset, layout.block_size * SCALE_BYTES))
    return sorted(found)


@settings(deadline=None)
@given(
    widths=st.lists(group_widths, min_size=1, max_size=5).map(tuple),
    block_size=st.sampled_from([1, 2, 8, 16, 32, 64, 128]),
    itemsize=st.sampled_from([2, 4]),
)
def test_regions_are_apart_aligned_and_within_the_page(widths, block_size, itemsize):
    layout = PageLayout(widths, block_size, itemsize)
    end = 0
    for offset, size in spans(layout):
        assert offset % ALIGNMENT == 0
        assert offset >= end
        end = offset + size
    assert end <= layout.content_bytes <= layout.page_bytes
    assert layout.bytes_per_token % itemsize == 0
    dense = sum(side_bytes(side, itemsize) for group in widths for side in group)
    if block_size >= 16:
        assert layout.content_bytes == dense * block_size


@settings(deadline=None)
@given(widths=st.lists(group_widths, min_size=1, max_size=6).map(tuple))
def test_runs_cover_every_group_at_its_own_offset(widths):
    layout = PageLayout(widths, 16, 2)
    seen = []
    for run in layout.runs:
        for position, group in enumerate(run.groups):
            seen.append(group)
            assert layout.groups[group].offset == run.first.offset + position * run.stride
            assert layout.widths[group] == layout.widths[run.groups[0]]
    assert sorted(seen) == list(range(len(widths)))


def test_ranks_and_regions_of_a_tiered_side():
    layout = PageLayout((((16, 4, 4, 0), (8, 2, 0, 0)),), 16, 2)
    key, value = layout.groups[0].key, layout.groups[0].value
    assert [(r.width, r.start, r.size) for r in key.regions] == [(16, 0, 16), (4, 16, 32)]
    assert key.rank == 48 and value.rank == 32
    assert key.scale_offset is not None
    assert layout.bytes_per_token == 16 * 2 + 32 // 2 + 1 + 16 + 16 // 4 + 1


def test_padding_raises_what_is_declared_and_moves_nothing():
    widths = uniform_widths(2, 32, 16, 64)
    plain, padded = PageLayout(widths, 16, 2), PageLayout(widths, 16, 2, padded_bytes_per_token=400)
    assert padded.bytes_per_token == 400 > plain.bytes_per_token
    assert spans(padded) == spans(plain)


@pytest.mark.parametrize(
    ("widths", "message"),
    [((16, 16), "2 block widths"), ((16, 16, 16, 3), "not all among"), ((16, 0, 16, 0), "increase")],
)
def test_widths_that_are_none_are_refused(widths, message):
    with pytest.raises(ValueError, match=message):
        check_widths(widths, 4 * BLOCK)


def test_block_sizes_that_kernels_do_not_serve_are_refused():
    widths = uniform_widths(1, 16, 16, 64)
    for block_size in (16, 48, 128):
        check_block_size(PageLayout(widths, block_size, 2))
    for block_size in (8, 24):
        with pytest.raises(ValueError, match=f"pages of {block_size} tokens; .* multiple of 16"):
            check_block_size(PageLayout(widths, block_size, 2))
