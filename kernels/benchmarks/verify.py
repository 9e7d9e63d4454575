# SPDX-License-Identifier: Apache-2.0
"""A kernel against its PyTorch twin at the very shape that is timed.

The twin computes twice: in the kernel's dtype, and, from the same pages, in float32. A kernel passes whose error
against the latter is at most twice that of the former, plus a rounding; in the mean and at the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.layer import Layer, Requests
from mkv_kernels.attend import attend
from mkv_kernels.codes import decode, multipliers
from mkv_kernels.pages import SidePages, view_pages
from mkv_kernels.schedule import make_buckets
from mkv_kernels.store import project_and_store

MAX_CHECKED_SCORES = {True: 1 << 17, False: 1 << 24}
"""Scores per query head that the twin computes at once, for one query per request and for more: bounds the pages that
it gathers at full width."""
MAX_OTHER_CODES = 0.02
"""Bytes of codes that may differ from the twin's: coordinates within a rounding of the edge of a level."""

Comparison = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Found, by the twin in the same dtype, and by the twin in float32."""


@dataclass(frozen=True)
class Errors:
    """Against the twin in float32."""

    largest: float
    mean: float
    twin_largest: float
    twin_mean: float
    passed: bool
    other_codes: float = 0.0


def compare(comparisons: list[Comparison], dtype: torch.dtype) -> Errors:
    eps = torch.finfo(dtype).eps
    # The mean of a rounding to 16 bits. In float32 the twin is its own measure: what counts is how sums are rounded.
    mean_rounding = eps if dtype == torch.float32 else eps / 4
    largest = mean = twin_largest = twin_mean = count = 0.0
    passed = True
    for found, plain, exact in comparisons:
        if not exact.numel():
            continue
        error, bound, size = ((x.float() - exact).abs() for x in (found, plain, torch.zeros_like(exact)))
        passed &= bool(error.mean() <= 2 * bound.mean() + mean_rounding * size.mean())
        passed &= bool(error.max() <= 2 * bound.max() + 4 * eps * size.max())
        # torch.maximum keeps NaN, as max() of Python need not.
        largest = float(torch.maximum(error.max(), error.new_tensor(largest)))
        twin_largest = max(twin_largest, float(bound.max()))
        mean, twin_mean = mean + float(error.sum()), twin_mean + float(bound.sum())
        count += exact.numel()
    return Errors(largest, mean / max(1, count), twin_largest, twin_mean / max(1, count), passed)


def twin_attention(layer: Layer, requests: Requests, query: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """In the dtype of q', from pages of the layer's."""
    output = torch.empty(len(query), layer.num_heads, layer.bases.head_size, dtype=query.dtype, device=query.device)
    table = requests.block_table
    decoding = len(query) == len(table)
    buckets = make_buckets(
        requests.query_start_loc.cpu(),
        requests.seq_lens.cpu(),
        table,
        layer.layout.block_size,
        query.dtype,
        MAX_CHECKED_SCORES[decoding],
    )
    attend(layer.by_run(query), view_pages(cache, layer.layout), layer.bases, buckets, layer.setting.scale, output)
    return output


def check_attention(
    layer: Layer,
    requests: Requests,
    query: torch.Tensor,
    cache: torch.Tensor,
    found: torch.Tensor,
    exact_query: torch.Tensor | None = None,
) -> Errors:
    """`exact_query` is q' in float32, where the kernel is not given the rounded one."""
    plain = twin_attention(layer, requests, query, cache)
    exact = twin_attention(layer, requests, query.float() if exact_query is None else exact_query, cache)
    worth = output_worth(layer)
    return compare([(found * worth, plain * worth, exact * worth)], query.dtype)


def output_worth(layer: Layer) -> torch.Tensor:
    """What the output's numbers are multiplied by, [H, d], so that no tier's error hides behind another's.

    Where D is folded into the weights, so are the half steps, and coordinates of 8 bits come out 34 times as large as
    those of 2.
    """
    worth = torch.ones(layer.num_heads, layer.bases.head_size)
    if layer.bases.runs[0].value_up is None:
        for group in layer.layout.groups:
            heads = slice(group.group * layer.query_heads, (group.group + 1) * layer.query_heads)
            worth[heads] = multipliers(group.value.widths)
    return worth.to(layer.setting.device)


def twin_store(
    layer: Layer, inputs: tuple[torch.Tensor, ...], cache: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    q, k, v = inputs
    return project_and_store(q, k, v, view_pages(cache, layer.layout), layer.bases, slots, None)


def check_store(
    layer: Layer,
    inputs: tuple[torch.Tensor, ...],
    slots: torch.Tensor,
    cache: torch.Tensor,
    projected: torch.Tensor,
) -> Errors:
    """q', and the coordinates that the pages give back, against those that were to be stored."""
    own = layer.new_cache(len(cache))
    twin_projected = twin_store(layer, inputs, own, slots)
    q, k, v = inputs
    T, J = len(q), layer.group_heads
    q_TGJMd = q.view(T, layer.num_groups, J, layer.query_heads, -1)
    k_TGn, v_TGn = (x.reshape(T, layer.num_groups, -1) for x in (k, v))
    comparisons: list[Comparison] = []
    differing = total = 0
    block, offset = slots // layer.layout.block_size, slots % layer.layout.block_size
    pages = zip(view_pages(cache, layer.layout), view_pages(own, layer.layout), strict=True)
    by_run = zip(layer.bases.runs, pages, layer.by_run(projected), twin_projected, strict=True)
    for run, (found, plain), run_projected, run_twin in by_run:
        groups = slice(None) if run.groups is None else run.groups
        exact_q = torch.einsum("tgjmd,gjdr->tgjmr", q_TGJMd[:, groups].float(), run.query_up)
        comparisons.append((run_projected, run_twin, exact_q))
        exact_k = torch.einsum("tgn,gnr->tgr", k_TGn[:, groups].float(), run.key_down) - run.key_shift
        exact_v = v_TGn[:, groups].float()
        if run.value_down is not None:
            exact_v = torch.einsum("tgn,gnr->tgr", exact_v, run.value_down)
        exact_v = exact_v[..., : run.rank_v] - run.value_shift
        for side, other, exact in ((found.key, plain.key, exact_k), (found.value, plain.value, exact_v)):
            stored = [_coordinates(pages_of_side, block, offset) for pages_of_side in (side, other)]
            comparisons.append((stored[0], stored[1], exact))
            for tier, twin_tier in zip(side.coded, other.coded, strict=True):
                codes, twin_codes = (x[block, :, offset].view(torch.uint8) for x in (tier, twin_tier))
                differing += int((codes != twin_codes).sum())
                total += twin_codes.numel()
    errors = compare(comparisons, q.dtype)
    other_codes = differing / max(1, total)
    passed = errors.passed and other_codes <= MAX_OTHER_CODES
    return Errors(errors.largest, errors.mean, errors.twin_largest, errors.twin_mean, passed, other_codes)


def _coordinates(side: SidePages, block: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """[S, G, R] float32, as worth: half steps included."""
    packed = [tier[block, :, offset] for tier in side.coded]
    scales = None if side.scales is None else side.scales[block, :, offset]
    x = decode(side.exact[block, :, offset], packed, scales, side.layout, torch.float32)
    return x * multipliers(side.layout.widths)[: side.layout.rank].to(x.device)
