# SPDX-License-Identifier: Apache-2.0
"""The parts of a task: a query's coordinates, a chunk of tokens and their scores, weights and values, and the output.

Arguments that end in `_at` are addresses; `rows` and `kind` are `tile.lengths` where tiles are called.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from mkv_kernels.compiled.tile import (
    EXACT,
    EXACT_HALF,
    EXACT_PAIR,
    HIGH_PARTS,
    LOW_PARTS,
    NIBBLES,
    TOKENS,
    cap,
    coordinate_of,
    floats,
    int32s,
    int64s,
    largest,
    lift,
    load_number,
    scores,
    store_number,
    uint8s,
    weigh,
    weights,
)
from mkv_kernels.compiled.vector import LANES, UNIT

CHUNK = 128
"""Tokens between two looks at the largest score: their keys or values fit a processor's first cache."""
Int = Any


@njit
def fill(at: Int, count: Int, number: float) -> None:
    for i in range(count):
        floats(at)[i] = number


@njit
def load_query(
    row_at: Int, number_at: Int, key_at: Int, rows: Int, pairs: bool, odd_4: float, odd_2: float, kind: Any
) -> None:
    """q' as the units of the pages come: parts of codes, then the 16-bit tier; the rest of a unit stays 0."""
    key, itemsize, operand = int64s(key_at), 4 if len(kind) == 0 else 2, 2 if pairs else 4
    stride = rows * UNIT * operand
    first_unit, coordinate = 0, key[1]
    for tier in range(3):
        size = key[3 + 2 * tier]
        parts = 4 if tier == 2 else 2
        for part in range(parts):
            # Of 8 bits, the upper half is worth 16 times the lower, of the same coordinate.
            times = odd_2 if tier == 2 else (odd_4 * 16 if tier == 0 and part == 1 else odd_4)
            for byte in range(size):
                at = row_at + (first_unit + byte // UNIT * parts + part) * stride + byte % UNIT * operand
                i = coordinate + coordinate_of(byte, 0 if tier == 0 else part, size, 1 if tier == 0 else parts)
                store_operand(at, load_number(number_at + i * itemsize, kind) * times, pairs)
        first_unit += parts * ((size + UNIT - 1) // UNIT)
        coordinate += size * (1 if tier == 0 else parts)
    for i in range(key[1]):
        at = row_at + (first_unit + i // UNIT) * stride + i % UNIT * operand
        store_operand(at, load_number(number_at + i * itemsize, kind), pairs)


@njit
def store_operand(at: Int, number: float, pairs: bool) -> None:
    if pairs:
        store_number(at, np.float32(number), (0, 0, 0))
    else:
        floats(at)[0] = number


@njit
def find_tokens(
    pages_at: Int, slots_at: Int, first: Int, count: Int, cache: Int, page_stride: Int, table_at: Int, block_size: Int
) -> None:
    """Addresses of the pages of `count` tokens from `first` on, and their places there."""
    pages, slots, table = int64s(pages_at), int64s(slots_at), int32s(table_at)
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
        slot += 1
    # What fills up a tile is the last token again: nothing is read of a page that is not the request's own.
    for i in range(count, count + TOKENS):
        pages[i] = pages[count - 1]
        slots[i] = slots[count - 1]


@njit
def load_scales(out_at: Int, values_at: Int, pages_at: Int, slots_at: Int, count: Int, offset: Int) -> None:
    """Scales of tokens, 1 where no coordinate is coded; 0 up to a multiple of 16, for nothing is weighed there."""
    out, values, pages, slots = floats(out_at), floats(values_at), int64s(pages_at), int64s(slots_at)
    for i in range(count):
        out[i] = values[uint8s(pages[i] + offset)[slots[i]]] if offset >= 0 else 1.0
    for i in range(count, (count + LANES - 1) // LANES * LANES):
        out[i] = 0.0


@njit
def score(
    s_at: Int,
    q_at: Int,
    key_at: Int,
    key_units: Int,
    pages_at: Int,
    slots_at: Int,
    scales_at: Int,
    count: Int,
    num_tiles: Int,
    cap_at: Int,
    rows: Any,
    kind: Any,
) -> None:
    """Scores of a chunk, [rows, CHUNK]; minus infinity from its last token to a multiple of 16.

    At `cap_at`, 0 where scores have no cap, are the two numbers that `tile.cap` takes.
    """
    tile_bytes = key_units * len(rows) * UNIT * (2 if len(kind) == 3 else 4)
    for i in range(0, count, TOKENS):
        for tile in range(num_tiles):
            out = s_at + (tile * len(rows) * CHUNK + i) * 4
            q = q_at + tile * tile_bytes
            scores(q, pages_at + 8 * i, slots_at + 8 * i, key_at, scales_at + 4 * i, out, CHUNK * 4, rows, kind)
    whole = (count + LANES - 1) // LANES * LANES
    for row in range(num_tiles * len(rows)):
        if cap_at != 0:
            cap(s_at + row * CHUNK * 4, whole // LANES, floats(cap_at)[0], floats(cap_at)[1])
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
    o_at: Int,
    value_units: Int,
    rows: Any,
    kind: Any,
) -> None:
    """Weights of a row's chunk, and of what was summed before where the largest score grew."""
    whole = (count + LANES - 1) // LANES
    top, total = floats(top_at), floats(sum_at)
    most = largest(s_at, whole)
    if most > top[0]:
        shrink = np.float32(2.0 ** ((top[0] - most) * factor))
        top[0] = most
        total[0] *= shrink
        for unit in range(value_units):
            o = floats(o_at + unit * len(rows) * UNIT * 4)
            for i in range(UNIT):
                o[i] *= shrink
    total[0] += weights(s_at, whole, top[0], factor, scales_at, p_at, w_at, kind)


@njit
def weigh_values(
    o_at: Int,
    p_at: Int,
    w_at: Int,
    value_at: Int,
    pages_at: Int,
    slots_at: Int,
    count: Int,
    rows: Any,
    kind: Any,
) -> None:
    """Adds the values of a chunk to one tile of rows, unit after unit."""
    value, unit_bytes, stride = int64s(value_at), len(rows) * UNIT * 4, CHUNK * 4
    for tier in range(3):
        offset, size = value[2 + 2 * tier], value[3 + 2 * tier]
        for byte in range(0, size, UNIT):
            at, left = offset + byte, size - byte
            if tier < 2:
                weigh(o_at, w_at, stride, pages_at, slots_at, count, at, size, left, NIBBLES, rows, kind)
                o_at += 2 * unit_bytes
            else:
                weigh(o_at, w_at, stride, pages_at, slots_at, count, at, size, left, LOW_PARTS, rows, kind)
                o_at += 2 * unit_bytes
                weigh(o_at, w_at, stride, pages_at, slots_at, count, at, size, left, HIGH_PARTS, rows, kind)
                o_at += 2 * unit_bytes
    itemsize = 4 if len(kind) == 0 else 2
    size, first = value[1] * itemsize, 0
    while first < value[1]:
        at, left = value[0] + first * itemsize, value[1] - first
        if left >= 2 * UNIT:
            weigh(o_at, p_at, stride, pages_at, slots_at, count, at, size, 0, EXACT_PAIR, rows, kind)
            o_at += 2 * unit_bytes
            first += 2 * UNIT
        elif left >= UNIT:
            weigh(o_at, p_at, stride, pages_at, slots_at, count, at, size, 0, EXACT, rows, kind)
            o_at += unit_bytes
            first += UNIT
        else:
            weigh(o_at, p_at, stride, pages_at, slots_at, count, at, size, 0, EXACT_HALF, rows, kind)
            first += UNIT


@njit
def place_in_unit(coordinate: Int, pairs: bool) -> Int:
    """Where `weigh` leaves a coordinate of a unit: as `vector.interleaved` does, if at all."""
    if pairs:
        return coordinate % 8 // 4 * 16 + coordinate // 8 * 4 + coordinate % 4
    return coordinate


@njit
def put_in_order(found_at: Int, o_at: Int, value_at: Int, rows: Int, pairs: bool, odd_4: float, odd_2: float) -> None:
    """From a row's units to its coordinates."""
    found, o, value = floats(found_at), floats(o_at), int64s(value_at)
    stride = rows * UNIT
    first_unit, coordinate = 0, value[1]
    for tier in range(3):
        size = value[3 + 2 * tier]
        parts = 4 if tier == 2 else 2
        for part in range(parts):
            for byte in range(size):
                i = coordinate + coordinate_of(byte, 0 if tier == 0 else part, size, 1 if tier == 0 else parts)
                x = o[(first_unit + byte // UNIT * parts + part) * stride + place_in_unit(byte % UNIT, pairs)]
                if tier == 0 and part == 1:
                    found[i] += x * (16 * odd_4)
                else:
                    found[i] = x * (odd_2 if tier == 2 else odd_4)
        first_unit += parts * ((size + UNIT - 1) // UNIT)
        coordinate += size * (1 if tier == 0 else parts)
    for i in range(value[1]):
        found[i] = o[(first_unit + i // UNIT) * stride + place_in_unit(i % UNIT, pairs)]


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
