# SPDX-License-Identifier: Apache-2.0
"""Attention of one warp over codes, by products of 8-bit integers: few query rows, a latent group of few columns.

What `warp` does, but that codes are never turned into 16-bit numbers: a register holds four of them where it would hold
two, masking takes one instruction for four, and half as many products do.

What multiplies codes has 16 bits, in two columns of 8: a number n is 256 high + low, both signed bytes. The operands
have 8 columns at least, decode rarely has more than 4 query heads, so that these columns cost nothing. Queries become
such numbers once, by the largest of each row; weights of values do so tile by tile, by the largest of the tile and row,
so that a token of much weight takes no precision from those of other tiles. Sums are exact.

How codes are fields of a byte, and an odd integer a sum of them, says `fields`.

Legend: R query rows, N tokens, W words. A "region" is a side's row of `table.regions`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mkv_kernels.fused import table
from mkv_kernels.fused.fields import (
    WORTH,
    bytes_of,
    bytes_of_numbers,
    coordinates_of,
    field_of,
    fields_of,
    joined,
    low_bytes,
    rounded,
    signed,
    tiers_of,
    whole,
    words_in,
    words_of,
)
from mkv_kernels.fused.tile import capped, coordinates, scales_at, scales_of
from mkv_kernels.fused.warp import by_token, load_blocks, load_side, no_values, scaled, seen_by, stretches_of

KEY_WORDS, VALUE_WORDS = tl.constexpr(table.KEY_WORDS), tl.constexpr(table.VALUE_WORDS)
LEAST = tl.constexpr(1e-30)
"""What takes the place of a largest number of 0."""


@triton.jit
def load_code(query, row_mask, word, region, HALF: tl.constexpr, CODE: tl.constexpr):
    """q' of a byte's code, [R, W] float32; 0 where there is none."""
    col, inside = coordinates_of(word, region, HALF, CODE)
    mask = inside[None, :] & row_mask[:, None]
    # Two and two are neighbours, all tiers' words being even; said so that neighbouring threads get neighbouring words,
    # for only then do all versions of Triton keep them as products read them.
    at = tl.max_contiguous(query[:, None] + col[None, :], [1, 2])
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def weigh_queries(query, row_mask, region, R: tl.constexpr, KEY: tl.constexpr):
    """What fields of keys are multiplied by, [R, KEY_WORDS] by tile, half and field; and the scores' constant, [R].

    Shapes: query [R] pointers.
    """
    weights = ()
    constant = tl.zeros([R], dtype=tl.float32)
    for tile in tl.static_range(0 + KEY[0]):
        word = words_in(tile, KEY_WORDS)
        _is_8, is_4, is_2 = tiers_of(word, region)
        four, two = is_4[None, :], is_2[None, :]
        for half in tl.static_range(2):
            q_0 = load_code(query, row_mask, word, region, half, 0)
            q_1 = load_code(query, row_mask, word, region, half, 1)
            low = tl.where(two, q_1 * 0.5, q_0 * 2.0)
            high = tl.where(four, q_1 * 0.125, q_0 * 2.0)
            rest = tl.where(four, q_1 - 15.0 * q_0, q_0)
            if tile < KEY[1]:
                q_2 = load_code(query, row_mask, word, region, half, 2)
                q_3 = load_code(query, row_mask, word, region, half, 3)
                high = tl.where(two, q_3 * 0.03125, high)
                rest = tl.where(two, q_3 - 3.0 * (q_0 + q_1 + q_2), rest)
                first = tl.where(two, q_0 * 2.0 - q_1 * 0.5, 0.0)
                third = tl.where(two, q_2 * 0.125 - q_3 * 0.03125, 0.0)
                weights = weights + (low, high, first, third)  # type: ignore[assignment]  # noqa: RUF005
            else:
                weights = weights + (low, high)  # type: ignore[assignment]  # noqa: RUF005
            constant += tl.sum(rest, 1)
    return weights, constant


@triton.jit
def quantise_queries(weights, R: tl.constexpr, PTX: tl.constexpr):
    """Signed pairs of bytes of the weights, [KEY_WORDS, 2 R]; what products with the lower and with the upper fields
    are worth, [R] each: they are far apart, and so have a scale each; and [R] zeros, but for rows that are not finite,
    which no integer would show."""
    largest_low, largest_high = tl.zeros([R], dtype=tl.float32), tl.zeros([R], dtype=tl.float32)
    for i in tl.static_range(len(weights)):
        largest = tl.max(tl.abs(weights[i]), 1)
        if i % 2 == 0:
            largest_low = tl.maximum(largest_low, largest)
        else:
            largest_high = tl.maximum(largest_high, largest)
    zeros = (largest_low - largest_low) + (largest_high - largest_high)
    worth = (tl.maximum(largest_low, LEAST) * WORTH, tl.maximum(largest_high, LEAST) * WORTH)
    by = (1.0 / worth[0], 1.0 / worth[1])
    queries = ()
    for i in tl.static_range(len(weights)):
        # Words are rows to the last, as `ldmatrix` takes them: else Triton 3.7 and 3.8 load them byte by byte.
        numbers = rounded(weights[i], by[i % 2][:, None])
        pairs = tl.reshape(tl.permute(bytes_of_numbers(numbers), (0, 2, 1)), [2 * R, KEY_WORDS])
        pairs = signed(tl.trans(pairs), low_bytes(R)[None, :], PTX)
        queries = queries + (pairs,)  # type: ignore[assignment]  # noqa: RUF005
    return queries, worth, zeros


@triton.jit
def load_words(
    blocks, start, pages, strides, region, TILES: tl.constexpr, WORDS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Words of N tokens from the last one on, by tile of WORDS, [N, WORDS] or [WORDS, N]; 0 beyond the group's."""
    of = ()
    for i in tl.static_range(N // 16):
        slot = tl.multiple_of((start + 16 * i) % BLOCK_SIZE, 16)
        of = of + (blocks[i].to(tl.int64) * strides[1] + slot,)  # type: ignore[assignment]  # noqa: RUF005
    begin, words_8, words_4, words_2, _ = words_of(region)
    count = words_8 + words_4 + words_2
    token = tl.arange(0, N)
    rows = pages[1] + (by_token(of, N) + token % 16)
    tiles = ()
    for tile in tl.static_range(0 + TILES):
        word = words_in(tile, WORDS)
        at, mask = begin + (count - 1 - word) * BLOCK_SIZE, word < count
        if TRANSPOSED:
            b_x = tl.load(rows[None, :] + at[:, None], mask=mask[:, None], other=0)
        else:
            b_x = tl.load(rows[:, None] + at[None, :], mask=mask[None, :], other=0)
        tiles = tiles + (b_x,)  # type: ignore[assignment]  # noqa: RUF005
    return tiles


@triton.jit
def load_scales(blocks, start, pages, strides, region, BLOCK_SIZE: tl.constexpr, N: tl.constexpr):
    """See `tile.load_scales`; [16] per 16 tokens, of two times as many at once: a copy of so little is as slow."""
    token, second = tl.arange(0, 16), tl.arange(0, 2) == 1
    scales = ()
    for i in tl.static_range(N // 32):
        at = ()
        for j in tl.static_range(2):
            slot = tl.multiple_of((start + 32 * i + 16 * j) % BLOCK_SIZE, 16)
            at = at + (blocks[2 * i + j].to(tl.int64) * strides[1] + slot // 2,)  # type: ignore[assignment]  # noqa: RUF005
        both = tl.where(second, at[1], at[0])[None, :] + (token // 4 * 2)[:, None]  # type: ignore[misc]
        fours = (scales_at(pages[1], region) + both).to(tl.pointer_type(tl.int32), bitcast=True)
        b_s = tl.load(fours, mask=(tl.load(region + 8) + token * 0 >= 0)[:, None], other=0)
        b_0, b_1 = tl.split(b_s)
        scales = scales + (scales_of(b_0, 16), scales_of(b_1, 16))  # type: ignore[assignment]  # noqa: RUF005
    return scales


@triton.jit
def scores_of_codes(queries, keys, R: tl.constexpr, KEY: tl.constexpr, PTX: tl.constexpr):
    """Products of 16 tokens with the lower and with the upper fields, [16, R] each.

    Shapes: keys by tile, [16, KEY_WORDS].
    """
    low, high = tl.zeros([16, 2 * R], dtype=tl.int32), tl.zeros([16, 2 * R], dtype=tl.int32)
    for tile in tl.static_range(0 + KEY[0]):
        for half in tl.static_range(2):
            codes = bytes_of(keys[tile], half, PTX)
            for field in tl.static_range(fields_of(KEY[1], tile)):
                b_k = field_of(codes, field, PTX)
                if field % 2 == 0:
                    low = tl.dot(b_k, queries[0], low, out_dtype=tl.int32)
                else:
                    high = tl.dot(b_k, queries[0], high, out_dtype=tl.int32)
                queries = queries[1:]
    return joined(low, 16, R), joined(high, 16, R)


@triton.jit
def scores_of_page(
    queries, worth, constant, exact_queries, scales, block, start, last, pages, strides, region, qk_scale,
    BLOCK_SIZE: tl.constexpr, R: tl.constexpr, PTX: tl.constexpr, KEY: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, SOFT_CAP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Of 16 tokens, [16, R]; before the scale unless they are capped."""
    keys = load_words(block, start, pages, strides, region, KEY[0], KEY_WORDS, BLOCK_SIZE, 16, False)
    low, high = scores_of_codes(queries, keys, R, KEY, PTX)
    s = low * worth[0][None, :] + (high * worth[1][None, :] + constant[None, :])
    s *= scales[:, None]
    if EXACT[1][0] > 0:
        numbers = load_side(block, start, last, pages, strides, region, EXACT, BLOCK_SIZE, 16, False, WHOLE)
        pairs = tl.zeros([16, 2 * R], dtype=tl.float32)
        for tile in tl.static_range(0 + EXACT[1][0]):
            pairs = tl.dot(numbers[tile], exact_queries[tile], pairs, input_precision=PRECISION)
        even, _odd = tl.split(tl.reshape(pairs, [16, R, 2]))
        s += even
    if SOFT_CAP > 0:
        s = capped(s * qk_scale, SOFT_CAP)
    return s


@triton.jit
def no_sums(R: tl.constexpr, VALUE: tl.constexpr):
    """Sums of fields of values by tile, half and field, [VALUE_WORDS, R] each."""
    sums = ()
    for tile in tl.static_range(0 + VALUE[0]):
        for _ in tl.static_range(2 * fields_of(VALUE[1], tile)):
            sums = sums + (tl.zeros([VALUE_WORDS, R], dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit
def sums_of_tile(
    sums, words, weights, alpha, worth, TILE: tl.constexpr, R: tl.constexpr, VALUE: tl.constexpr, PTX: tl.constexpr
):
    """sums alpha + the same of one tile of words by weights, `signed`, which are `worth` so much.

    Shapes: words by 32 tokens and tile, [VALUE_WORDS, 32]; weights by 32 tokens, [32, 2 R].
    """
    added = ()
    for half in tl.static_range(2):
        for field in tl.static_range(fields_of(VALUE[1], TILE)):
            products = tl.zeros([VALUE_WORDS, 2 * R], dtype=tl.int32)
            for i in tl.static_range(len(weights)):
                b_v = field_of(bytes_of(words[i][TILE], half, PTX), field, PTX)
                products = tl.dot(b_v, weights[i], products, out_dtype=tl.int32)
            o = sums[half * fields_of(VALUE[1], TILE) + field] * alpha[None, :]
            o += joined(products, VALUE_WORDS, R) * worth[None, :]
            added = added + (o,)  # type: ignore[assignment]  # noqa: RUF005
    return added


@triton.jit
def attend_codes(
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
    R: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    EXACT_KEY: tl.constexpr,
    EXACT_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Maximum [R] and total [R] of the scores' powers of 2; sums of values' fields (see `no_sums`), and the total [R]
    of their weights; accumulators of the 16-bit tier (see `warp.no_values`), [C, 2 R], of which every other column
    counts.

    Args beside those of `tile.attend_tokens`:
        query: [R] pointers to rows of q'.
        KEY, VALUE: of `table.WordShape`.
        EXACT_KEY, EXACT_VALUE: chunks and tiles of `table.SideShape`, of the 16-bit tier alone.
    """
    factor = 1.0 if SOFT_CAP > 0 else qk_scale
    weights, constant = weigh_queries(query, row_mask, region_k, R, KEY)
    queries, worth, zeros = quantise_queries(weights, R, PTX)
    constant += zeros
    exact_queries = ()
    for tile in tl.static_range(0 + EXACT_KEY[1][0]):
        col, inside = coordinates(region_k, EXACT_KEY, 0, tile, 0)
        b_q = tl.load(query[None, :] + col[:, None], mask=inside[:, None] & row_mask[None, :], other=0.0)
        # Every other column is a row's.
        nothing = tl.zeros([0 + EXACT_KEY[0][0], R], dtype=b_q.dtype)
        b_q = tl.reshape(tl.join(b_q, nothing), [0 + EXACT_KEY[0][0], 2 * R])
        exact_queries = exact_queries + (b_q,)  # type: ignore[assignment]  # noqa: RUF005
    m = tl.full([R], float("-inf"), dtype=tl.float32)
    total = tl.zeros([16, R], dtype=tl.float32)
    weight = tl.zeros([16, R], dtype=tl.float32)
    sums = no_sums(R, VALUE)
    acc = no_values(2 * R, EXACT_VALUE)
    row_end, bounds = stretches_of(row_mask, row_last, first, last, N, WINDOW)
    last_page = (last - 1) // BLOCK_SIZE
    for stretch in tl.static_range(0 if WINDOW > 0 else 1, 3):
        begin, end = bounds[stretch], bounds[stretch + 1]
        ahead = load_blocks(block_table, begin, last_page, BLOCK_SIZE, N)
        for start in tl.range(begin, end, N, num_stages=STAGES if stretch == 1 else 1):
            blocks = ahead
            ahead = load_blocks(block_table, start + N, last_page, BLOCK_SIZE, N)
            scores = ()
            scales_k = load_scales(blocks, start, pages, strides, region_k, BLOCK_SIZE, N)
            for i in tl.static_range(N // 16):
                s = scores_of_page(
                    queries, worth, constant, exact_queries, scales_k[i], blocks[i : i + 1], start + 16 * i, last,
                    pages, strides, region_k, qk_scale, BLOCK_SIZE, R, PTX, KEY, EXACT_KEY, PRECISION, SOFT_CAP,
                    stretch == 1,
                )  # fmt: skip
                if stretch != 1:
                    n = start + 16 * i + tl.arange(0, 16)
                    s = tl.where(seen_by(n, row_end, row_last, WINDOW), s, float("-inf"))
                scores = scores + (s,)  # type: ignore[assignment]  # noqa: RUF005
            most = scores[0]  # type: ignore[misc]
            for i in tl.static_range(1, N // 16):
                most = tl.maximum(most, scores[i])
            m_new = tl.maximum(m, tl.max(most, 0))
            # A row that has seen nothing yet would subtract infinity from infinity.
            base = tl.where(m_new == float("-inf"), 0.0, m_new * factor)
            alpha = tl.exp2(m * factor - base)
            m = m_new
            total = total * alpha[None, :]
            powers, shares = (), ()
            scales_v = load_scales(blocks, start, pages, strides, region_v, BLOCK_SIZE, N)
            for i in tl.static_range(N // 16):
                p = tl.exp2(scores[i] * factor - base[None, :])
                total += p
                scales = scales_v[i]
                if stretch != 1:
                    # Behind the last token a scale may be anything, and 0 times it not 0.
                    scales = tl.where(start + 16 * i + tl.arange(0, 16) < last, scales, 0.0)
                powers = powers + (p,)  # type: ignore[assignment]  # noqa: RUF005
                shares = shares + (p * scales[:, None],)  # type: ignore[assignment]  # noqa: RUF005
            most = shares[0]  # type: ignore[misc]
            for i in tl.static_range(1, N // 16):
                most = tl.maximum(most, shares[i])
            worth_v = tl.maximum(tl.max(most, 0), LEAST) * WORTH
            by = 1.0 / worth_v
            weight = weight * alpha[None, :]
            integers, words = (), ()
            for i in tl.static_range(N // 32):
                w0, w1 = rounded(shares[2 * i], by[None, :]), rounded(shares[2 * i + 1], by[None, :])
                weight += (whole(w0) + whole(w1)) * worth_v[None, :]
                x = tl.join(bytes_of_numbers(w0), bytes_of_numbers(w1))
                pairs = tl.reshape(tl.permute(x, (3, 0, 1, 2)), [32, 2 * R])
                integers = integers + (signed(pairs, low_bytes(R)[None, :], False),)  # type: ignore[assignment]  # noqa: RUF005
                words = words + (  # type: ignore[assignment]  # noqa: RUF005
                    load_words(
                        blocks[2 * i : 2 * i + 2], start + 32 * i, pages, strides, region_v, VALUE[0], VALUE_WORDS,
                        BLOCK_SIZE, 32, True,
                    ),
                )  # fmt: skip
            added = ()
            for tile in tl.static_range(0 + VALUE[0]):
                o = sums[: 2 * fields_of(VALUE[1], tile)]
                # What all groups have needs no branch.
                if tile < VALUE[2]:  # noqa: SIM114
                    o = sums_of_tile(o, words, integers, alpha, worth_v, tile, R, VALUE, PTX)
                elif tile * VALUE_WORDS < tl.load(region_v + 3) + tl.load(region_v + 5) + tl.load(region_v + 7):
                    o = sums_of_tile(o, words, integers, alpha, worth_v, tile, R, VALUE, PTX)
                added = added + o
                sums = sums[2 * fields_of(VALUE[1], tile) :]
            sums = added
            if EXACT_VALUE[1][0] > 0:
                acc = scaled(acc, tl.reshape(tl.join(alpha, alpha), [2 * R]))
                for i in tl.static_range(N // 16):
                    numbers = load_side(
                        blocks[i : i + 1], start + 16 * i, last, pages, strides, region_v, EXACT_VALUE, BLOCK_SIZE, 16,
                        True, stretch == 1,
                    )  # fmt: skip
                    b_p = tl.reshape(tl.join(powers[i], powers[i]), [16, 2 * R]).to(pages[0].dtype.element_ty)
                    more = ()
                    for tile in tl.static_range(0 + EXACT_VALUE[1][0]):
                        o = tl.dot(numbers[tile], b_p, acc[tile], input_precision=PRECISION)
                        more = more + (o,)  # type: ignore[assignment]  # noqa: RUF005
                    acc = more
    return m * factor, tl.sum(total, 0), sums, tl.sum(weight, 0), acc


@triton.jit
def odd_sums(sums, weight, word, region, FIELDS: tl.constexpr):
    """Sums of odd integers by a byte's codes, [VALUE_WORDS, R] each, from those of its fields."""
    _is_8, is_4, is_2 = tiers_of(word, region)
    four, two = is_4[:, None], is_2[:, None]
    low, high, w = sums[0], sums[1], weight[None, :]
    zeroth = tl.where(four, 2.0 * low - 15.0 * w, 2.0 * (low + high) + w)
    first = 0.125 * high + w
    if FIELDS == 4:
        zeroth = tl.where(two, 2.0 * sums[2] - 3.0 * w, zeroth)
        first = tl.where(two, 0.5 * (low - sums[2]) - 3.0 * w, first)
        second = 0.125 * sums[3] - 3.0 * w
        third = 0.03125 * (high - sums[3]) + w
        odd = (zeroth, first, second, third)
    else:
        odd = (zeroth, first)  # type: ignore[assignment]
    return odd


@triton.jit
def store_sums(out, row_mask, region, sums, weight, VALUE: tl.constexpr):
    """Where a row's coordinates go. Shapes: out [R] pointers."""
    for tile in tl.static_range(0 + VALUE[0]):
        word = words_in(tile, VALUE_WORDS)
        for half in tl.static_range(2):
            odd = odd_sums(sums[: fields_of(VALUE[1], tile)], weight, word, region, fields_of(VALUE[1], tile))
            for code in tl.static_range(fields_of(VALUE[1], tile)):
                col, inside = coordinates_of(word, region, half, code)
                tl.store(out[None, :] + col[:, None], odd[code], mask=inside[:, None] & row_mask[None, :])
            sums = sums[fields_of(VALUE[1], tile) :]
