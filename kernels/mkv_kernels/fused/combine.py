# SPDX-License-Identifier: Apache-2.0
"""What `decode` does last: the results of a context's splits become one, and that goes through D.

Where D is folded into the model's weights, one kernel does it. Else the first leaves what it combined in the place of
the first split, and a second multiplies that: a program of the first should have few rows, so that many programs wait
for memory at once, one of the second many, so that D is read by few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mkv_kernels.fused import launch
from mkv_kernels.fused.ahead import on
from mkv_kernels.fused.table import SIDE_FIELDS, LayerTable, power_of_two
from mkv_kernels.fused.tile import rank_of

FEW_ROWS = 512
"""Tokens times query heads of a KV head, up to which products with D are short of programs, not of arithmetic."""


@triton.jit
def _splits_of(stats_ptr, base, row_mask, num_splits, HEADS: tl.constexpr, ROWS: tl.constexpr, S: tl.constexpr):
    """Over a group's splits: maximum and sum [ROWS], and how many splits, counted from the first, hold anything."""
    m = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    used = 0
    for start in range(0, num_splits, S):
        split = start + tl.arange(0, S)
        mask = row_mask[:, None] & (split < num_splits)[None, :]
        at = 2 * (base[:, None] + (split * HEADS)[None, :])
        b_m = tl.load(stats_ptr + at, mask=mask, other=float("-inf"))  # [ROWS, S]
        b_l = tl.load(stats_ptr + at + 1, mask=mask, other=0.0)
        m_new = tl.maximum(m, tl.max(b_m, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        total = total * tl.exp2(m - shift) + tl.sum(b_l * tl.exp2(b_m - shift[:, None]), 1)
        m = m_new
        filled = tl.where(b_m > float("-inf"), split[None, :] + 1, 0)
        used = tl.maximum(used, tl.max(tl.max(filled, 1), 0))
    return tl.where(m == float("-inf"), 0.0, m), total, used


# Numbers that change from step to step must not each compile a kernel.
@triton.jit(do_not_specialize=["num_programs"])
def _combine_kernel(
    partial_ptr,
    stats_ptr,
    spans_ptr,
    regions_ptr,
    mean_ptr,
    out_ptr,
    num_programs,
    stride_partial,
    stride_out_token,
    GROUP_HEADS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    D: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """Attended coordinates of v' of one token, of ROWS query heads of a group and C coordinates.

    They go to the output, means added, where D is folded; else to the place of the group's first split.
    """
    HEADS: tl.constexpr = GROUP_HEADS * QUERY_HEADS
    TILES: tl.constexpr = (HEADS + ROWS - 1) // ROWS
    group = tl.program_id(1)
    token = (tl.program_id(0) // TILES).to(tl.int64)
    row = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(2) * C + tl.arange(0, C)
    row_mask = row < HEADS
    first, num_splits = tl.load(spans_ptr + 2 * group), tl.load(spans_ptr + 2 * group + 1)
    base = (token * num_programs + first) * HEADS + row
    m, total, used = _splits_of(stats_ptr, base, row_mask, num_splits, HEADS, ROWS, MOST_SPLITS)
    rank = rank_of(regions_ptr + group * (2 * FIELDS) + FIELDS)
    acc = tl.zeros([ROWS, C], dtype=tl.float32)
    for start in range(0, used, S):
        split = start + tl.arange(0, S)
        at = base[None, :] + (split * HEADS)[:, None]
        b_m = tl.load(stats_ptr + 2 * at, mask=(split < used)[:, None] & row_mask[None, :], other=float("-inf"))
        # Splits that hold nothing for a row may lie uninitialised.
        mask = (b_m > float("-inf"))[:, :, None] & (col < rank)[None, None, :]
        o = tl.load(partial_ptr + (at * stride_partial)[:, :, None] + col[None, None, :], mask=mask, other=0.0)
        acc += tl.sum(o * tl.exp2(b_m - m[None, :])[:, :, None], 0)
    # Of scores that are no numbers, no maximum says that there are any; their total does, and stays none.
    acc *= tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    if FOLDED:
        mask = row_mask[:, None] & (col < D)[None, :]
        head = group * HEADS + row
        acc += tl.load(mean_ptr + (head // QUERY_HEADS * D)[:, None] + col[None, :], mask=mask, other=0.0)
        to = out_ptr + token * stride_out_token + (head * D)[:, None] + col[None, :]
        tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        # What is overwritten has been read by all threads.
        tl.debug_barrier()
        to = partial_ptr + (base * stride_partial)[:, None] + col[None, :]
        tl.store(to, acc, mask=row_mask[:, None] & (col < rank)[None, :])


# Numbers that change from step to step must not each compile a kernel.
@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def _up_kernel(
    partial_ptr,
    spans_ptr,
    regions_ptr,
    up_ptr,
    mean_ptr,
    out_ptr,
    num_rows,
    num_programs,
    stride_partial,
    stride_out_token,
    rank_max,
    GROUP_HEADS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o D + mean for rows (token, query head) of one KV head, and COLUMNS of the head's coordinates.

    Shapes: up [G, J, R, d], mean [G, J, d], out [T, H, d].
    """
    kv_head = tl.program_id(1)
    group = kv_head // GROUP_HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    i_d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    token, query_head = (row // QUERY_HEADS).to(tl.int64), row % QUERY_HEADS
    head = kv_head % GROUP_HEADS * QUERY_HEADS + query_head
    first = tl.load(spans_ptr + 2 * group)
    rows = partial_ptr + ((token * num_programs + first) * (GROUP_HEADS * QUERY_HEADS) + head) * stride_partial
    rank = rank_of(regions_ptr + group * (2 * FIELDS) + FIELDS)
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in tl.range(0, rank, C, num_stages=3):
        col = start + tl.arange(0, C)
        o = tl.load(rows[:, None] + col[None, :], mask=row_mask[:, None] & (col < rank)[None, :], other=0.0)
        at = up_ptr + kv_head.to(tl.int64) * rank_max * D + col[:, None] * D + i_d[None, :]
        b_up = tl.load(at, mask=(col < rank)[:, None] & (i_d < D)[None, :], other=0.0)  # [C, COLUMNS]
        acc = tl.dot(o, b_up, acc, input_precision=PRECISION)
    acc += tl.load(mean_ptr + kv_head * D + i_d, mask=i_d < D, other=0.0)[None, :]
    out = out_ptr + token * stride_out_token + (kv_head * QUERY_HEADS + query_head) * D
    tl.store(out[:, None] + i_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (i_d < D)[None, :])


def combine(
    partial: torch.Tensor, stats: torch.Tensor, table: LayerTable, num_splits: int, output: torch.Tensor
) -> None:
    """output = (sum of the splits' exp2(m - maximum) o) / (sum of their totals) D + mean.

    Shapes, P being the programs of `table.work[num_splits]`:
        partial: o, [T, P, J M, R], and stats: m and total, [T, P, J M, 2], as `decode` leaves them; flat, float32.
            `partial` is overwritten.
        output: [T, H, d]
    """
    work, d, J = table.work[num_splits], table.head_size, table.group_heads
    T, M = output.shape[0], output.shape[1] // (table.num_groups * J)
    folded, num_programs = table.value_up is None, len(work.programs)
    rows = min(4, power_of_two(J * M))
    # The output has columns beyond the rank, and what is combined in place has none.
    columns = d if folded else table.rank_v
    chunk = min(128, power_of_two(columns))
    on(_combine_kernel, (T * triton.cdiv(J * M, rows), table.num_groups, triton.cdiv(columns, chunk)))(
        partial,
        stats,
        work.spans,
        table.regions,
        table.value_mean,
        output,
        num_programs,
        table.rank_v,
        output.stride(0),
        GROUP_HEADS=J,
        QUERY_HEADS=M,
        FIELDS=SIDE_FIELDS,
        ROWS=rows,
        C=chunk,
        S=8,
        MOST_SPLITS=64,
        D=d,
        FOLDED=folded,
        num_warps=4,
    )
    if folded:
        return
    few = T * M <= FEW_ROWS
    tile, columns = (16, 32) if few else (64, min(128, power_of_two(d)))
    on(_up_kernel, (triton.cdiv(T * M, tile), table.num_groups * J, triton.cdiv(d, columns)))(
        partial,
        work.spans,
        table.regions,
        table.value_up,
        table.value_mean,
        output,
        T * M,
        num_programs,
        table.rank_v,
        output.stride(0),
        table.rank_v,
        GROUP_HEADS=J,
        QUERY_HEADS=M,
        FIELDS=SIDE_FIELDS,
        ROWS=tile,
        C=64,
        D=d,
        COLUMNS=columns,
        PRECISION=launch.precision(output.dtype),
        num_warps=2 if few else 4,
    )
