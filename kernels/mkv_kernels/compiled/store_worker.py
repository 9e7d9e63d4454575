# SPDX-License-Identifier: Apache-2.0
"""What one thread does to store a step: tasks of some tokens, a latent group, and its keys, values or one head's
queries, until none is left.

    k' = (k - mean) A,  v' = (v - mean) C,  q' = q B[head]       cut to the group's rank
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import carray, from_dtype, njit

from mkv_kernels.codes import LARGEST_SCALE, LEAST_SCALE, NAN_CODE, SCALE_SHIFT, STEPS
from mkv_kernels.compiled.entry import compile_entry, record
from mkv_kernels.compiled.tile import (
    SIDE_FIELDS,
    fetch_add,
    floats,
    int16s,
    int32s,
    int64s,
    lengths,
    load_number,
    pointer_to,
    store_number,
    uint8s,
)
from mkv_kernels.compiled.values import lift
from mkv_kernels.compiled.vector import FLOAT16, ITEMSIZE, LANES

TOKENS = 8
"""Of a task: the group's basis comes from memory once for all of them."""

STEP = record(
    "counter",  # threads that came and tasks that were taken, [2]
    "num_tokens",
    "num_groups",
    "group_heads",
    "queries_per_head",
    "head_size",
    "query",  # [tokens, heads, head_size], tokens `query_stride` bytes apart; keys and values likewise
    "query_stride",
    "key",
    "key_stride",
    "value",
    "value_stride",
    "slots",  # [tokens], negative where nothing is stored
    "groups",  # [groups] GROUP
    "projected",  # [groups]: address of the first token's q', [J, M, Rk], dense; tokens follow one another
    "cache",
    "page_stride",
    "block_size",
    "scales",  # [256] floats: what a byte in a page stands for
    "zeros",  # as many floats as any rank
    "scratch",
    "scratch_stride",
)
"""A step. Addresses are named for what is there; numbers are int64 and strides in bytes."""

GROUP = np.dtype(
    [
        ("key", np.int64, (SIDE_FIELDS,)),
        ("value", np.int64, (SIDE_FIELDS,)),
        *[(name, np.int64) for name in ("rank_k", "rank_v")],
        ("key_down", np.int64),  # address of A, [n, Rk] floats
        ("key_shift", np.int64),  # of what is added to k A, [Rk]
        ("value_down", np.int64),  # of C, [n, Rv]; 0 where values arrive multiplied by it
        ("value_shift", np.int64),
        ("query_up", np.int64),  # of B, [J, d, Rk]
    ]
)
"""A latent group; its sides are `tile.SIDE_FIELDS`."""

_groups_at = pointer_to(from_dtype(GROUP))
_GROUP_BYTES, _VALUE_BYTES = GROUP.itemsize, 8 * SIDE_FIELDS
_LEAST, _LARGEST = np.float32(LEAST_SCALE), np.float32(LARGEST_SCALE)
_SHIFT, _NAN = SCALE_SHIFT, NAN_CODE
_STEP_8, _STEP_4, _STEP_2 = (np.float32(STEPS[width]) for width in (8, 4, 2))
_LARGEST_HALF = np.float32(65504)
_VECTORS = lengths(4)


