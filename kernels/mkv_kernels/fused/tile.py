# SPDX-License-Identifier: Apache-2.0
"""The part that decode and prefill share: query rows against a stretch of one request's tokens, in one latent group.

A tier of the 16-bit width enters the tensor cores as it is. Of the others, the odd integers do that their codes stand
for (see `codes`): no coordinate is multiplied by a scale, the token's scale multiplies its column of scores (keys) or
its probability (values). Half steps are in the bases.

Codes are loaded as words of 16 bits, which the tensor cores' operands have too: they take the same way through shared
memory, 16 bytes at a time, and unpacking takes no shuffle. Such 16 bytes are a word of 8 neighbouring tokens; one part
of neighbouring words gives neighbouring coordinates.

Legend: M query rows, N tokens, C coordinates or words of a token at once. A "region" is a side's row of
`table.regions`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from mkv_kernels.fused.unpack import excess_of, scale_values, unpacked

LOG2_E = tl.constexpr(math.log2(math.e))
ALIKE = tl.constexpr(128.0)
"""Codes with their excess are about as large in bfloat16. Tensor cores round sums of theirs towards zero, which many
tokens would show; they do nearly as much to what is subtracted if that is summed in the same way."""
MOST_RAISED = tl.constexpr(2048)
"""Tokens whose excess is summed before it is subtracted. On an H100, 2048 err as the twin does, 8192 up to four times
as much."""


@triton.jit
def tier_of(region, TIER: tl.constexpr, BITS: tl.constexpr = 16):
    """Offset, numbers or words per token, and first coordinate of a tier. BITS has a number of the tier of 16 bits."""
    start = 0
    for before in tl.static_range(TIER):
        start += tl.load(region + 2 * before + 1) * (1 << before)
    # Bits that are known to be 0 save adding them to addresses of 64 bits.
    offset = tl.multiple_of(tl.load(region + 2 * TIER) & 0x3FFFFFFF, 128 // BITS if TIER == 0 else 8)
    size = tl.load(region + 2 * TIER + 1)
    if TIER == 0:
        size = tl.multiple_of(size, 16)
    return offset, size, tl.multiple_of(start, 16)


@triton.jit
def rank_of(region):
    """Coordinates of a side that are stored."""
    rank = tl.load(region + 1)
    for tier in tl.static_range(1, 4):
        rank += tl.load(region + 2 * tier + 1) * (1 << tier)
    return rank


@triton.constexpr_function
def rows_of(chunk: int) -> int:
    """Rows of an operand of so many words or coordinates."""
    return max(16, chunk)


@triton.constexpr_function
def parts_of(tier: int, chunk: int) -> int:
    """Operands that a tile of words is unpacked to."""
    return (1 << tier) // (2 if chunk == 8 else 1)


@triton.jit
def places(SIDE: tl.constexpr, TIER: tl.constexpr, TILE: tl.constexpr):
    """Of an operand's rows, [C]: word or coordinate of the tier, and the half of the word, 0 or 1."""
    row = tl.arange(0, rows_of(SIDE[0][TIER]))
    if SIDE[0][TIER] == 8:
        col, half = TILE * 8 + row % 8, row // 8
    else:
        col, half = TILE * SIDE[0][TIER] + row, row * 0
    return col, half


