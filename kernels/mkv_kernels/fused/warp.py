# SPDX-License-Identifier: Apache-2.0
"""Attention of one warp: few query rows against a stretch of one request's tokens, in a latent group of few columns.

What `tile` does, with products the other way round: tokens, and coordinates of values, are the rows of the tensor
cores' operands, queries are their columns. An operand has 16 rows at least, but 8 columns, and decode rarely has more
than 8 queries: half the products and half the powers are left, and half the registers. A warp that has its tokens to
itself waits for no other one.

Which pages tokens are in is read a tile ahead, one number per 16 tokens. Words of a coded tier are taken 8 at a time
where that is enough, once for either half of an operand's 16 rows or columns; in the latter half they are shifted down
by 8 bits, so that part p of a word meets part p + 8 / width.

Legend: M query rows, N tokens, C coordinates. A "region" is a side's row of `table.regions`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mkv_kernels.fused.tile import (
    ALIKE,
    MOST_RAISED,
    attend_tokens,
    capped,
    coordinates,
    parts_of,
    places,
    rows_of,
    scales_at,
    scales_of,
    tier_of,
)
from mkv_kernels.fused.unpack import excess_of, shifted, unpacked


@triton.jit
def load_queries(query, row_mask, region, KEY: tl.constexpr):
    """q' of the rows by tier, tile and part, [C, M] each, 0 beyond the group's rank. Shapes: query [M] pointers."""
    tiles = ()
    for tier in tl.static_range(4):
        for tile in tl.static_range(0 + KEY[1][tier]):
            for part in tl.static_range(parts_of(tier, KEY[0][tier])):
                at, inside = coordinates(region, KEY, tier, tile, part)
                b_q = tl.load(query[None, :] + at[:, None], mask=inside[:, None] & row_mask[None, :], other=0.0)
                tiles = tiles + (b_q,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def excess_scores(queries, M: tl.constexpr, KEY: tl.constexpr, DTYPE: tl.constexpr):
    """See `tile.excess_scores`."""
    above = tl.zeros([M], dtype=tl.float32)
    for tier in tl.static_range(4):
        for _ in tl.static_range(0 + KEY[1][tier]):
            for part in tl.static_range(parts_of(tier, KEY[0][tier])):
                if tier > 0:
                    above += tl.sum(queries[0].to(tl.float32), 0) * excess_of(16 >> tier, part, DTYPE)
                queries = queries[1:]
    return above


@triton.jit
def load_blocks(block_table, start, last_page, BLOCK_SIZE: tl.constexpr, N: tl.constexpr):
    """Blocks of N tokens, one number per 16 of them."""
    blocks = ()
    for i in tl.static_range(N // 16):
        page = tl.minimum((start + 16 * i) // BLOCK_SIZE, last_page)
        blocks = blocks + (tl.load(block_table + page),)  # type: ignore[assignment]  # noqa: RUF005
    return blocks


@triton.jit
def by_token(numbers, N: tl.constexpr):
    """[N], from one number per 16 tokens."""
    of = tl.zeros([N], dtype=tl.int64) + numbers[0]
    for i in tl.static_range(1, N // 16):
        of = tl.where(tl.arange(0, N) // 16 == i, numbers[i], of)
    return tl.multiple_of(of, 8)


@triton.jit
def load_side(
    blocks, start, last, pages, strides, region, SIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, N: tl.constexpr,
    TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """N tokens of one side by tier and tile, [N, C] or [C, N]. Nothing is read beyond the group's rank, nor numbers
    behind the last token, unless WHOLE, where there are none; codes there may be anything."""
    tiles = ()
    token = tl.arange(0, N)
    _, size0, _ = tier_of(region, 0)
    firsts, words = (), ()
    for i in tl.static_range(N // 16):
        slot = tl.multiple_of((start + 16 * i) % BLOCK_SIZE, 16)
        firsts = firsts + (blocks[i].to(tl.int64) * strides[0] + slot * size0,)  # type: ignore[assignment]  # noqa: RUF005
        words = words + (blocks[i].to(tl.int64) * strides[1] + slot,)  # type: ignore[assignment]  # noqa: RUF005
    there = start + token < last
    for tier in tl.static_range(4):
        for tile in tl.static_range(0 + SIDE[1][tier]):
            offset, size, _ = tier_of(region, tier, pages[0].dtype.element_ty.primitive_bitwidth)
            col, _ = places(SIDE, tier, tile)
            if tier == 0:
                rows = pages[0] + (by_token(firsts, N) + (offset + token % 16 * size))
                if TRANSPOSED:
                    mask = (col < size)[:, None] & (WHOLE | there[None, :])
                    b_x = tl.load(rows[None, :] + col[:, None], mask=mask, other=0.0)
                else:
                    mask = (col < size)[None, :] & (WHOLE | there[:, None])
                    b_x = tl.load(rows[:, None] + col[None, :], mask=mask, other=0.0)
            else:
                rows = pages[1] + (by_token(words, N) + token % 16)
                at, mask = offset + col * BLOCK_SIZE, col < size
                if TRANSPOSED:
                    b_x = tl.load(rows[None, :] + at[:, None], mask=mask[:, None], other=0)
                else:
                    b_x = tl.load(rows[:, None] + at[None, :], mask=mask[None, :], other=0)
            tiles = tiles + (b_x,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def load_scales(blocks, start, pages, strides, region, BLOCK_SIZE: tl.constexpr, N: tl.constexpr):
    """See `tile.load_scales`, [N]."""
    at = ()
    for i in tl.static_range(N // 16):
        slot = tl.multiple_of((start + 16 * i) % BLOCK_SIZE, 16)
        at = at + (blocks[i].to(tl.int64) * strides[1] + slot // 2,)  # type: ignore[assignment]  # noqa: RUF005
    token = tl.arange(0, N)
    fours = scales_at(pages[1], region) + (by_token(at, N) + token % 16 // 4 * 2)
    return tl.load(
        fours.to(tl.pointer_type(tl.int32), bitcast=True), mask=tl.load(region + 8) + token * 0 >= 0, other=0
    )


@triton.jit
def no_values(M: tl.constexpr, VALUE: tl.constexpr):
    """Accumulators of a value side by tier, tile and part, [C, M] each."""
    acc = ()
    for tier in tl.static_range(4):
        for _ in tl.static_range(0 + VALUE[1][tier]):
            for _part in tl.static_range(parts_of(tier, VALUE[0][tier])):
                acc = acc + (tl.zeros([rows_of(VALUE[0][tier]), M], dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return acc


@triton.jit
def words_of(x, shifts, SIDE: tl.constexpr, TIER: tl.constexpr, PTX: tl.constexpr):
    """A tile of words with each half's parts where `coordinates` says."""
    if TIER > 0 and SIDE[0][TIER] == 8:
        x = shifted(x, shifts, PTX)
    return x


