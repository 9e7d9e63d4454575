# SPDX-License-Identifier: Apache-2.0
"""The part that decode and prefill share: query rows against a stretch of one request's tokens, in one latent group.

A tier of the 16-bit width enters the tensor cores as it is. Of the others, the odd integers do that their codes stand
for (see `codes`): no coordinate is multiplied by a scale, the token's scale multiplies its column of scores (keys) or
its probability (values). Half steps are in the bases.

Unpacking takes no shuffle: one part of a row's bytes, shifted and masked, gives neighbouring coordinates.

Legend: M query rows, N tokens, C coordinates or bytes of a row at once. A "region" is a side's row of `table.regions`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from mkv_kernels.fused.unpack import odd_integers, scale_values

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def tier_of(region, TIER: tl.constexpr, ALIGN: tl.constexpr):
    """Offset, size and first coordinate of a tier."""
    start = 0
    for before in tl.static_range(TIER):
        size = tl.load(region + 2 * before + 1)
        start += size if before == 0 else size * (1 << (before - 1))
    offset = tl.multiple_of(tl.load(region + 2 * TIER), ALIGN if TIER == 0 else 16)
    size = tl.multiple_of(tl.load(region + 2 * TIER + 1), 16 if TIER == 0 else ALIGN)
    return offset, size, tl.multiple_of(start, 16)


@triton.jit
def rank_of(region):
    """Coordinates of a side that are stored."""
    rank = tl.load(region + 1)
    for tier in tl.static_range(1, 4):
        rank += tl.load(region + 2 * tier + 1) * (1 << (tier - 1))
    return rank


@triton.jit
def token_scales(memory, page, slot, region, live):
    """[N], 0 for tokens that are not live and for groups without coded tiers, whatever lies there."""
    at = tl.load(region + 8) + slot * 0
    return scale_values(tl.load(memory + page + (at + slot), mask=live & (at >= 0), other=0))


@triton.jit
def load_queries(query, row_mask, region, KEY: tl.constexpr, SWAPPED: tl.constexpr):
    """q' of the rows by tier, tile and part, [M, C] each, or [C, M] where swapped, 0 beyond the group's rank.

    Shapes: query [M] pointers.
    """
    tiles = ()
    for tier in tl.static_range(4):
        if KEY[0][tier] > 0:
            _, size, begin = tier_of(region, tier, KEY[2][tier])
            for tile in tl.static_range(0 + KEY[1][tier]):
                col = tile * KEY[0][tier] + tl.arange(0, KEY[0][tier])
                for part in tl.static_range(1 if tier == 0 else 1 << (tier - 1)):
                    at = begin + part * size + col
                    if SWAPPED:
                        b_q = tl.load(
                            query[None, :] + at[:, None], mask=row_mask[None, :] & (col < size)[:, None], other=0.0
                        )
                    else:
                        b_q = tl.load(
                            query[:, None] + at[None, :], mask=row_mask[:, None] & (col < size)[None, :], other=0.0
                        )
                    tiles = tiles + (b_q,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def load_pages(pages, strides, block, slot, live, region, SIDE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """One side of N tokens by tier and tile, [N, C] or [C, N] each, 0 for tokens that are not live.

    Nothing is read beyond the group's rank. All of a side is loaded before any of it is used.
    """
    tiles = ()
    for tier in tl.static_range(4):
        if SIDE[0][tier] > 0:
            offset, size, _ = tier_of(region, tier, SIDE[2][tier])
            if tier == 0:
                rows = pages[0] + block * strides[0] + (offset + slot * size)
            else:
                rows = pages[1] + block * strides[1] + (offset + slot * size)
            for tile in tl.static_range(0 + SIDE[1][tier]):
                col = tile * SIDE[0][tier] + tl.arange(0, SIDE[0][tier])
                if TRANSPOSED:
                    b_x = tl.load(rows[None, :] + col[:, None], mask=(col < size)[:, None] & live[None, :], other=0)
                else:
                    b_x = tl.load(rows[:, None] + col[None, :], mask=live[:, None] & (col < size)[None, :], other=0)
                tiles = tiles + (b_x,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def no_values(M: tl.constexpr, VALUE: tl.constexpr):
    """Accumulators of a value side by tier, tile and part, [M, C] each."""
    acc = ()
    for tier in tl.static_range(4):
        for _ in tl.static_range(0 + VALUE[1][tier]):
            for _part in tl.static_range(1 if tier == 0 else 1 << (tier - 1)):
                # In triton 3.6 an element of a constexpr tuple is no constexpr; a sum with one is.
                acc = acc + (tl.zeros([M, 0 + VALUE[0][tier]], dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return acc


@triton.jit
def capped(s, SOFT_CAP: tl.constexpr):
    """SOFT_CAP tanh(s / SOFT_CAP) of scores, before and after times log2(e); nothing in it is beyond 1."""
    e = tl.exp2(tl.abs(s) * (-2.0 / SOFT_CAP))
    t = (1.0 - e) / (1.0 + e) * (SOFT_CAP * LOG2_E)
    return tl.where(s < 0.0, -t, t)


@triton.jit
def attend_tokens(
    query,
    row_mask,
    row_last,
    first,
    last,
    pages,
    strides,
    block_table,
    region_k,
    region_v,
    qk_scale,
    BLOCK_SIZE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    SWAPPED: tl.constexpr,
    PTX: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Returns maximum [M] and total [M] of the scores' powers of 2, and accumulators of v' (see `no_values`).

    The loop has no loop inside and loads before it computes, so that the compiler can fetch a tile of tokens, of all
    tiers, while it computes the one before. Loads are masked by the group's own sizes, and products with values skipped
    where a group has none. Products with keys are not: a branch around Hopper's products costs more than they do.

    Args:
        query: [M] pointers to rows of q'.
        row_last: [M] the last position that a row sees; -1 for rows that are none.
        first, last: tokens of the request, [first, last).
        pages, strides: the cache and its block stride as elements of the model's dtype and as bytes.
        block_table: pointer to the request's row.
        SWAPPED: whether tokens are the rows of the products with keys, as they should be where they are more than the
            queries' rows.
        PTX: see `unpack`.
        KEY, VALUE: chunks, tiles and aligns of `table.SideShape`.
        WINDOW: tokens that a row sees, the last included; 0 for all up to the last.
        SOFT_CAP: see `capped`; 0 for none.
    """
    DTYPE: tl.constexpr = pages[0].dtype.element_ty
    CODED_K: tl.constexpr = KEY[0][1] + KEY[0][2] + KEY[0][3] > 0
    CODED_V: tl.constexpr = VALUE[0][1] + VALUE[0][2] + VALUE[0][3] > 0
    queries = load_queries(query, row_mask, region_k, KEY, SWAPPED)
    m = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    acc = no_values(M, VALUE)
    for start in tl.range(first, last, N, num_stages=STAGES):
        n = start + tl.arange(0, N)
        live = n < last
        block = tl.load(block_table + n // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        slot = n % BLOCK_SIZE
        keys = load_pages(pages, strides, block, slot, live, region_k, KEY, not SWAPPED)
        values = load_pages(pages, strides, block, slot, live, region_v, VALUE, False)

        b_q = queries
        exact = tl.zeros([N, M] if SWAPPED else [M, N], dtype=tl.float32)
        coded = tl.zeros([N, M] if SWAPPED else [M, N], dtype=tl.float32)
        for tier in tl.static_range(4):
            for _ in tl.static_range(0 + KEY[1][tier]):
                for part in tl.static_range(1 if tier == 0 else 1 << (tier - 1)):
                    if tier == 0:
                        if SWAPPED:
                            exact = tl.dot(keys[0], b_q[0], exact, input_precision=PRECISION)
                        else:
                            exact = tl.dot(b_q[0], keys[0], exact, input_precision=PRECISION)
                    else:
                        b_k = odd_integers(keys[0], part, 16 >> tier, DTYPE, PTX)
                        if SWAPPED:
                            coded = tl.dot(b_k, b_q[0], coded, input_precision=PRECISION)
                        else:
                            coded = tl.dot(b_q[0], b_k, coded, input_precision=PRECISION)
                    b_q = b_q[1:]
                keys = keys[1:]
        s = exact
        if CODED_K:
            scale = token_scales(pages[1], block * strides[1], slot, region_k, live)
            s += coded * (scale[:, None] if SWAPPED else scale[None, :])
        if SWAPPED:
            s = tl.trans(s)
        seen = live[None, :] & (n[None, :] <= row_last[:, None])
        if WINDOW > 0:
            seen = seen & (n[None, :] > row_last[:, None] - WINDOW)
        s *= qk_scale
        if SOFT_CAP > 0:
            s = capped(s, SOFT_CAP)
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # A row that has seen nothing yet would subtract infinity from infinity.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m - base)
        total = total * alpha + tl.sum(p, 1)
        m = m_new

        b_p = p.to(DTYPE)
        b_p_scaled = b_p
        if CODED_V:
            b_p_scaled = (p * token_scales(pages[1], block * strides[1], slot, region_v, live)[None, :]).to(DTYPE)
        added = ()
        for tier in tl.static_range(4):
            for tile in tl.static_range(0 + VALUE[1][tier]):
                used = tile * VALUE[0][tier] < tl.load(region_v + 2 * tier + 1)
                for part in tl.static_range(1 if tier == 0 else 1 << (tier - 1)):
                    o = acc[len(added)]
                    if used:
                        o *= alpha[:, None]
                        if tier == 0:
                            o = tl.dot(b_p, values[0], o, input_precision=PRECISION)
                        else:
                            b_v = odd_integers(values[0], part, 16 >> tier, DTYPE, PTX)
                            o = tl.dot(b_p_scaled, b_v, o, input_precision=PRECISION)
                    added = added + (o,)  # type: ignore[assignment]  # noqa: RUF005
                values = values[1:]
        acc = added
    return m, total, acc
