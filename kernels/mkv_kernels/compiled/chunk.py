# SPDX-License-Identifier: Apache-2.0
"""The parts of a task: a query's coordinates, a chunk of tokens and their scores, weights and values, and the output.

Arguments that end in `_at` are addresses; `rows` and `kind` are `tile.lengths` where tiles are called.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from mkv_kernels.compiled.scores import cap, code_scores, largest, scales, scores
from mkv_kernels.compiled.tile import (
    PARTS,
    STRIPS,
    TOKENS,
    coordinate_of,
    floats,
    int32s,
    int64s,
    load_number,
    store_number,
)
from mkv_kernels.compiled.values import (
    EXACT,
    EXACT_HALF,
    EXACT_PAIR,
    HIGH_PARTS,
    LOW_PARTS,
    NIBBLES,
    lift,
    weigh,
    weigh_codes,
    weights,
)
from mkv_kernels.compiled.vector import LANES, PAIRS, UNIT

CHUNK = 256
"""Tokens between two looks at the largest score: their keys or values fit a processor's first cache, and sums of codes
are seldom gathered from the lanes that they are spread over."""
Int = Any


@njit
def fill(at: Int, count: Int, number: float) -> None:
    for i in range(count):
        floats(at)[i] = number


@njit
def load_query(
    tile_at: Int,
    row: Int,
    number_at: Int,
    key_at: Int,
    coded_bytes: Int,
    rows: Int,
    pairs: bool,
    odd_4: float,
    odd_2: float,
    kind: Any,
) -> None:
    """One row of a tile's q', as `code_scores` takes it and then, from `coded_bytes` on, as `scores` does. What fills
    up a unit stays as it is.
    """
    key, itemsize, operand = int64s(key_at), 4 if len(kind) == 0 else 2, 2 if pairs else 4
    at, coordinate = tile_at, key[1]
    for tier in range(3):
        num_words, parts = key[3 + 2 * tier], PARTS[tier]
        for word in range(num_words):
            for part in range(parts):
                # Of 8 bits, the upper half is worth 16 times the lower, of the same coordinate.
                times = odd_2 if tier == 2 else (odd_4 * 16 if tier == 0 and part % 2 == 1 else odd_4)
                i = coordinate + coordinate_of(tier, word, part, num_words)
                entry = (part // 2 if pairs else part) * rows + row
                to = at + entry * 4 + (part % 2 * 2 if pairs else 0)
                store_operand(to, load_number(number_at + i * itemsize, kind) * times, pairs)
            at += parts * rows * operand
        coordinate += coordinate_of(tier, 0, parts, num_words)
    for i in range(key[1]):
        to = tile_at + coded_bytes + ((i // UNIT * rows + row) * UNIT + i % UNIT) * operand
        store_operand(to, load_number(number_at + i * itemsize, kind), pairs)


@njit
def store_operand(at: Int, number: float, pairs: bool) -> None:
    if pairs:
        store_number(at, np.float32(number), (0, 0, 0))
    else:
        floats(at)[0] = number


@njit
def find_tokens(
    pages_at: Int,
    slots_at: Int,
    strips_at: Int,
    first: Int,
    count: Int,
    cache: Int,
    page_stride: Int,
    table_at: Int,
    block_size: Int,
) -> None:
    """Addresses of the pages of `count` tokens from `first` on, and their places there; and where the first word of 16
    of them would lie.
    """
    pages, slots, strips, table = int64s(pages_at), int64s(slots_at), int64s(strips_at), int32s(table_at)
    block = first // block_size
    slot = first - block * block_size
    page = cache + table[block] * page_stride
    for i in range(count):
        if slot == block_size:
            block += 1
            slot = 0
            page = cache + table[block] * page_stride
        pages[i] = page
        slots[i] = slot
        if i % LANES == 0:
            strips[i // LANES] = page + 2 * slot
        slot += 1
    # What fills up a tile is the last token or strip again: nothing is read of a page that is not the request's own.
    for i in range(count, count + TOKENS):
        pages[i] = pages[count - 1]
        slots[i] = slots[count - 1]
    num_strips = (count + LANES - 1) // LANES
    for i in range(num_strips, num_strips + STRIPS):
        strips[i] = strips[num_strips - 1]


@njit
def load_scales(out_at: Int, strips_at: Int, slots_at: Int, count: Int, offset: Int) -> None:
    """Scales of tokens, 1 where no coordinate is coded; 0 up to a multiple of 32, for nothing is weighed there."""
    out, strips, slots = floats(out_at), int64s(strips_at), int64s(slots_at)
    if offset >= 0:
        for i in range(0, count, LANES):
            scales(strips[i // LANES] - slots[i] + offset, out_at + 4 * i)
    else:
        fill(out_at, count, 1.0)
    for i in range(count, (count + UNIT - 1) // UNIT * UNIT):
        out[i] = 0.0


@njit
def score(
    s_at: Int,
    q_at: Int,
    tile_bytes: Int,
    coded_bytes: Int,
    key_at: Int,
    pages_at: Int,
    slots_at: Int,
    strips_at: Int,
    scales_at: Int,
    skip: Int,
    count: Int,
    num_tiles: Int,
    block_size: Int,
    cap_at: Int,
    rows: Any,
    kind: Any,
) -> None:
    """Scores of a chunk, [rows, CHUNK]; minus infinity before `skip`, and from its last token to a multiple of 32.

    At `cap_at`, 0 where scores have no cap, are the two numbers that `scores.cap` takes.
    """
    key, coded = int64s(key_at), 1 if int64s(key_at)[8] >= 0 else 0
    for tile in range(num_tiles):
        q, out = q_at + tile * tile_bytes, s_at + tile * len(rows) * CHUNK * 4
        if coded != 0:
            for i in range(0, count, STRIPS * LANES):
                at = strips_at + i // LANES * 8
                code_scores(q, at, key_at, scales_at + 4 * i, out + 4 * i, CHUNK * 4, 2 * block_size, rows, kind)
        if key[1] > 0 or coded == 0:
            for i in range(0, count, TOKENS):
                at = 8 * i
                scores(q + coded_bytes, pages_at + at, slots_at + at, key_at, coded, out + 4 * i, CHUNK * 4, rows, kind)
    whole = (count + UNIT - 1) // UNIT * UNIT
    for row in range(num_tiles * len(rows)):
        if cap_at != 0:
            cap(s_at + row * CHUNK * 4, whole // LANES, floats(cap_at)[0], floats(cap_at)[1])
        fill(s_at + row * CHUNK * 4, skip, -math.inf)
        fill(s_at + (row * CHUNK + count) * 4, whole - count, -math.inf)


@njit
def weigh_scores(
    s_at: Int,
    p_at: Int,
    w_at: Int,
    top_at: Int,
    sum_at: Int,
    scales_at: Int,
    count: Int,
    factor: float,
    tile_at: Int,
    row: Int,
    value_at: Int,
    rows: Any,
    kind: Any,
) -> None:
    """Weights of a row's chunk, and of what was summed before where the largest score grew."""
    whole = (count + UNIT - 1) // UNIT * 2
    top, total = floats(top_at), floats(sum_at)
    most = largest(s_at, whole)
    if most > top[0]:
        shrink = np.float32(2.0 ** ((top[0] - most) * factor))
        top[0] = most
        total[0] *= shrink
        shrink_row(tile_at, row, value_at, shrink, len(rows))
    total[0] += weights(s_at, whole, top[0], factor, scales_at, p_at, w_at, kind)