@triton.jit
def without_excess(acc, p_total, VALUE: tl.constexpr, DTYPE: tl.constexpr):
    """See `tile.without_excess`. Shapes: p_total [M]."""
    exact = ()
    for tier in tl.static_range(4):
        for _ in tl.static_range(0 + VALUE[1][tier]):
            for part in tl.static_range(parts_of(tier, VALUE[0][tier])):
                o = acc[len(exact)]
                if tier > 0:
                    o -= p_total[None, :] * excess_of(16 >> tier, part, DTYPE)
                exact = exact + (o,)  # type: ignore[assignment]  # noqa: RUF005
    return exact


@triton.jit
def scores_of(
    queries, keys, shifts, above, M: tl.constexpr, N: tl.constexpr, KEY: tl.constexpr, DTYPE: tl.constexpr,
    PTX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """k' q' of N tokens, [N, M]: of the 16-bit tier, and of codes, without their scale."""
    exact = tl.zeros([N, M], dtype=tl.float32)
    coded = tl.zeros([N, M], dtype=tl.float32) - above[None, :]
    for tier in tl.static_range(4):
        for _ in tl.static_range(0 + KEY[1][tier]):
            x = words_of(keys[0], shifts, KEY, tier, PTX)
            for part in tl.static_range(parts_of(tier, KEY[0][tier])):
                if tier == 0:
                    exact = tl.dot(x, queries[0], exact, input_precision=PRECISION)
                else:
                    b_k = unpacked(x, part, 16 >> tier, DTYPE, PTX, True)
                    coded = tl.dot(b_k, queries[0], coded, input_precision=PRECISION)
                queries = queries[1:]
            keys = keys[1:]
    return exact, coded


@triton.jit
def values_of_tile(
    acc, words, shifts, p, p_scaled, VALUE: tl.constexpr, TIER: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
    RAISED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + v' p of one tile of N tokens' values, by part."""
    x = words_of(words, shifts, VALUE, TIER, PTX)
    added = ()
    for part in tl.static_range(parts_of(TIER, VALUE[0][TIER])):
        if TIER == 0:
            o = tl.dot(x, p, acc[part], input_precision=PRECISION)
        else:
            b_v = unpacked(x, part, 16 >> TIER, DTYPE, PTX, RAISED)
            o = tl.dot(b_v, p_scaled, acc[part], input_precision=PRECISION)
        added = added + (o,)  # type: ignore[assignment]  # noqa: RUF005
    return added


@triton.jit
def scaled(acc, alpha):
    """acc alpha, by tile. Shapes: alpha [M]."""
    less = ()
    for i in tl.static_range(len(acc)):
        less = less + (acc[i] * alpha[None, :],)  # type: ignore[assignment]  # noqa: RUF005
    return less


@triton.jit
def stretches_of(row_mask, row_last, first, last, N: tl.constexpr, WINDOW: tl.constexpr):
    """The last token in [first, last) that each row sees, and where three stretches of these begin, and the last ends.

    Every row sees all tokens of the middle one, which needs no masks, and has whole tiles of N.
    """
    first = tl.multiple_of(first, 16)
    row_end = tl.minimum(row_last, last - 1)
    all_see = tl.min(tl.where(row_mask, row_end + 1, last), 0)
    head = first
    if WINDOW > 0:
        newest = tl.max(row_last, 0)
        head = tl.minimum(first + tl.cdiv(tl.maximum(newest - WINDOW + 1 - first, 0), N) * N, last)
    tail = head + tl.maximum(all_see - head, 0) // N * N
    return row_end, (first, head, tail, last)


@triton.jit
def seen_by(token, row_end, row_last, WINDOW: tl.constexpr):
    """Which tokens [N] which rows [M] see, [N, M]."""
    seen = token[:, None] <= row_end[None, :]
    if WINDOW > 0:
        seen = seen & (token[:, None] > row_last[None, :] - WINDOW)
    return seen


@triton.jit
def attend_in_warp(
    shifts_ptr,
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
    PTX: tl.constexpr,
    RAISED: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Returns what `tile.attend_tokens` does of the same arguments, accumulators transposed (see `no_values`)."""
    DTYPE: tl.constexpr = pages[0].dtype.element_ty
    CODED_K: tl.constexpr = KEY[0][1] + KEY[0][2] + KEY[0][3] > 0
    CODED_V: tl.constexpr = VALUE[0][1] + VALUE[0][2] + VALUE[0][3] > 0
    # Loaded, and only 16 of them: what else they came from would keep words from being unpacked in registers.
    shifts = tl.load(shifts_ptr + tl.arange(0, 16))
    shifts_k, shifts_v = shifts[None, :], shifts[:, None]
    factor = 1.0 if SOFT_CAP > 0 else qk_scale
    queries = load_queries(query, row_mask, region_k, KEY)
    above = excess_scores(queries, M, KEY, DTYPE)
    m = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([N, M], dtype=tl.float32)
    acc = no_values(M, VALUE)
    alike = tl.zeros([16, M], dtype=tl.float32)
    row_end, bounds = stretches_of(row_mask, row_last, first, last, N, WINDOW)
    last_page = (last - 1) // BLOCK_SIZE
    for stretch in tl.static_range(0 if WINDOW > 0 else 1, 3):
        begin, end = bounds[stretch], bounds[stretch + 1]
        ahead = load_blocks(block_table, begin, last_page, BLOCK_SIZE, N)
        for start in tl.range(begin, end, N, num_stages=STAGES if stretch == 1 else 1):
            blocks = ahead
            ahead = load_blocks(block_table, start + N, last_page, BLOCK_SIZE, N)
            keys = load_side(blocks, start, last, pages, strides, region_k, KEY, BLOCK_SIZE, N, False, stretch == 1)
            if CODED_K:
                scales_k = load_scales(blocks, start, pages, strides, region_k, BLOCK_SIZE, N)
            s, coded = scores_of(queries, keys, shifts_k, above, M, N, KEY, DTYPE, PTX, PRECISION)
            if CODED_K:
                s += coded * scales_of(scales_k, N)[:, None]
            if SOFT_CAP > 0:
                s = capped(s * qk_scale, SOFT_CAP)
            n = start + tl.arange(0, N)
            if stretch != 1:
                s = tl.where(seen_by(n, row_end, row_last, WINDOW), s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 0))
            # A row that has seen nothing yet would subtract infinity from infinity.
            base = tl.where(m_new == float("-inf"), 0.0, m_new * factor)
            alpha = tl.exp2(m * factor - base)
            m = m_new
            p = tl.exp2(s * factor - base[None, :])
            total = total * alpha[None, :] + p
            acc = scaled(acc, alpha)
            values = load_side(blocks, start, last, pages, strides, region_v, VALUE, BLOCK_SIZE, N, True, stretch == 1)
            b_p = p.to(DTYPE)
            b_p_scaled = b_p
            if CODED_V:
                scales_v = scales_of(load_scales(blocks, start, pages, strides, region_v, BLOCK_SIZE, N), N)
                if stretch != 1:
                    # Behind the last token a scale may be anything, and 0 times it not 0.
                    scales_v = tl.where(n < last, scales_v, 0.0)
                b_p_scaled = (p * scales_v[:, None]).to(DTYPE)
                if RAISED:
                    ones = tl.full([16, N], ALIKE, dtype=DTYPE)
                    alike = tl.dot(ones, b_p_scaled, alike * alpha[None, :], input_precision=PRECISION)
            added = ()
            for tier in tl.static_range(4):
                for tile in tl.static_range(0 + VALUE[1][tier]):
                    o = acc[: parts_of(tier, VALUE[0][tier])]
                    # What all groups have needs no branch.
                    if tile < VALUE[2][tier]:  # noqa: SIM114
                        o = values_of_tile(
                            o, values[0], shifts_v, b_p, b_p_scaled, VALUE, tier, DTYPE, PTX, RAISED, PRECISION
                        )
                    elif tile * VALUE[0][tier] < tl.load(region_v + 2 * tier + 1):
                        o = values_of_tile(
                            o, values[0], shifts_v, b_p, b_p_scaled, VALUE, tier, DTYPE, PTX, RAISED, PRECISION
                        )
                    added = added + o
                    acc = acc[parts_of(tier, VALUE[0][tier]) :]
                    values = values[1:]
            acc = added
            if CODED_V and RAISED:  # noqa: SIM102
                # A condition of its own: it is one of numbers, not of constants.
                if (start - first) % MOST_RAISED == MOST_RAISED - N:
                    acc = without_excess(acc, tl.max(alike, 0) / ALIKE, VALUE, DTYPE)
                    alike = tl.zeros([16, M], dtype=tl.float32)
    if CODED_V and RAISED:
        acc = without_excess(acc, tl.max(alike, 0) / ALIKE, VALUE, DTYPE)
    return m * factor, tl.sum(total, 0), acc


@triton.jit
def attend(
    shifts_ptr,
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
    PTX: tl.constexpr,
    RAISED: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    IN_WARP: tl.constexpr,
):
    """`attend_in_warp` or `tile.attend_tokens`, of the same arguments; `shifts_ptr` is to `LayerTable.half_shifts`."""
    if IN_WARP:
        m, total, acc = attend_in_warp(
            shifts_ptr, query, row_mask, row_last, first, last, pages, strides, block_table, region_k,
            region_v, qk_scale, BLOCK_SIZE, M, N, STAGES, PTX, RAISED, KEY, VALUE, PRECISION, WINDOW,
            SOFT_CAP,
        )  # fmt: skip
    else:
        m, total, acc = attend_tokens(
            query, row_mask, row_last, first, last, pages, strides, block_table, region_k, region_v,
            qk_scale, BLOCK_SIZE, M, N, STAGES, PTX, RAISED, KEY, VALUE, PRECISION, WINDOW, SOFT_CAP,
        )  # fmt: skip
    return m, total, acc
