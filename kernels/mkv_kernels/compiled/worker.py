# SPDX-License-Identifier: Apache-2.0
"""What one thread does in a decode step: tasks of one query, latent group and stretch of context, until none is left.

    o[row] = sum_t p[row, t] v'[t] / sum_t p[row, t]      p[row, t] = exp((s[row, t] - m[row]) scale)
                                                          s[row, t] = q'[row] k'[t]

(with a soft-cap, soft_cap / scale tanh(s scale / soft_cap) in place of s)

in chunks of tokens, rescaled when m, the largest score yet, grows; whoever finishes the last stretch of a query and
group combines all of them and multiplies by D. Rows are the query heads of the group, in tiles of equal size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import carray, from_dtype

from mkv_kernels.compiled.chunk import (
    CHUNK,
    combine,
    fill,
    find_tokens,
    load_query,
    load_scales,
    put_in_order,
    score,
    weigh_scores,
    weigh_values,
    write_output,
)
from mkv_kernels.compiled.entry import compile_entry, record
from mkv_kernels.compiled.tile import SIDE_FIELDS, STRIPS, TOKENS, fetch_add, floats, int64s, lengths, pointer_to
from mkv_kernels.compiled.vector import ITEMSIZE, LANES, PAIRS, code_factor

STEP = record(
    "counters",  # [2 + queries * groups] zeros: threads that came, tasks that were taken, stretches that are done
    "num_queries",
    "num_groups",
    "group_heads",
    "num_rows",
    "head_size",
    "num_splits",
    "split",  # tokens, a multiple of CHUNK
    "groups",  # [groups] GROUP
    "queries",  # [groups, 2]: address of the first token's q', and bytes to the next token's
    "requests",  # [queries]: row of the block table
    "tokens",  # [queries]: token of the step
    "lengths",  # [queries]: cached tokens up to the query's own
    "window",  # how many of these it sees, from the last; 0 for all
    "block_table",  # int32, rows `table_stride` numbers apart
    "table_stride",
    "cache",
    "page_stride",
    "block_size",
    "factor",  # one float: scale / ln 2
    "cap",  # two floats, see `scores.cap`; 0 where there is none
    "scratch",
    "scratch_stride",
    "partial",  # [queries, groups, splits, rows of whole tiles, partial_stride] floats
    "partial_stride",  # the largest rank of values, and 2
    "output",
    "output_stride",
    "query_bytes",  # of a tile's q', in the group that has most
    "sums",  # floats of a tile's values, in the group that has most
)
"""A step. Addresses are named for what is there; numbers are int64 and strides in bytes where nothing is said."""

GROUP = np.dtype(
    [
        ("key", np.int64, (SIDE_FIELDS,)),
        ("value", np.int64, (SIDE_FIELDS,)),
        ("coded_bytes", np.int64),  # of a tile's q', before that of the 16-bit tier
        *[(name, np.int64) for name in ("query_bytes", "sums", "rank_k", "rank_v")],
        ("up", np.int64),  # address of D, [J, Rv, d] floats; 0 where it is folded into the weights
        ("mean", np.int64),  # of [J, d] floats
    ]
)
"""A latent group; its sides are `tile.SIDE_FIELDS`."""

_GROUP_BYTES = GROUP.itemsize
_VALUE_BYTES = 8 * SIDE_FIELDS
_groups_at = pointer_to(from_dtype(GROUP))


def scratch_bytes(num_tiles: int, rows: int, query_bytes: int, sums: int) -> int:
    """One thread's, in the order in which `worker` cuts it up."""
    per_tile = query_bytes + rows * (3 * 4 * CHUNK + 8) + 4 * sums
    per_token = (CHUNK + TOKENS) * 16 + (CHUNK // LANES + STRIPS) * 8 + CHUNK * 8
    return -(-(num_tiles * per_tile + per_token) // 64) * 64


@cache
def compile_worker(kind: int, rows: int) -> Any:
    """A C function of the address of a `STEP`, for numbers of a kind and tiles of so many rows."""
    return compile_entry(_make_worker(kind, rows), STEP, kind, rows)


def _make_worker(kind: int, rows: int) -> Callable[[Any], None]:
    # The first two are known when code is compiled, and part of the key of what numba caches, as the others are.
    kind_, rows_ = lengths(kind), lengths(rows)
    itemsize, pairs = ITEMSIZE[kind], kind == PAIRS
    odd_4, odd_2 = 1 / code_factor(kind, 4), 1 / code_factor(kind, 2)

    def worker(steps: Any) -> None:
        step = carray(steps, 1)[0]
        num_tiles = (step.num_rows + rows - 1) // rows
        tiled = num_tiles * rows
        q_at = step.scratch + fetch_add(step.counters) * step.scratch_stride
        s_at = q_at + num_tiles * step.query_bytes
        p_at = s_at + tiled * CHUNK * 4
        w_at = p_at + tiled * CHUNK * 4
        o_at = w_at + tiled * CHUNK * 4
        key_scales_at = o_at + num_tiles * step.sums * 4
        value_scales_at = key_scales_at + CHUNK * 4
        top_at = value_scales_at + CHUNK * 4
        sum_at = top_at + tiled * 4
        pages_at = sum_at + tiled * 4
        slots_at = pages_at + (CHUNK + TOKENS) * 8
        strips_at = slots_at + (CHUNK + TOKENS) * 8
        factor = floats(step.factor)[0]
        num_tasks = step.num_queries * step.num_groups * step.num_splits
        while True:
            task = fetch_add(step.counters + 8)
            if task >= num_tasks:
                break
            split, pair = task % step.num_splits, task // step.num_splits
            g, query = pair % step.num_groups, pair // step.num_groups
            key_at = step.groups + g * _GROUP_BYTES
            value_at = key_at + _VALUE_BYTES
            group = carray(_groups_at(key_at), 1)[0]
            token, length = int64s(step.tokens)[query], int64s(step.lengths)[query]
            table_at = step.block_table + int64s(step.requests)[query] * step.table_stride * 4
            source = int64s(step.queries + g * 16)
            number_at = source[0] + token * source[1]
            for i in range(num_tiles * group.query_bytes // 8):
                int64s(q_at)[i] = 0
            for row in range(step.num_rows):
                load_query(
                    q_at + row // rows * group.query_bytes,
                    row % rows,
                    number_at + row * group.rank_k * itemsize,
                    key_at,
                    group.coded_bytes,
                    rows,
                    pairs,
                    odd_4,
                    odd_2,
                    kind_,
                )
            fill(o_at, num_tiles * group.sums, 0.0)
            fill(top_at, tiled, -math.inf)
            fill(sum_at, tiled, 0.0)
            seen = max(0, length - step.window) if step.window > 0 else 0
            # Codes are read 16 tokens at a time; the first stretch has what is seen before a multiple of 16.
            begin = (seen + LANES - 1) // LANES * LANES
            start = seen // LANES * LANES if split == 0 else begin + split * step.split
            stop = min(length, begin + (split + 1) * step.split)
            for first in range(start, stop, CHUNK):
                num_tokens = min(CHUNK, stop - first)
                find_tokens(
                    pages_at,
                    slots_at,
                    strips_at,
                    first,
                    num_tokens,
                    step.cache,
                    step.page_stride,
                    table_at,
                    step.block_size,
                )
                load_scales(key_scales_at, strips_at, slots_at, num_tokens, int64s(key_at)[8])
                load_scales(value_scales_at, strips_at, slots_at, num_tokens, int64s(value_at)[8])
                score(
                    s_at,
                    q_at,
                    group.query_bytes,
                    group.coded_bytes,
                    key_at,
                    pages_at,
                    slots_at,
                    strips_at,
                    key_scales_at,
                    max(0, seen - first),
                    num_tokens,
                    num_tiles,
                    step.block_size,
                    step.cap,
                    rows_,
                    kind_,
                )
                for row in range(tiled):
                    in_chunk = row * CHUNK * 4
                    weigh_scores(
                        s_at + in_chunk,
                        p_at + in_chunk,
                        w_at + in_chunk,
                        top_at + row * 4,
                        sum_at + row * 4,
                        value_scales_at,
                        num_tokens,
                        factor,
                        o_at + row // rows * group.sums * 4,
                        row % rows,
                        value_at,
                        rows_,
                        kind_,
                    )
                for tile in range(num_tiles):
                    weigh_values(
                        o_at + tile * group.sums * 4,
                        p_at + tile * rows * CHUNK * 4,
                        w_at + tile * rows * CHUNK * 4,
                        value_at,
                        pages_at,
                        slots_at,
                        strips_at,
                        num_tokens,
                        step.block_size,
                        rows_,
                        kind_,
                    )
            split_bytes = tiled * step.partial_stride * 4
            for row in range(step.num_rows):
                found_at = step.partial + (pair * step.num_splits + split) * split_bytes + row * step.partial_stride * 4
                found = floats(found_at)
                found[step.partial_stride - 2], found[step.partial_stride - 1] = (
                    floats(top_at)[row],
                    floats(sum_at)[row],
                )
                tile_at = o_at + row // rows * group.sums * 4
                put_in_order(found_at, tile_at, row % rows, value_at, rows, pairs, odd_4, odd_2)
            if fetch_add(step.counters + 16 + pair * 8) != step.num_splits - 1:
                continue
            for row in range(step.num_rows):
                row_at = step.partial + pair * step.num_splits * split_bytes + row * step.partial_stride * 4
                combine(o_at, row_at, step.num_splits, split_bytes, step.partial_stride, group.rank_v, factor)
                out = step.output + token * step.output_stride + (g * step.num_rows + row) * step.head_size * itemsize
                j = row // (step.num_rows // step.group_heads)
                mean_at = group.mean + j * step.head_size * 4
                up_at = 0 if group.up == 0 else group.up + j * group.rank_v * step.head_size * 4
                write_output(out, o_at, group.rank_v, up_at, mean_at, step.head_size, kind_)

    return worker