@triton.jit
def coordinates(region, SIDE: tl.constexpr, TIER: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr):
    """Of an operand's rows, [C]: coordinate of the group, and whether the group has it."""
    _, size, begin = tier_of(region, TIER)
    col, half = places(SIDE, TIER, TILE)
    return begin + (PART + half * ((1 << TIER) // 2)) * size + col, col < size


@triton.jit
def scales_at(page, region):
    """Where the scales of a page of words begin, if the group has any."""
    return page + tl.multiple_of(tl.load(region + 8) & 0x3FFFFFFF, 8)


@triton.jit
def load_scales(page, slot, region):
    """Scales of tokens, [N] integers of the bytes of four neighbours; 0 for groups without coded tiers.

    Four, since copies to shared memory, and with them fetching ahead, begin at 4 bytes.
    """
    fours = (scales_at(page, region) + slot // 4 * 2).to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(fours, mask=tl.load(region + 8) + slot * 0 >= 0, other=0)


@triton.jit
def scales_of(fours, N: tl.constexpr):
    """[N] float32, from what `load_scales` loads of N tokens from a multiple of four on."""
    return scale_values(fours >> tl.arange(0, N) % 4 * 8)


@triton.jit
def load_queries(query, row_mask, region, KEY: tl.constexpr):
    """q' of the rows by tier, tile and part, [M, C] each, 0 beyond the group's rank.

    Shapes: query [M] pointers.
    """
    tiles = ()
    for tier in tl.static_range(4):
        if KEY[0][tier] > 0:
            _, size, begin = tier_of(region, tier)
            for tile in tl.static_range(0 + KEY[1][tier]):
                col = tile * KEY[0][tier] + tl.arange(0, KEY[0][tier])
                for part in tl.static_range(1 << tier):
                    at = begin + part * size + col
                    mask = row_mask[:, None] & (col < size)[None, :]
                    b_q = tl.load(query[:, None] + at[None, :], mask=mask, other=0.0)
                    tiles = tiles + (b_q,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def excess_scores(queries, M: tl.constexpr, KEY: tl.constexpr, DTYPE: tl.constexpr):
    """What the scores of every token have too much for keys unpacked with an excess, [M]; without the token's scale."""
    above = tl.zeros([M], dtype=tl.float32)
    for tier in tl.static_range(4):
        if KEY[0][tier] > 0:
            columns = tl.zeros([M, 0 + KEY[0][tier]], dtype=tl.float32)
            for _ in tl.static_range(0 + KEY[1][tier]):
                for part in tl.static_range(1 << tier):
                    if tier > 0:
                        columns += queries[0].to(tl.float32) * excess_of(16 >> tier, part, DTYPE)
                    queries = queries[1:]
            if tier > 0:
                above += tl.sum(columns, 1)
    return above


@triton.jit
def load_tile(
    places, region, SIDE: tl.constexpr, TIER: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A tile of a tier of one side of N tokens, [N, C] or [C, N]. Nothing is read beyond the group's rank.

    Shapes: places [N]: pages as numbers and slots of the tokens, and where their first words would lie in their pages.
    """
    offset, size, _ = tier_of(region, TIER, places[0].dtype.element_ty.primitive_bitwidth)
    col = TILE * SIDE[0][TIER] + tl.arange(0, SIDE[0][TIER])
    if TIER == 0:
        rows = places[0] + offset + places[1] * size
        step = 1
    else:
        # What is added to all tokens' addresses alike goes to the columns': then tiles share the addresses.
        rows = places[2]
        step = BLOCK_SIZE
    begin = 0 if TIER == 0 else offset
    if TRANSPOSED:
        tile = tl.load(rows[None, :] + (begin + col * step)[:, None], mask=(col < size)[:, None], other=0)
    else:
        tile = tl.load(rows[:, None] + (begin + col * step)[None, :], mask=(col < size)[None, :], other=0)
    return tile


@triton.jit
def load_values(places, region, VALUE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """A value side by tier and tile, see `load_tile`."""
    values = ()
    for tier in tl.static_range(4):
        for tile in tl.static_range(0 + VALUE[1][tier]):
            b_v = load_tile(places, region, VALUE, tier, tile, BLOCK_SIZE, False)
            values = values + (b_v,)  # type: ignore[assignment]  # noqa: RUF005
    return values


@triton.jit
def no_values(M: tl.constexpr, VALUE: tl.constexpr):
    """Accumulators of a value side by tier, tile and part, [M, C] each."""
    acc = ()
    for tier in tl.static_range(4):
        for _ in tl.static_range(0 + VALUE[1][tier]):
            for _part in tl.static_range(1 << tier):
                # In triton 3.6 an element of a constexpr tuple is no constexpr; a sum with one is.
                acc = acc + (tl.zeros([M, 0 + VALUE[0][tier]], dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return acc


@triton.jit
def product(
    p, p_scaled, values, acc, TIER: tl.constexpr, PART: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
    RAISED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + p v' of one part of a tile of values, with the excess of RAISED codes."""
    if TIER == 0:
        acc = tl.dot(p, values, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(p_scaled, unpacked(values, PART, 16 >> TIER, DTYPE, PTX, RAISED), acc, input_precision=PRECISION)
    return acc


@triton.jit
def without_excess(acc, p_total, VALUE: tl.constexpr, DTYPE: tl.constexpr):
    """Accumulators of RAISED codes, less the codes' excess times the probabilities' total, [M], with their scales."""
    exact = ()
    for tier in tl.static_range(4):
        for _ in tl.static_range(0 + VALUE[1][tier]):
            for part in tl.static_range(1 << tier):
                o = acc[len(exact)]
                if tier > 0:
                    o -= p_total[:, None] * excess_of(16 >> tier, part, DTYPE)
                exact = exact + (o,)  # type: ignore[assignment]  # noqa: RUF005
    return exact


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
    PTX: tl.constexpr,
    RAISED: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Returns maximum [M] and total [M] of the scores' powers of 2, and accumulators of v' (see `no_values`).

    The loop has no loop inside and loads a tile's values when its scores are done, so that the compiler can fetch the
    next tile of tokens, of all tiers, while products with values are formed. Loads are masked by the group's own sizes,
    and products with values skipped where a group has none. Products with keys are not: a branch around Hopper's
    products costs more than they do.

    Args:
        query: [M] pointers to rows of q'.
        row_last: [M] the last position that a row sees; -1 for rows that are none.
        first, last: tokens of the request, [first, last), the first a multiple of 16.
        pages, strides: the cache and its block stride as elements of the model's dtype and as words.
        block_table: pointer to the request's row.
        PTX, RAISED: see `unpack`; RAISED that values keep their excess until the end.
        KEY, VALUE: chunks and tiles of `table.SideShape`.
        WINDOW: tokens that a row sees, the last included; 0 for all up to the last.
        SOFT_CAP: see `capped`; 0 for none.
    """
    DTYPE: tl.constexpr = pages[0].dtype.element_ty
    CODED_K: tl.constexpr = KEY[0][1] + KEY[0][2] + KEY[0][3] > 0
    CODED_V: tl.constexpr = VALUE[0][1] + VALUE[0][2] + VALUE[0][3] > 0
    # Scores are scaled where they are subtracted from, in one instruction.
    factor = 1.0 if SOFT_CAP > 0 else qk_scale
    queries = load_queries(query, row_mask, region_k, KEY)
    above = excess_scores(queries, M, KEY, DTYPE)
    m = tl.full([M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([M], dtype=tl.float32)
    acc = no_values(M, VALUE)
    # What every token would add to a column whose codes were all alike, [M, 8] of equal columns.
    alike = tl.zeros([M, 8], dtype=tl.float32)
    first = tl.multiple_of(first, 16)
    row_end = tl.minimum(row_last, last - 1)
    # Every row sees all tiles that end before this, but for a window. Rows that are none may see what they like.
    all_see = tl.min(tl.where(row_mask, row_end + 1, last), 0)
    newest = tl.max(row_last, 0)
    last_page = (last - 1) // BLOCK_SIZE
    for start in tl.range(first, last, N, num_stages=STAGES):
        n = start + tl.arange(0, N)
        # Behind the last token there may be anything: codes of it are not seen, numbers are the last token's again.
        block = tl.load(block_table + tl.minimum(n // BLOCK_SIZE, last_page)).to(tl.int64)
        slot = n % BLOCK_SIZE
        page = pages[1] + block * strides[1]
        places = (pages[0] + block * strides[0], tl.minimum(n, last - 1) % BLOCK_SIZE, page + slot)
        if CODED_K:
            scales_k = load_scales(page, slot, region_k)

        b_q = queries
        exact = tl.zeros([M, N], dtype=tl.float32)
        coded = tl.zeros([M, N], dtype=tl.float32) - above[:, None]
        for tier in tl.static_range(4):
            for tile in tl.static_range(0 + KEY[1][tier]):
                b_k = load_tile(places, region_k, KEY, tier, tile, BLOCK_SIZE, True)
                for part in tl.static_range(1 << tier):
                    if tier == 0:
                        exact = tl.dot(b_q[0], b_k, exact, input_precision=PRECISION)
                    else:
                        b_odd_k = unpacked(b_k, part, 16 >> tier, DTYPE, PTX, True)
                        coded = tl.dot(b_q[0], b_odd_k, coded, input_precision=PRECISION)
                    b_q = b_q[1:]
        s = exact
        if CODED_K:
            s += coded * scales_of(scales_k, N)[None, :]
        if SOFT_CAP > 0:
            s = capped(s * qk_scale, SOFT_CAP)
        # On Hopper, products of many rows wait for the branch for longer than the masks take.
        whole = (start + N <= all_see) & (M < 64)
        if WINDOW > 0:
            whole = whole & (start > newest - WINDOW)
        if not whole:
            seen = n[None, :] <= row_end[:, None]
            if WINDOW > 0:
                seen = seen & (n[None, :] > row_last[:, None] - WINDOW)
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # A row that has seen nothing yet would subtract infinity from infinity.
        base = tl.where(m_new == float("-inf"), 0.0, m_new * factor)
        p = tl.exp2(s * factor - base[:, None])
        alpha = tl.exp2(m * factor - base)
        total = total * alpha + tl.sum(p, 1)
        m = m_new

        values = load_values(places, region_v, VALUE, BLOCK_SIZE)
        if CODED_V:
            scales_v = load_scales(page, slot, region_v)
        b_p = p.to(DTYPE)
        b_p_scaled = b_p
        if CODED_V:
            # Behind the last token a scale may be anything, and 0 times it not 0.
            b_p_scaled = (p * tl.where(n < last, scales_of(scales_v, N), 0.0)[None, :]).to(DTYPE)
            if RAISED:
                ones = tl.full([N, 8], ALIKE, dtype=DTYPE)
                alike = tl.dot(b_p_scaled, ones, alike * alpha[:, None], input_precision=PRECISION)
        added = ()
        for tier in tl.static_range(4):
            for tile in tl.static_range(0 + VALUE[1][tier]):
                used = tile * VALUE[0][tier] < tl.load(region_v + 2 * tier + 1)
                for part in tl.static_range(1 << tier):
                    o = acc[len(added)]
                    # The same twice: what all groups have needs no branch. (Many rows are faster with it.)
                    if (tile < VALUE[2][tier]) & (M < 64):  # noqa: SIM114
                        o = product(
                            b_p, b_p_scaled, values[0], o * alpha[:, None], tier, part, DTYPE, PTX, RAISED, PRECISION
                        )
                    elif used:
                        o = product(
                            b_p, b_p_scaled, values[0], o * alpha[:, None], tier, part, DTYPE, PTX, RAISED, PRECISION
                        )
                    added = added + (o,)  # type: ignore[assignment]  # noqa: RUF005
                values = values[1:]
        acc = added
        if CODED_V and RAISED:  # noqa: SIM102
            # A condition of its own: it is one of numbers, not of constants.
            if (start - first) % MOST_RAISED == MOST_RAISED - N:
                acc = without_excess(acc, tl.max(alike, 1) / ALIKE, VALUE, DTYPE)
                alike = tl.zeros([M, 8], dtype=tl.float32)
    if CODED_V and RAISED:
        acc = without_excess(acc, tl.max(alike, 1) / ALIKE, VALUE, DTYPE)
    return m * factor, total, acc