def scratch_bytes(width: int) -> int:
    """One thread's, for groups of `width` coordinates: what is projected, and a token's result."""
    return 2 * -(-4 * width // 64) * 64 + 64


@njit
def project(out: Any, x_at: Any, count: Any, down: Any, rank: Any, shift: Any, kind: Any) -> None:
    """x A + shift, [rank] numbers of a kind."""
    itemsize, r = 4 if len(kind) == 0 else 2, 0
    while r < rank:
        if rank - r >= 4 * LANES:
            lift(x_at, down + r * 4, count, rank * 4, shift + r * 4, out + r * itemsize, _VECTORS, kind)
            r += 4 * LANES
        else:
            lift(x_at, down + r * 4, count, rank * 4, shift + r * 4, out + r * itemsize, (0,), kind)
            r += LANES


@njit
def load_floats(out: Any, at: Any, count: Any, kind: Any) -> None:
    itemsize = 4 if len(kind) == 0 else 2
    for i in range(count):
        floats(out)[i] = load_number(at + i * itemsize, kind)


@njit
def scale_code(x_at: Any, count: Any, bits_at: Any) -> Any:
    """As `codes.scale_codes`: the root mean square, rounded to float16, and that to its upper bits."""
    total = np.float32(0.0)
    for i in range(count):
        total += floats(x_at)[i] * floats(x_at)[i]
    size = np.float32(math.sqrt(total / np.float32(count)))
    if math.isnan(size):
        return _NAN
    floats(bits_at)[0] = min(max(size, _LEAST), _LARGEST)
    bits = int32s(bits_at)[0] - (112 << 23)
    half = (bits + 0xFFF + ((bits >> 13) & 1)) >> 13
    return (half + (1 << (_SHIFT - 1))) >> _SHIFT


@njit
def code(x: Any, step: Any, half: Any) -> Any:
    """As `codes.quantise`; NaN, which the scale keeps, gets any."""
    level = np.floor(x / step) + np.float32(half)
    if level >= np.float32(2 * half):
        return 2 * half - 1
    return int(level) if level > np.float32(0.0) else 0


@njit
def write_tier(out: Any, word_stride: Any, x_at: Any, num_words: Any, scale: Any, width: Any, step: Any) -> None:
    """See `codes.pack`; words lie `word_stride` bytes apart."""
    x, half = floats(x_at), 1 << (width - 1)
    for word in range(num_words):
        bits = 0
        for part in range(16 // width):
            bits |= code(x[word + part * num_words] / scale, step, half) << (part * width)
        int16s(out + word * word_stride)[0] = bits


@njit
def write_side(
    side_at: Any, x_at: Any, rank: Any, page: Any, place: Any, block_size: Any, scales: Any, bits_at: Any, kind: Any
) -> None:
    """Coordinates [rank] of one token, to its place in a page."""
    side, x = int64s(side_at), floats(x_at)
    itemsize, exact = 4 if len(kind) == 0 else 2, side[1]
    out = page + side[0] + place * exact * itemsize
    for i in range(exact):
        number = x[i]
        if len(kind) == FLOAT16:
            if number > _LARGEST_HALF:
                number = _LARGEST_HALF
            elif number < -_LARGEST_HALF:
                number = -_LARGEST_HALF
        store_number(out + i * itemsize, number, kind)
    if side[8] < 0:
        return
    found = scale_code(x_at + 4 * exact, rank - exact, bits_at)
    uint8s(page + side[8])[place] = found
    scale, first, at, stride = floats(scales)[found], x_at + 4 * exact, page + 2 * place, 2 * block_size
    write_tier(at + side[2], stride, first, side[3], scale, 8, _STEP_8)
    first += 4 * 2 * side[3]
    write_tier(at + side[4], stride, first, side[5], scale, 4, _STEP_4)
    first += 4 * 4 * side[5]
    write_tier(at + side[6], stride, first, side[7], scale, 2, _STEP_2)


@cache
def compile_store(kind: int) -> Any:
    """A C function of the address of a `STEP`, for numbers of a kind."""
    return compile_entry(_make_worker(kind), STEP, kind)


def _make_worker(kind: int) -> Callable[[Any], None]:
    kind_, itemsize = lengths(kind), ITEMSIZE[kind]

    def worker(steps: Any) -> None:
        step = carray(steps, 1)[0]
        x_at = step.scratch + fetch_add(step.counter) * step.scratch_stride
        bits_at = x_at + step.scratch_stride - 64
        found_at = x_at + (bits_at - x_at) // 2
        heads, d = step.group_heads, step.head_size
        parts = heads + 2
        num_tasks = (step.num_tokens + TOKENS - 1) // TOKENS * step.num_groups * parts
        while True:
            task = fetch_add(step.counter + 8)
            if task >= num_tasks:
                break
            part, rest = task % parts, task // parts
            g, first = rest % step.num_groups, rest // step.num_groups * TOKENS
            key_at = step.groups + g * _GROUP_BYTES
            group = carray(_groups_at(key_at), 1)[0]
            for token in range(first, min(first + TOKENS, step.num_tokens)):
                if part >= 2:
                    j, rows = part - 2, step.queries_per_head
                    q_at = step.query + token * step.query_stride + (g * heads + j) * rows * d * itemsize
                    out = int64s(step.projected)[g] + (token * heads + j) * rows * group.rank_k * itemsize
                    up = group.query_up + j * d * group.rank_k * 4
                    for row in range(rows):
                        load_floats(x_at, q_at + row * d * itemsize, d, kind_)
                        project(out + row * group.rank_k * itemsize, x_at, d, up, group.rank_k, step.zeros, kind_)
                    continue
                slot = int64s(step.slots)[token]
                if slot < 0:
                    continue
                size = step.block_size
                page, place = step.cache + slot // size * step.page_stride, slot % size
                offset = g * heads * d * itemsize
                if part == 0:
                    load_floats(x_at, step.key + token * step.key_stride + offset, heads * d, kind_)
                    project(found_at, x_at, heads * d, group.key_down, group.rank_k, group.key_shift, ())
                    write_side(key_at, found_at, group.rank_k, page, place, size, step.scales, bits_at, kind_)
                    continue
                load_floats(x_at, step.value + token * step.value_stride + offset, heads * d, kind_)
                at = found_at
                if group.value_down == 0:
                    at = x_at
                    for i in range(group.rank_v):
                        floats(x_at)[i] += floats(group.value_shift)[i]
                else:
                    project(found_at, x_at, heads * d, group.value_down, group.rank_v, group.value_shift, ())
                write_side(key_at + _VALUE_BYTES, at, group.rank_v, page, place, size, step.scales, bits_at, kind_)

    return worker
