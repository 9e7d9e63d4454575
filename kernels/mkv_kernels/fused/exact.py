# SPDX-License-Identifier: Apache-2.0
"""Query rows of prefill against the tokens of one request, in a latent group that stores 16 bits alone.

What `tile.attend_tokens` does, where there are many rows and no codes. On Hopper such a loop is bound by the
instructions that it issues, so it has few: the tokens that every row sees come in a loop without masks, which forms no
products for tiles that a group does not have. Which those are is decided around the loop, for a branch in it would wait
for Hopper's products.

Legend: M query rows, N tokens, C coordinates of a tile. A "region" is a side's row of `table.regions`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mkv_kernels.fused.tile import capped, load_queries, no_values, tier_of

STRETCH = tl.constexpr(16)
"""Tokens from a multiple of so many on lie in one page, one after the other."""

FEW = tl.constexpr(32)
"""Tokens at a time of the loop with masks: fewer are left over, and masks leave no registers for more."""

MOST_JOINED = tl.constexpr(4)
"""Tiles of keys that are loaded and multiplied as one."""


@triton.jit
def query_rows(
    tile, request, query_start_loc_ptr, QUERIES: tl.constexpr, QUERY_HEADS: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Of a tile's rows: token in the step, query head of the KV head, and whether there is one; the request's number of
    queries, and the tile's first."""
    # Volatile, since else the compiler would keep what it read before.
    q_start = tl.load(query_start_loc_ptr + request, volatile=True)
    q_len = tl.load(query_start_loc_ptr + request + 1, volatile=True) - q_start
    q_first = (tile - (q_start // QUERIES + request)) * QUERIES
    row = tl.arange(0, M)
    q_index = q_first + row // QUERY_HEADS
    row_mask = (row < QUERIES * QUERY_HEADS) & (q_index < q_len)
    return (q_start + q_index).to(tl.int64), row % QUERY_HEADS, row_mask, q_len, q_first


@triton.jit
def tile_of_queries(
    step, strides, tile, request, GROUP_HEADS: tl.constexpr, QUERIES: tl.constexpr, QUERY_HEADS: tl.constexpr,
    FIELDS: tl.constexpr, M: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """What a tile's attention is of, for the program's KV head. All is read from memory again at every call.

    Args:
        step: pointers to q', query_start_loc, seq_lens, the block table, programs and regions, see `prefill`.
        strides: of tokens, groups and heads of q', and of the block table's rows.

    Returns:
        query: [M] pointers to rows of q', QUERY_HEADS for each of successive tokens; and which rows there are.
        first, last: tokens of the request that a row sees, [first, last), the first a multiple of 16.
        all_see: the first rows see the tokens before this one, but for a window; the next ones one more, and so on.
        block_table: pointer to the request's row.
        region_k, region_v: of the group.
    """
    token, head, row_mask, q_len, q_first = query_rows(tile, request, step[1], QUERIES, QUERY_HEADS, M)
    group = tl.load(step[4] + 4 * (tl.program_id(1) // GROUP_HEADS), volatile=True)
    head += tl.program_id(1) % GROUP_HEADS * QUERY_HEADS
    context = tl.load(step[2] + request, volatile=True) - q_len
    first = 0
    if WINDOW > 0:
        # What the tile's first query sees first, and up to 15 tokens before it.
        first = tl.maximum(context + q_first + 1 - WINDOW, 0) // 16 * 16
    query = step[0] + token * strides[0] + group * strides[1] + head * strides[2]
    region_k = step[5] + group * (2 * FIELDS)
    last = context + tl.minimum(q_first + QUERIES, q_len)
    block_table = step[3] + request.to(tl.int64) * strides[3]
    return query, row_mask, first, context + q_first + 1, last, block_table, region_k, region_k + FIELDS


@triton.jit
def _blocks(block_table, start, end, BLOCK_SIZE: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    """Pages of N tokens from `start` on, one per stretch of 16; of stretches beyond `end` tokens, the last page."""
    PER_PAGE: tl.constexpr = BLOCK_SIZE // STRETCH
    blocks = ()
    for i in tl.static_range(N // STRETCH):
        if MASKED:
            at = block_table + tl.minimum(start // STRETCH + i, (end - 1) // STRETCH) // PER_PAGE
        elif PER_PAGE == 1:
            at = block_table + start // STRETCH + i
        else:
            at = block_table + (start // STRETCH + i) // PER_PAGE
        blocks = blocks + (tl.load(at),)  # type: ignore[assignment]  # noqa: RUF005
    return blocks


@triton.jit
def load_tiles(
    page, stride, blocks, start, end, region, BLOCK_SIZE: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    TILES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The first TILES tiles of a side of the N tokens from `start` on, [N, C] each. Nothing is read beyond the group's
    rank, nor, if MASKED, behind the last of `end` tokens, which is loaded again in place of those.

    `blocks` are of `_blocks`. All but which page they name is known before the loop or the same for all threads.
    """
    PER_PAGE: tl.constexpr = BLOCK_SIZE // STRETCH
    DTYPE: tl.constexpr = page.dtype.element_ty
    ITEM: tl.constexpr = DTYPE.primitive_bitwidth // 8
    offset, size, _ = tier_of(region, 0)
    col = tl.arange(0, C)
    place = tl.arange(0, N)
    of_page = tl.zeros([N], dtype=tl.uint64)
    slot = place % STRETCH
    for i in tl.static_range(N // STRETCH):
        stretch = start // STRETCH + i
        # One instruction's product of 32 bits by 32, if it is asked for in this way.
        low, high = blocks[i].to(tl.uint32), stride.to(tl.uint32) * ITEM
        begin = (tl.umulhi(low, high).to(tl.uint64) << 32) | (low * high).to(tl.uint64)
        if MASKED:
            stretch = tl.minimum(stretch, (end - 1) // STRETCH)
            most = tl.minimum(end - 1 - stretch * STRETCH, STRETCH - 1)
            slot = tl.where(place // STRETCH == i, tl.minimum(slot, most), slot)
        if PER_PAGE > 1:
            begin += stretch % PER_PAGE * (STRETCH * ITEM) * size
        of_page = tl.where(place // STRETCH == i, begin, of_page)
    # Of 64 bits there is a number per token; within the page, 32 do, which most of is the same for all tokens.
    of_page = tl.multiple_of(of_page, 16)
    # A thread has every eighth token or less often, and so two slots of a page: in two parts, the compiler sees that.
    of_slot = slot % 8 * (size * ITEM) + slot // 8 * (size * (8 * ITEM))
    within = (offset * ITEM + of_slot)[:, None] + (col * ITEM)[None, :]
    at = (page.to(tl.pointer_type(tl.int8), bitcast=True) + of_page)[:, None] + within.to(tl.uint32)
    at = tl.max_contiguous(tl.multiple_of(at.to(tl.pointer_type(DTYPE), bitcast=True), [1, 16]), [1, C])
    tiles = ()
    for tile in tl.static_range(TILES):
        b = tl.load(at + tile * C, mask=(tile * C + col < size)[None, :], other=0.0)
        tiles = tiles + (b,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def _attend(
    step,
    strides,
    query_tile,
    request,
    so_far,
    page,
    stride,
    qk_scale,
    BLOCK_SIZE: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    FIELDS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEY_TILES: tl.constexpr,
    VALUE_TILES: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """What `attend_exact` returns, `so_far`, with tokens added, N at a time: 0 for those that are out of some rows'
    window, 1 for as many tiles of WHOLE as all rows see, 2 for those behind them.

    Args:
        KEY_TILES, VALUE_TILES: tiles that the group has something of, or more.
        PART: which of the tokens.
    """
    MASKED: tl.constexpr = PART != 1
    DTYPE: tl.constexpr = page.dtype.element_ty
    CHUNK: tl.constexpr = max(16, 0 + VALUE[0][0])
    # Scores are scaled where they are subtracted from, in one instruction.
    factor = 1.0 if SOFT_CAP > 0 else qk_scale
    m, total, acc = so_far
    # Products with one tile of keys wait for those with the one before, so two or four are taken as one.
    JOINED: tl.constexpr = min(KEY_TILES & -KEY_TILES, MOST_JOINED) if KEY_TILES > 0 else 1
    PARTS: tl.constexpr = KEY_TILES // JOINED
    WIDTH: tl.constexpr = max(16, 0 + KEY[0][0]) * JOINED
    # For either loop anew: kept through the one without masks, what the other needs would take registers.
    query, row_mask, begin, all_see, end, block_table, region_k, region_v = tile_of_queries(
        step, strides, query_tile, request, GROUP_HEADS, QUERIES, QUERY_HEADS, FIELDS, M, WINDOW
    )
    begin = tl.multiple_of(begin, 16)
    whole = begin
    if WINDOW > 0:
        whole = begin + tl.cdiv(tl.maximum(end - WINDOW - begin, 0), 16) * 16
    rest = whole + tl.maximum(tl.minimum(all_see, end) - whole, 0) // WHOLE * WHOLE
    first = tl.multiple_of((begin, whole, rest)[PART], 16)
    last = (whole, rest, end)[PART]
    queries = load_queries(query, row_mask, region_k, ((WIDTH, 0, 0, 0), (PARTS, 0, 0, 0)))
    row_last = all_see - 1 + tl.arange(0, M) // QUERY_HEADS
    row_end = tl.minimum(row_last, last - 1)
    # What pages the next tokens are in is read while these are attended to.
    blocks = _blocks(block_table, first, end, BLOCK_SIZE, N, True)
    for start in tl.range(first, last, N, num_stages=STAGES - 1 if STAGES > 1 else 1):
        n = start + tl.arange(0, N)
        known = blocks
        # Of whole tiles, the last one's again: then the next ones are in a row.
        following = start + N if MASKED else tl.minimum(start + N, last - N)
        blocks = _blocks(block_table, following, end, BLOCK_SIZE, N, MASKED)

        s = tl.zeros([M, N], dtype=tl.float32)
        keys = load_tiles(page, stride, known, start, end, region_k, BLOCK_SIZE, N, WIDTH, PARTS, MASKED)
        for tile in tl.static_range(PARTS):
            s = tl.dot(queries[tile], tl.trans(keys[tile]), s, input_precision=PRECISION)
        if SOFT_CAP > 0:
            s = capped(s * qk_scale, SOFT_CAP)
        if MASKED:
            seen = n[None, :] <= row_end[:, None]
            if WINDOW > 0:
                seen = seen & (n[None, :] > row_last[:, None] - WINDOW)
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        base = m_new * factor
        if MASKED:
            # A row that has seen nothing yet would subtract infinity from infinity.
            base = tl.where(m_new == float("-inf"), 0.0, base)
        p = tl.exp2(s * factor - base[:, None])
        alpha = tl.exp2(m * factor - base)
        total = total * alpha + tl.sum(p, 1)
        m = m_new

        values = load_tiles(page, stride, known, start, end, region_v, BLOCK_SIZE, N, CHUNK, VALUE_TILES, MASKED)
        b_p = p.to(DTYPE)
        added = ()
        for tile in tl.static_range(VALUE_TILES):
            o = tl.dot(b_p, values[tile], acc[tile] * alpha[:, None], input_precision=PRECISION)
            added = added + (o,)  # type: ignore[assignment]  # noqa: RUF005
        # What the group does not have stays 0.
        acc = added + acc[VALUE_TILES:]
    return m, total, acc


@triton.jit
def attend_exact(
    step,
    strides,
    query_tile,
    request,
    page,
    stride,
    qk_scale,
    BLOCK_SIZE: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    FIELDS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Returns maximum [M] and total [M] of the scores' powers of 2, and accumulators of v' (see `no_values`).

    Args:
        step, strides, query_tile, request: see `tile_of_queries`.
        page, stride: the cache and its block stride.
        KEY, VALUE: chunks and tiles of `table.SideShape`, of 16 bits alone.
        WINDOW: tokens that a row sees, the last included; 0 for all up to the last.
        SOFT_CAP: see `capped`; 0 for none.
    """
    K: tl.constexpr = 0 + KEY[1][0]
    V: tl.constexpr = 0 + VALUE[1][0]
    # Where all groups have all tiles, there is one variant.
    K_HALF: tl.constexpr = K if (0 + KEY[2][0]) == K else (K + 1) // 2
    V_HALF: tl.constexpr = V if (0 + VALUE[2][0]) == V else (V + 1) // 2
    factor = 1.0 if SOFT_CAP > 0 else qk_scale
    so_far = (
        tl.full([M], float("-inf"), dtype=tl.float32),
        tl.zeros([M], dtype=tl.float32),
        no_values(M, VALUE),
    )
    if WINDOW > 0:
        so_far = _attend(
            step, strides, query_tile, request, so_far, page, stride, qk_scale, BLOCK_SIZE, GROUP_HEADS, QUERIES,
            QUERY_HEADS, FIELDS, M, min(N, FEW), N, STAGES, KEY, VALUE, K, V, 0, PRECISION, WINDOW, SOFT_CAP,
        )  # fmt: skip
    group = tl.load(step[4] + 4 * (tl.program_id(1) // GROUP_HEADS))
    region_k = step[5] + group * (2 * FIELDS)
    half_k = tl.load(region_k + 1) <= K_HALF * KEY[0][0]
    half_v = tl.load(region_k + FIELDS + 1) <= V_HALF * VALUE[0][0]
    for kt in tl.static_range(K_HALF, K + 1, max(1, K - K_HALF)):
        for vt in tl.static_range(V_HALF, V + 1, max(1, V - V_HALF)):
            chosen = True
            if K_HALF < K:
                chosen = half_k == (kt == K_HALF)
            if V_HALF < V:
                chosen = chosen & (half_v == (vt == V_HALF))
            if chosen:
                so_far = _attend(
                    step, strides, query_tile, request, so_far, page, stride, qk_scale, BLOCK_SIZE, GROUP_HEADS,
                    QUERIES, QUERY_HEADS, FIELDS, M, N, N, STAGES, KEY, VALUE, kt, vt, 1, PRECISION, WINDOW, SOFT_CAP,
                )  # fmt: skip
    m, total, acc = _attend(
        step, strides, query_tile, request, so_far, page, stride, qk_scale, BLOCK_SIZE, GROUP_HEADS, QUERIES,
        QUERY_HEADS, FIELDS, M, min(N, FEW), N, STAGES, KEY, VALUE, K, V, 2, PRECISION, WINDOW, SOFT_CAP,
    )  # fmt: skip
    return m * factor, total, acc