@njit
def num_fours(side: Any) -> Int:
    """Of parts of words, 4 at a time."""
    return side[3] + side[5] + 2 * side[7]


@njit
def shrink_row(tile_at: Int, row: Int, value_at: Int, times: float, rows: Int) -> None:
    value = int64s(value_at)
    fours = num_fours(value)
    o = floats(tile_at)
    for i in range(row, fours * LANES, rows):
        # Of fewer rows than 4, the sums stand there more than once.
        o[i] *= times
    for unit in range((value[1] + UNIT - 1) // UNIT):
        o = floats(tile_at + (fours * LANES + (unit * rows + row) * UNIT) * 4)
        for i in range(UNIT):
            o[i] *= times


@njit
def weigh_values(
    tile_at: Int,
    p_at: Int,
    w_at: Int,
    value_at: Int,
    pages_at: Int,
    slots_at: Int,
    strips_at: Int,
    count: Int,
    block_size: Int,
    rows: Any,
    kind: Any,
) -> None:
    """Adds the values of a chunk to one tile of rows, word after word and unit after unit."""
    value, unit_bytes, stride = int64s(value_at), len(rows) * UNIT * 4, CHUNK * 4
    o_at, per_turn = tile_at, UNIT if len(kind) == PAIRS else LANES
    turns = (count + per_turn - 1) // per_turn
    for tier in range(3):
        offset = value[2 + 2 * tier]
        for word in range(value[3 + 2 * tier]):
            at = offset + word * 2 * block_size
            if tier < 2:
                weigh_codes(o_at, w_at, stride, strips_at, turns, at, NIBBLES, rows, kind)
            else:
                weigh_codes(o_at, w_at, stride, strips_at, turns, at, LOW_PARTS, rows, kind)
                o_at += LANES * 4
                weigh_codes(o_at, w_at, stride, strips_at, turns, at, HIGH_PARTS, rows, kind)
            o_at += LANES * 4
    itemsize = 4 if len(kind) == 0 else 2
    size, first = value[1] * itemsize, 0
    while first < value[1]:
        at, left = value[0] + first * itemsize, value[1] - first
        if left >= 2 * UNIT:
            weigh(o_at, p_at, stride, pages_at, slots_at, count, at, size, EXACT_PAIR, rows, kind)
            o_at += 2 * unit_bytes
            first += 2 * UNIT
        elif left >= UNIT:
            weigh(o_at, p_at, stride, pages_at, slots_at, count, at, size, EXACT, rows, kind)
            o_at += unit_bytes
            first += UNIT
        else:
            weigh(o_at, p_at, stride, pages_at, slots_at, count, at, size, EXACT_HALF, rows, kind)
            first += UNIT


@njit
def place_in_unit(coordinate: Int, pairs: bool) -> Int:
    """Where `weigh` leaves a coordinate of a unit: as `vector.interleaved` does, if at all."""
    if pairs:
        return coordinate % 8 // 4 * 16 + coordinate // 8 * 4 + coordinate % 4
    return coordinate


@njit
def put_in_order(
    found_at: Int, tile_at: Int, row: Int, value_at: Int, rows: Int, pairs: bool, odd_4: float, odd_2: float
) -> None:
    """From a row's sums to its coordinates."""
    found, o, value = floats(found_at), floats(tile_at), int64s(value_at)
    four, coordinate = 0, value[1]
    for tier in range(3):
        num_words, parts = value[3 + 2 * tier], PARTS[tier]
        for word in range(num_words):
            for part in range(parts):
                i = coordinate + coordinate_of(tier, word, part, num_words)
                x = o[(four + part // 4) * LANES + part % 4 * rows + row]
                if tier == 0 and part % 2 == 1:
                    found[i] += x * (16 * odd_4)
                else:
                    found[i] = x * (odd_2 if tier == 2 else odd_4)
            four += parts // 4
        coordinate += coordinate_of(tier, 0, parts, num_words)
    for i in range(value[1]):
        found[i] = o[four * LANES + (i // UNIT * rows + row) * UNIT + place_in_unit(i % UNIT, pairs)]


@njit
def combine(
    o_at: Int, row_at: Int, num_splits: Int, split_bytes: Int, partial_stride: Int, rank_v: Int, factor: float
) -> None:
    """One row's coordinates, from those of the stretches of its context."""
    o, most, total = floats(o_at), np.float32(-math.inf), np.float32(0.0)
    for i in range(num_splits):
        most = max(most, floats(row_at + i * split_bytes)[partial_stride - 2])
    fill(o_at, rank_v, 0.0)
    for i in range(num_splits):
        found = floats(row_at + i * split_bytes)
        weight = np.float32(2.0 ** ((found[partial_stride - 2] - most) * factor))
        total += weight * found[partial_stride - 1]
        for r in range(rank_v):
            o[r] += weight * found[r]
    for r in range(rank_v):
        o[r] /= total


@njit
def write_output(out: Int, o_at: Int, rank_v: Int, up_at: Int, mean_at: Int, head_size: Int, kind: Any) -> None:
    """o D + mean, or where D is 0 at `up_at`, the coordinates themselves and their mean."""
    itemsize, c = 4 if len(kind) == 0 else 2, 0
    if up_at == 0:
        for i in range(head_size):
            x = floats(mean_at)[i]
            if i < rank_v:
                x += floats(o_at)[i]
            store_number(out + i * itemsize, x, kind)
        return
    while c < head_size:
        up, mean, to = up_at + c * 4, mean_at + c * 4, out + c * itemsize
        if head_size - c >= 4 * LANES:
            lift(o_at, up, rank_v, head_size * 4, mean, to, (0, 0, 0, 0), kind)
            c += 4 * LANES
        else:
            lift(o_at, up, rank_v, head_size * 4, mean, to, (0,), kind)
            c += LANES
