# SPDX-License-Identifier: Apache-2.0
"""Pages of requests with many queries, as pages that prefill attends to fast: numbers of 16 bits, of one head each.

Unpacking codes, and products in the latent space of several heads, cost a tile of queries as much as they cost all of
them. So they are done once, and prefill reads what came of it: at `J` = 1 the same latent vectors, in the model's
dtype; at `J` > 1 every head's own keys and values, `k' B^T` and `v' D`, which the model's own queries meet. That costs
`2 L R d` products per head, key or value, for L cached tokens; attending to latent vectors instead, every query costs
`2 L (R - d)` more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from mkv_kernels.fused import launch
from mkv_kernels.fused.ahead import on
from mkv_kernels.fused.splits import work_of
from mkv_kernels.fused.table import (
    SIDE_FIELDS,
    LayerTable,
    Shapes,
    SideShape,
    power_of_two,
    regions_of,
)
from mkv_kernels.fused.tile import load_scales, load_tile, scales_of, tier_of
from mkv_kernels.fused.unpack import unpacked
from mkv_kernels.layout import PageLayout, uniform_widths

TOKENS = 64
"""Of a program; half as many before Hopper, whose registers do not suffice."""


@triton.jit
def _saturated(x, LARGEST: tl.constexpr):
    """As what the store keeps in 16 bits. Comparisons let NaN pass."""
    if LARGEST > 0:
        x = tl.where(x > LARGEST, LARGEST, x)
        x = tl.where(x < -LARGEST, -LARGEST, x)
    return x


@triton.jit
def _side(
    pages,
    strides,
    block_table,
    out,
    region,
    up,
    start,
    last,
    BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr,
    PTX: tl.constexpr,
    SIDE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    LARGEST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One side of N tokens: x, or x W for one head. Shapes: out [N] pointers to rows, up a pointer to W [R, d]."""
    DTYPE: tl.constexpr = pages[0].dtype.element_ty
    CODED: tl.constexpr = SIDE[0][1] + SIDE[0][2] + SIDE[0][3] > 0
    n = start + tl.arange(0, N)
    block = tl.load(block_table + tl.minimum(n, last - 1) // BLOCK_SIZE).to(tl.int64)
    slot = n % BLOCK_SIZE
    page = pages[1] + block * strides[1]
    places = (pages[0] + block * strides[0], tl.minimum(n, last - 1) % BLOCK_SIZE, page + slot)
    scale = tl.full([N], 1.0, dtype=tl.float32)
    if CODED:
        scale = tl.where(n < last, scales_of(load_scales(page, slot, region), N), 0.0)
    i_d = tl.arange(0, D_PADDED)
    exact = tl.zeros([N, D_PADDED], dtype=tl.float32)
    coded = tl.zeros([N, D_PADDED], dtype=tl.float32)
    for tier in tl.static_range(4):
        if SIDE[0][tier] > 0:
            _, size, begin = tier_of(region, tier)
            for tile in tl.static_range(0 + SIDE[1][tier]):
                x = load_tile(places, region, SIDE, tier, tile, BLOCK_SIZE, False)
                col = tile * SIDE[0][tier] + tl.arange(0, SIDE[0][tier])
                for part in tl.static_range(1 << tier):
                    numbers = x
                    if tier > 0:
                        numbers = unpacked(x, part, 16 >> tier, DTYPE, PTX, False)
                    at = begin + part * size + col
                    if HEADS == 1:
                        if tier > 0:
                            numbers = _saturated(numbers.to(tl.float32) * scale[:, None], LARGEST).to(DTYPE)
                        mask = (n < last)[:, None] & (col < size)[None, :]
                        tl.store(out[:, None] + at[None, :], numbers, mask=mask)
                    else:
                        b_up = tl.load(
                            up + at[:, None] * D + i_d[None, :],
                            mask=(col < size)[:, None] & (i_d < D)[None, :],
                            other=0.0,
                        ).to(DTYPE)  # [C, D]
                        if tier == 0:
                            exact = tl.dot(numbers, b_up, exact, input_precision=PRECISION)
                        else:
                            coded = tl.dot(numbers, b_up, coded, input_precision=PRECISION)
    if HEADS > 1:
        if CODED:
            exact += coded * scale[:, None]
        exact = _saturated(exact, LARGEST)
        tl.store(out[:, None] + i_d[None, :], exact.to(DTYPE), mask=(n < last)[:, None] & (i_d < D)[None, :])


# Numbers, and places of requests in a batch, that change from step to step must not each compile a kernel.
@triton.jit(
    do_not_specialize=["stride_table", "stride_out_table"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "out_table_ptr"],
)
def _expand_kernel(
    cache_ptr,
    words_ptr,
    out_ptr,
    block_table_ptr,
    seq_lens_ptr,
    out_table_ptr,
    regions_ptr,
    out_regions_ptr,
    key_up_ptr,
    value_up_ptr,
    stride_cache,
    stride_words,
    stride_out,
    stride_table,
    stride_out_table,
    rank_k,
    rank_v,
    BLOCK_SIZE: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    FIELDS: tl.constexpr,
    N: tl.constexpr,
    PTX: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    LARGEST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Shapes: key_up [G, J, Rk, d], value_up [G, J, Rv, d]."""
    head, request = tl.program_id(1) // 2, tl.program_id(2)
    group = head // GROUP_HEADS
    last = tl.load(seq_lens_ptr + request)
    start = tl.program_id(0) * N
    if start < last:
        n = start + tl.arange(0, N)
        # Behind the last token nothing is written.
        block = tl.load(out_table_ptr + request * stride_out_table + tl.minimum(n, last - 1) // BLOCK_SIZE)
        out = out_ptr + block.to(tl.int64) * stride_out
        table = block_table_ptr + request.to(tl.int64) * stride_table
        region = regions_ptr + group * (2 * FIELDS)
        out_region = out_regions_ptr + head * (2 * FIELDS)
        if tl.program_id(1) % 2 == 0:
            offset, size, _ = tier_of(out_region, 0, cache_ptr.dtype.element_ty.primitive_bitwidth)
            _side(
                (cache_ptr, words_ptr), (stride_cache, stride_words), table, out + (offset + n % BLOCK_SIZE * size),
                region, key_up_ptr + head.to(tl.int64) * rank_k * D, start, last,
                BLOCK_SIZE, N, PTX, KEY, D, D_PADDED, GROUP_HEADS, LARGEST, PRECISION,
            )  # fmt: skip
        else:
            offset, size, _ = tier_of(out_region + FIELDS, 0, cache_ptr.dtype.element_ty.primitive_bitwidth)
            _side(
                (cache_ptr, words_ptr), (stride_cache, stride_words), table, out + (offset + n % BLOCK_SIZE * size),
                region + FIELDS, value_up_ptr + head.to(tl.int64) * rank_v * D, start, last,
                BLOCK_SIZE, N, PTX, VALUE, D, D_PADDED, GROUP_HEADS, LARGEST, PRECISION,
            )  # fmt: skip


@dataclass(frozen=True)
class Expansion:
    """Of a layer; `table` is what prefill takes with expanded pages.

    own_queries: prefill takes the model's own queries, [T, H, 1, M, d], rather than q'.
    value: of the pages that are expanded, in tiles that a product can sum over.
    """

    table: LayerTable
    own_queries: bool
    value: SideShape

    @classmethod
    def of(cls, table: LayerTable) -> Expansion | None:
        """None for layers whose own pages prefill reads as fast."""
        layout, J, d = table.layout, table.group_heads, table.head_size
        if J == 1 and not table.shapes.coded:
            return None
        value = SideShape.of([group.value for group in layout.groups], d)
        if J == 1:
            widths = tuple((_exact(group.key.widths), _exact(group.value.widths)) for group in layout.groups)
            expanded = PageLayout(widths, layout.block_size, layout.itemsize)
            made = replace(table, layout=expanded, **_of_layout(expanded, table))
            return cls(made, own_queries=False, value=value)
        heads = table.num_groups * J
        expanded = PageLayout(uniform_widths(heads, d, d, d), layout.block_size, layout.itemsize)
        made = replace(
            table,
            layout=expanded,
            group_heads=1,
            key_shift=table.key_shift.new_zeros(heads, d),
            value_shift=table.value_shift.new_zeros(heads, d),
            value_up=None,
            value_mean=table.value_mean.reshape(heads, 1, d),
            **_of_layout(expanded, table),
        )
        return cls(made, own_queries=True, value=value)

    def numbers_per_block(self) -> int:
        """That a block of expanded pages holds, in the model's dtype."""
        layout = self.table.layout
        return layout.block_size * layout.bytes_per_token // layout.itemsize


def _exact(widths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(16 if width else 0 for width in widths)


def _of_layout(layout: PageLayout, table: LayerTable) -> dict[str, Any]:
    device, d = table.regions.device, table.head_size
    return {
        "shapes": Shapes.of(layout.groups, d),
        "regions": regions_of(layout, device),
        # Of prefill; nothing decodes over expanded pages.
        "work": work_of(layout, device, splits=(1,)),
    }


def expand(
    cache: torch.Tensor,
    table: LayerTable,
    expansion: Expansion,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    expanded: torch.Tensor,
    expanded_table: torch.Tensor,
    *,
    max_seq_len: int,
) -> None:
    """Writes all cached tokens of requests to pages of `expansion.table`'s layout.

    Args:
        max_seq_len: at least the longest request's.

    Shapes:
        cache: [num_blocks, 1, block_size, bytes_per_token / itemsize]
        block_table: [B, blocks] int32
        seq_lens: [B] int32, cached tokens of every request
        expanded: [blocks, 1, block_size, bytes_per_token / itemsize] of the expanded layout
        expanded_table: [B, blocks] int32, where its pages go in `expanded`
    """
    pages, to = launch.check_expansion(cache, table, block_table, seq_lens, expanded, expansion.table, expanded_table)
    num_requests, J, d = seq_lens.shape[0], table.group_heads, table.head_size
    if num_requests == 0 or max_seq_len == 0:
        return
    target = launch.Target.of(_expand_kernel)
    tokens = TOKENS // 2 if target.generation == 8 else TOKENS
    on(_expand_kernel, (triton.cdiv(max_seq_len, tokens), 2 * table.num_groups * J, num_requests))(
        *pages.pages,
        to.pages[0],
        block_table,
        seq_lens,
        expanded_table,
        table.regions,
        expansion.table.regions,
        table.query_up,
        table.query_up if table.value_up is None else table.value_up,
        *pages.strides,
        to.strides[0],
        block_table.stride(0),
        expanded_table.stride(0),
        table.rank_k,
        table.rank_v,
        BLOCK_SIZE=table.layout.block_size,
        GROUP_HEADS=J,
        FIELDS=SIDE_FIELDS,
        N=tokens,
        PTX=target.unpacks_in_ptx(cache.dtype),
        KEY=table.shapes.key.constants,
        VALUE=expansion.value.constants,
        D=d,
        D_PADDED=power_of_two(d),
        LARGEST=torch.finfo(torch.float16).max if cache.dtype == torch.float16 else 0.0,
        PRECISION=launch.precision(cache.dtype),
        num_warps=8 if J > 1 else 4,
    )
