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
from mkv_kernels.fused.table import LayerTable, power_of_two

FEW_ROWS = 512
"""Tokens times query heads of a KV head, up to which products with D are short of programs, not of arithmetic."""
FEW_SPLITS = 8
"""Of a context, up to which a program combines several rows' at once."""


# Numbers that change from step to step must not each compile a kernel.
@triton.jit(
    do_not_specialize=["num_programs", "num_splits", "num_requests"],
    do_not_specialize_on_alignment=["query_start_loc_ptr"],
)
def _combine_kernel(
    partial_ptr,
    stats_ptr,
    programs_ptr,
    query_start_loc_ptr,
    mean_ptr,
    out_ptr,
    num_programs,
    num_splits,
    num_requests,
    stride_partial,
    stride_out_token,
    GROUP_HEADS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """Attended coordinates of v' of one token, of ROWS query heads of a group and C coordinates, S splits at a time.

    They go to the output, means added, where D is folded; else to the place of the group's first split. No load waits
    for another one, but for the group's rank and the number of tokens.
    """
    HEADS: tl.constexpr = GROUP_HEADS * QUERY_HEADS
    TILES: tl.constexpr = (HEADS + ROWS - 1) // ROWS
    first = tl.program_id(1) * num_splits
    group = tl.load(programs_ptr + 4 * first)
    rank = tl.load(programs_ptr + 4 * first + 3)
    token = (tl.program_id(0) // TILES).to(tl.int64)
    row = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(2) * C + tl.arange(0, C)
    row_mask = row < HEADS
    # Of a token that no request has, as in padded CUDA graphs, there is nothing but what an earlier launch left.
    used = token < tl.load(query_start_loc_ptr + num_requests)
    base = (token * num_programs + first) * HEADS + row
    m = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, C], dtype=tl.float32)
    for start in range(0, num_splits, S):
        split = start + tl.arange(0, S)
        at = base[None, :] + (split * HEADS)[:, None]
        there = used & (split < num_splits)[:, None] & row_mask[None, :]
        b_m = tl.load(stats_ptr + 2 * at, mask=there, other=float("-inf"))  # [S, ROWS]
        b_l = tl.load(stats_ptr + 2 * at + 1, mask=there, other=0.0)
        mask = there[:, :, None] & (col < rank)[None, None, :]
        o = tl.load(partial_ptr + (at * stride_partial)[:, :, None] + col[None, None, :], mask=mask, other=0.0)
        m_new = tl.maximum(m, tl.max(b_m, 0))
        # Rows of which there is nothing yet would subtract infinity from infinity.
        base_m = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, weight = tl.exp2(m - base_m), tl.exp2(b_m - base_m[None, :])
        total = total * alpha + tl.sum(b_l * weight, 0)
        # Splits that hold nothing for a row may lie uninitialised.
        o = tl.where((b_m > float("-inf"))[:, :, None], o * weight[:, :, None], 0.0)
        acc = acc * alpha[:, None] + tl.sum(o, 0)
        m = m_new
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
@triton.jit(do_not_specialize=["num_rows", "num_programs", "num_splits"])
def _up_kernel(
    partial_ptr,
    programs_ptr,
    up_ptr,
    mean_ptr,
    out_ptr,
    num_rows,
    num_programs,
    num_splits,
    stride_partial,
    stride_out_token,
    rank_max,
    GROUP_HEADS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o D + mean for rows (token, query head) of one KV head, and COLUMNS of the head's coordinates.

    Shapes: up [G, J, R, d], mean [G, J, d], out [T, H, d].
    """
    first = tl.program_id(1) // GROUP_HEADS * num_splits
    group = tl.load(programs_ptr + 4 * first)
    rank = tl.load(programs_ptr + 4 * first + 3)
    kv_head = group * GROUP_HEADS + tl.program_id(1) % GROUP_HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    i_d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    token, query_head = (row // QUERY_HEADS).to(tl.int64), row % QUERY_HEADS
    head = kv_head % GROUP_HEADS * QUERY_HEADS + query_head
    rows = partial_ptr + ((token * num_programs + first) * (GROUP_HEADS * QUERY_HEADS) + head) * stride_partial
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in tl.range(0, rank, C, num_stages=STAGES):
        col = start + tl.arange(0, C)
        o = tl.load(rows[:, None] + col[None, :], mask=row_mask[:, None] & (col < rank)[None, :], other=0.0)
        at = up_ptr + kv_head.to(tl.int64) * rank_max * D + col[:, None] * D + i_d[None, :]
        b_up = tl.load(at, mask=(col < rank)[:, None] & (i_d < D)[None, :], other=0.0)  # [C, COLUMNS]
        acc = tl.dot(o, b_up, acc, input_precision=PRECISION)
    acc += tl.load(mean_ptr + kv_head * D + i_d, mask=i_d < D, other=0.0)[None, :]
    out = out_ptr + token * stride_out_token + (kv_head * QUERY_HEADS + query_head) * D
    tl.store(out[:, None] + i_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (i_d < D)[None, :])


def combine(
    partial: torch.Tensor,
    stats: torch.Tensor,
    table: LayerTable,
    num_splits: int,
    query_start_loc: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """output = (sum of the splits' exp2(m - maximum) o) / (sum of their totals) D + mean.

    Shapes, P being the programs of `table.work[num_splits]`:
        partial: o, [T, P, J M, R], and stats: m and total, [T, P, J M, 2], as `decode` leaves them; flat, float32.
            `partial` is overwritten.
        query_start_loc: [B + 1] int32; tokens from the last on get the mean
        output: [T, H, d]
    """
    programs, d, J = table.work[num_splits], table.head_size, table.group_heads
    T, M = output.shape[0], output.shape[1] // (table.num_groups * J)
    folded, num_programs = table.value_up is None, len(programs)
    # Where there are many splits there are few requests: as much at once, of more splits and in more programs.
    many = num_splits > FEW_SPLITS
    rows, most, at_once = (1, 64, 64) if many else (min(4, power_of_two(J * M)), 128, FEW_SPLITS)
    # The output has columns beyond the rank, and what is combined in place has none.
    columns = d if folded else table.rank_v
    chunk = min(most, power_of_two(columns))
    on(_combine_kernel, (T * triton.cdiv(J * M, rows), table.num_groups, triton.cdiv(columns, chunk)))(
        partial,
        stats,
        programs,
        query_start_loc,
        table.value_mean,
        output,
        num_programs,
        num_splits,
        len(query_start_loc) - 1,
        table.rank_v,
        output.stride(0),
        GROUP_HEADS=J,
        QUERY_HEADS=M,
        ROWS=rows,
        C=chunk,
        S=at_once,
        D=d,
        FOLDED=folded,
        num_warps=4,
        # Several threads have the same sums and write them to one place: a fused product would round them differently.
        enable_fp_fusion=False,
    )
    if folded:
        return
    few = T * M <= FEW_ROWS
    # All of up to 384 rows of D arrive at once, where there is room for them.
    most_stages = 4 if launch.Target.of(_up_kernel).backend != "hip" else 3
    tile, columns, depth, stages = (16, 32, 128, most_stages) if few else (64, min(128, power_of_two(d)), 64, 3)
    on(_up_kernel, (triton.cdiv(T * M, tile), table.num_groups * J, triton.cdiv(d, columns)))(
        partial,
        programs,
        table.value_up,
        table.value_mean,
        output,
        T * M,
        num_programs,
        num_splits,
        table.rank_v,
        output.stride(0),
        table.rank_v,
        GROUP_HEADS=J,
        QUERY_HEADS=M,
        ROWS=tile,
        C=depth,
        D=d,
        COLUMNS=columns,
        STAGES=stages,
        PRECISION=launch.precision(output.dtype),
        num_warps=2 if few else 4,
    )
