# SPDX-License-Identifier: Apache-2.0
"""Prefill over expanded pages against float64 and the twin, on caches that are full of NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mkv_kernels.fused.expand import Expansion, expand
from mkv_kernels.fused.prefill import prefill
from mkv_kernels.pages import view_pages

SCALE = 0.2
HALF = torch.float16
SEQ_LENS, QUERIES = (63, 17, 100, 16, 1, 90), (63, 2, 41, 15, 1, 1)
SHAPES = {
    "ranks-j2": ([("16x7", "16x3"), ("16x1", "16x8")], {"J": 2, "M": 7, "dtype": HALF}),
    "ranks-j4-d96": ([("16x7", "16x24"), ("16x1", "16x3")], {"J": 4, "M": 1, "d": 96, "block_size": 128}),
    "tiers-j8-d128": ([("16x1 8x2 4x12 2x8", "8x1 4x6 2x8")], {"J": 8, "M": 1, "d": 128, "block_size": 32}),
    "tiers-j2": ([("16x1 8x2 4x3 2x1", "16x2 8x1 4x1 2x2"), ("2x1", "16x8")], {"J": 2, "dtype": HALF}),
    "folded-d96": ([("16x1 4x2", "16x1 4x2 2x1"), ("4x6", "4x1")], {"M": 4, "d": 96, "fold_up": True}),
    "a-tier-each": ([("16x2", "2x2"), ("8x3", "4x1"), ("4x2", "8x1"), ("2x4", "16x1")], {"M": 1}),
    "all-tiers": ([("16x1 8x1 4x1 2x1", "16x1 8x1 4x1 2x1"), ("2x1", "16x4")], {"dtype": HALF}),
    "nothing-stored": ([("", "4x4"), ("16x1", ""), ("", "")], {}),
}


def run(layer, step, queries):
    """Attention through expanded pages, which lie in another order and full of NaN."""
    expansion, block_size = Expansion.of(layer.table), layer.layout.block_size
    pages = -(-step.seq_lens // block_size)
    order = torch.arange(int(pages.sum()), dtype=torch.int32, device=pages.device).flip(0)
    table = torch.zeros(len(pages), int(pages.max()), dtype=torch.int32, device=pages.device)
    for request, (first, count) in enumerate(zip((pages.cumsum(0) - pages).tolist(), pages.tolist(), strict=True)):
        table[request, :count] = order[first : first + count]
    numbers = torch.full((len(order), expansion.numbers_per_block()), float("nan"), dtype=layer.dtype)
    expanded = numbers.to(pages.device).view(len(order), 1, block_size, -1)
    longest = int(step.seq_lens.max())
    expand(
        layer.cache, layer.table, expansion, step.block_table, step.seq_lens, expanded, table, max_seq_len=longest + 70
    )
    output = torch.full(
        (len(step.query), layer.num_heads, layer.d), float("nan"), dtype=layer.dtype, device=pages.device
    )
    query = queries if expansion.own_queries else step.query
    prefill(query, expanded, expansion.table, table, step.seq_lens, step.query_start_loc, SCALE, output)
    return output


def with_queries(layer, step):
    """A step whose q' are a model's queries times B: the step, with q' in float64, and those queries."""
    T, d = len(step.query), layer.d
    queries = torch.randn(T, layer.G * layer.J, 1, layer.M, d, device=step.query.device).to(layer.dtype)
    projected = torch.einsum(
        "tgjmd,gjrd->tgjmr",
        queries.view(T, layer.G, layer.J, layer.M, d).double(),
        layer.table.query_up.double(),
    )
    exact = step.query.double()
    for group in layer.layout.groups:
        rank = group.key.rank
        # Half as large scores as the codes' half steps would give.
        exact[:, group.group, ..., :rank] = projected[:, group.group, ..., :rank] / 2
    return replace(step, query=exact), queries / 2


def check(layer, step):
    exact, queries = with_queries(layer, step)
    step = replace(exact, query=exact.query.to(layer.dtype))
    layer.check(run(layer, step, queries), step, exact if layer.J > 1 else None)


@pytest.mark.parametrize("shape", SHAPES)
def test_errs_no_more_than_the_twin(make_layer, shape):
    groups, settings = SHAPES[shape]
    layer = make_layer(*groups, **settings)
    check(layer, layer.step(SEQ_LENS, QUERIES))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter's bfloat16 is not that of a GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16(make_layer, shape):
    groups, settings = SHAPES[shape]
    layer = make_layer(*groups, **settings | {"dtype": torch.bfloat16})
    check(layer, layer.step(SEQ_LENS, QUERIES))


def test_ranks_of_one_head_are_left_as_they_are(make_layer):
    assert Expansion.of(make_layer(("16x3", "16x2")).table) is None
    assert Expansion.of(make_layer(("16x3", "16x2"), J=2).table) is not None
    assert Expansion.of(make_layer(("8x3", "16x2")).table) is not None


@pytest.mark.parametrize(("J", "large"), [(1, 1000.0), (2, 1e5)])
def test_outliers_of_half_precision_saturate_and_no_number_shows(make_layer, J, large):
    layer = make_layer(("8x2", "8x2"), dtype=torch.float16, J=J)
    step = layer.step([40], [40])
    page, place = view_pages(layer.cache, layer.layout)[0], step.block_table[0, :1].long()
    for factor in (large, float("nan")):
        outlier = factor * torch.randn(1, 1, 32, device=place.device)
        page.value.write(place, torch.tensor([5], device=place.device), outlier)
        assert run(layer, step, with_queries(layer, step)[1]).isfinite().all() == (factor == large)


def test_errors_name_the_mend(make_layer):
    layer = make_layer(("8x3", "16x2"))
    step, expansion = layer.step([33], [33]), Expansion.of(layer.table)
    expanded = torch.zeros(3, 1, 16, expansion.numbers_per_block() // 16)
    arguments = layer.cache, layer.table, expansion, step.block_table, step.seq_lens
    table = torch.arange(3, dtype=torch.int32)[None]
    expanded, table = expanded.to(step.query.device), table.to(step.query.device)
    other = Expansion.of(make_layer(("8x3", "16x2"), block_size=32).table)
    with pytest.raises(ValueError, match="the expansion is of another layer"):
        expand(layer.cache, layer.table, other, step.block_table, step.seq_lens, expanded, table, max_seq_len=33)
    with pytest.raises(ValueError, match="its pages should be"):
        expand(*arguments, expanded[..., :-8].contiguous(), table, max_seq_len=33)
    with pytest.raises(ValueError, match="expanded_table is torch"):
        expand(*arguments, expanded, table.long(), max_seq_len=33)
    with pytest.raises(ValueError, match="2 rows of expanded_table"):
        expand(*arguments, expanded, table.expand(2, 3), max_seq_len=33)
