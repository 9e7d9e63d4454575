# SPDX-License-Identifier: Apache-2.0
"""What `decode` does last: the results of a context's splits become one, and that goes through D."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mkv_kernels.fused import launch
from mkv_kernels.fused.ahead import on
from mkv_kernels.fused.table import SIDE_FIELDS, LayerTable, power_of_two
from mkv_kernels.fused.tile import rank_of

FEW_ROWS = 512
"""Tokens times query heads of a KV head, up to which combining is short of programs rather than of arithmetic."""


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


@triton.jit
def _combined(
    partial_ptr,
    stats_ptr,
    base,
    row_mask,
    m,
    total,
    used,
    col,
    col_mask,
    stride_partial,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
):
    """Attended coordinates `col` of v', [ROWS, C]; 0 for rows that attended to nothing."""
    acc = tl.zeros([ROWS, C], dtype=tl.float32)
    for split in range(0, used):
        at = base + split * HEADS
        b_m = tl.load(stats_ptr + 2 * at, mask=row_mask, other=float("-inf"))
        # Splits that hold nothing for a row may lie uninitialised.
        mask = (b_m > float("-inf"))[:, None] & col_mask[None, :]
        o = tl.load(partial_ptr + (at * stride_partial)[:, None] + col[None, :], mask=mask, other=0.0)
        acc += o * tl.exp2(b_m - m)[:, None]
    return acc * tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)[:, None]


# Numbers that change from step to step must not each compile a kernel.
@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def _combine_kernel(
    partial_ptr,
    stats_ptr,
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
    S: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o = (sum of splits) D + mean for rows (token, query head) of one KV head; without D where it is folded.

    Shapes: up [G, J, R, d], mean [G, J, d], out [T, H, d].
    """
    HEADS: tl.constexpr = GROUP_HEADS * QUERY_HEADS
    kv_head = tl.program_id(1)
    group = kv_head // GROUP_HEADS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    token, query_head = (row // QUERY_HEADS).to(tl.int64), row % QUERY_HEADS
    first, num_splits = tl.load(spans_ptr + 2 * group), tl.load(spans_ptr + 2 * group + 1)
    base = (token * num_programs + first) * HEADS + (kv_head % GROUP_HEADS) * QUERY_HEADS + query_head
    m, total, used = _splits_of(stats_ptr, base, row_mask, num_splits, HEADS, ROWS, S)
    rank = rank_of(regions_ptr + group * (2 * FIELDS) + FIELDS)
    out = out_ptr + token * stride_out_token + (kv_head * QUERY_HEADS + query_head) * D
    if FOLDED:
        for start in tl.static_range(0, D_PADDED, C):
            col = start + tl.arange(0, C)
            o = _combined(
                partial_ptr, stats_ptr, base, row_mask, m, total, used, col, col < rank, stride_partial, HEADS, ROWS, C
            )
            o += tl.load(mean_ptr + kv_head * D + col, mask=col < D, other=0.0)[None, :]
            tl.store(
                out[:, None] + col[None, :], o.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (col < D)[None, :]
            )
    else:
        i_d = tl.arange(0, D_PADDED)
        acc = tl.zeros([ROWS, D_PADDED], dtype=tl.float32)
        for start in range(0, rank, C):
            col = start + tl.arange(0, C)
            o = _combined(
                partial_ptr, stats_ptr, base, row_mask, m, total, used, col, col < rank, stride_partial, HEADS, ROWS, C
            )
            at = up_ptr + kv_head.to(tl.int64) * rank_max * D + col[:, None] * D + i_d[None, :]
            b_up = tl.load(at, mask=(col < rank)[:, None] & (i_d < D)[None, :], other=0.0)  # [C, D]
            acc = tl.dot(o, b_up, acc, input_precision=PRECISION)
        acc += tl.load(mean_ptr + kv_head * D + i_d, mask=i_d < D, other=0.0)[None, :]
        tl.store(
            out[:, None] + i_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (i_d < D)[None, :]
        )


def combine(
    partial: torch.Tensor, stats: torch.Tensor, table: LayerTable, num_splits: int, output: torch.Tensor
) -> None:
    """output = (sum of the splits' exp2(m - maximum) o) / (sum of their totals) D + mean.

    Shapes, P being the programs of `table.work[num_splits]`:
        partial: o, [T, P, J M, R], and stats: m and total, [T, P, J M, 2], as `decode` leaves them; flat, float32
        output: [T, H, d]
    """
    work, d, J = table.work[num_splits], table.head_size, table.group_heads
    M = output.shape[1] // (table.num_groups * J)
    rows = output.shape[0] * M
    tile = 16 if rows <= FEW_ROWS else 64
    on(_combine_kernel, (triton.cdiv(rows, tile), table.num_groups * J))(
        partial,
        stats,
        work.spans,
        table.regions,
        table.value_mean if table.value_up is None else table.value_up,
        table.value_mean,
        output,
        rows,
        len(work.programs),
        table.rank_v,
        output.stride(0),
        table.rank_v,
        GROUP_HEADS=J,
        QUERY_HEADS=M,
        FIELDS=SIDE_FIELDS,
        ROWS=tile,
        C=32,
        S=16,
        D=d,
        D_PADDED=power_of_two(d),
        FOLDED=table.value_up is None,
        PRECISION=launch.precision(output.dtype),
        num_warps=4,
    )
