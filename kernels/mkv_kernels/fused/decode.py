# SPDX-License-Identifier: Apache-2.0
"""Attention of requests with few queries each: the context is split among programs, whose results are then combined.

One program takes a request, a latent group and a split of the context; the rows of its products are all query heads of
the group, times the queries of the request. It reads no coordinate beyond its group's ranks. How groups of different
ranks are balanced is said at `splits.work_of`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mkv_kernels.fused import launch
from mkv_kernels.fused.ahead import on
from mkv_kernels.fused.combine import combine
from mkv_kernels.fused.integer import attend_codes, store_sums
from mkv_kernels.fused.splits import SPLITS
from mkv_kernels.fused.table import SIDE_FIELDS, LayerTable
from mkv_kernels.fused.tile import coordinates, parts_of
from mkv_kernels.fused.warp import attend

MAX_QUERIES = 16
"""Queries per request, speculative ones included, up to which this is the kernel to call."""


@triton.jit
def _rows_of(query_start_loc_ptr, HEADS: tl.constexpr, M: tl.constexpr):
    """Of a program's rows: token in the step, head within the group, whether there is one, and query of the request;
    and the request's number of queries."""
    request = tl.program_id(1)
    # Volatile, since else the compiler would keep what it read before.
    q_start = tl.load(query_start_loc_ptr + request, volatile=True)
    q_len = tl.load(query_start_loc_ptr + request + 1, volatile=True) - q_start
    rows = tl.program_id(2) * M + tl.arange(0, M)
    q_index = rows // HEADS
    return (q_start + q_index).to(tl.int64), rows % HEADS, q_index < q_len, q_index, q_len


@triton.jit
def _work_of(
    programs_ptr, seq_lens_ptr, query_start_loc_ptr, HEADS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """A program's group; of its rows, see `_rows_of`, and the last token that each sees, -1 for rows that are none; and
    the tokens of its split, [first, last)."""
    program, request = tl.program_id(0), tl.program_id(1)
    group = tl.load(programs_ptr + 4 * program)
    seq_len = tl.load(seq_lens_ptr + request)
    token, head, row_mask, q_index, q_len = _rows_of(query_start_loc_ptr, HEADS, M)
    split = tl.load(programs_ptr + 4 * program + 1)
    num_splits = tl.load(programs_ptr + 4 * program + 2)
    seen = 0
    if WINDOW > 0:
        seen = tl.maximum(seq_len - q_len + 1 - WINDOW, 0)
    # From a multiple of 16 on; the first split has what is seen before it, and up to 15 tokens that are not.
    begin = tl.cdiv(seen, 16) * 16
    tokens = tl.cdiv(tl.cdiv(seq_len - begin, N), num_splits) * N
    first = begin + split * tokens
    last = tl.minimum(first + tokens, seq_len)
    if WINDOW > 0:
        first = tl.where(split == 0, seen // 16 * 16, first)
    row_last = tl.where(row_mask, seq_len - q_len + q_index, -1)
    return group, token, head, row_mask, row_last, first, last


@triton.jit
def _store_stats(
    m, total, programs_ptr, query_start_loc_ptr, regions_ptr, stats_ptr, num_programs, HEADS: tl.constexpr,
    FIELDS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Returns where a program's rows are in `stats` and `partial`, which of them there are, and the values' region.

    All of that is read and derived again: kept through the loop, it would take registers that the loop needs.
    """
    program = tl.program_id(0)
    token, head, row_mask, _, _ = _rows_of(query_start_loc_ptr, HEADS, M)
    region_v = regions_ptr + tl.load(programs_ptr + 4 * program, volatile=True) * (2 * FIELDS) + FIELDS
    at = (token * num_programs + program) * HEADS + head
    tl.store(stats_ptr + 2 * at, m, mask=row_mask)
    tl.store(stats_ptr + 2 * at + 1, total, mask=row_mask)
    return at, row_mask, region_v


# Numbers, and places of requests in a batch, that change from step to step must not each compile a kernel.
@triton.jit(
    do_not_specialize=["num_programs", "stride_table"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "query_start_loc_ptr"],
)
def _attend_kernel(
    q_ptr,
    cache_ptr,
    words_ptr,
    block_table_ptr,
    seq_lens_ptr,
    query_start_loc_ptr,
    programs_ptr,
    regions_ptr,
    partial_ptr,
    stats_ptr,
    stride_q_token,
    stride_q_group,
    stride_q_head,
    stride_cache,
    stride_words,
    stride_table,
    stride_partial,
    num_programs,
    qk_scale,
    shifts_ptr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    FIELDS: tl.constexpr,
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
    IN_WARP: tl.constexpr,
):
    """exp2(s - m) v', m and total over one split. Shapes, in float32: partial [T, P, J M, R], stats [T, P, J M, 2]."""
    group, token, head, row_mask, row_last, first, last = _work_of(
        programs_ptr, seq_lens_ptr, query_start_loc_ptr, HEADS, M, N, WINDOW
    )
    query = q_ptr + token * stride_q_token + group * stride_q_group + head * stride_q_head
    region_k = regions_ptr + group * (2 * FIELDS)
    region_v = region_k + FIELDS
    block_table = block_table_ptr + tl.program_id(1).to(tl.int64) * stride_table
    m, total, acc = attend(
        shifts_ptr,
        query,
        row_mask,
        row_last,
        first,
        last,
        (cache_ptr, words_ptr),
        (stride_cache, stride_words),
        block_table,
        region_k,
        region_v,
        qk_scale,
        BLOCK_SIZE,
        M,
        N,
        STAGES,
        PTX,
        RAISED,
        KEY,
        VALUE,
        PRECISION,
        WINDOW,
        SOFT_CAP,
        IN_WARP,
    )

    at, row_mask, region_v = _store_stats(
        m, total, programs_ptr, query_start_loc_ptr, regions_ptr, stats_ptr, num_programs, HEADS, FIELDS, M
    )
    # A split beyond the request's context says so by m; nobody reads its part.
    if first < last:
        left = acc
        out = partial_ptr + at * stride_partial
        for tier in tl.static_range(4):
            for tile in tl.static_range(0 + VALUE[1][tier]):
                for part in tl.static_range(parts_of(tier, VALUE[0][tier])):
                    col, inside = coordinates(region_v, VALUE, tier, tile, part)
                    if IN_WARP:
                        tl.store(out[None, :] + col[:, None], left[0], mask=inside[:, None] & row_mask[None, :])
                    else:
                        tl.store(out[:, None] + col[None, :], left[0], mask=row_mask[:, None] & inside[None, :])
                    left = left[1:]


# As above.
@triton.jit(
    do_not_specialize=["num_programs", "stride_table"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "query_start_loc_ptr"],
)
def _attend_codes_kernel(
    q_ptr,
    cache_ptr,
    words_ptr,
    block_table_ptr,
    seq_lens_ptr,
    query_start_loc_ptr,
    programs_ptr,
    regions_ptr,
    partial_ptr,
    stats_ptr,
    stride_q_token,
    stride_q_group,
    stride_q_head,
    stride_cache,
    stride_words,
    stride_table,
    stride_partial,
    num_programs,
    qk_scale,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    FIELDS: tl.constexpr,
    M: tl.constexpr,
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
    """What `_attend_kernel` does, by products of integers."""
    group, token, head, row_mask, row_last, first, last = _work_of(
        programs_ptr, seq_lens_ptr, query_start_loc_ptr, HEADS, M, N, WINDOW
    )
    query = q_ptr + token * stride_q_token + group * stride_q_group + head * stride_q_head
    region_k = regions_ptr + group * (2 * FIELDS)
    m, total, sums, weight, acc = attend_codes(
        query,
        row_mask,
        row_last,
        first,
        last,
        (cache_ptr, words_ptr),
        (stride_cache, stride_words),
        block_table_ptr + tl.program_id(1).to(tl.int64) * stride_table,
        region_k,
        region_k + FIELDS,
        qk_scale,
        BLOCK_SIZE,
        M,
        N,
        STAGES,
        PTX,
        KEY,
        VALUE,
        EXACT_KEY,
        EXACT_VALUE,
        PRECISION,
        WINDOW,
        SOFT_CAP,
    )

    at, row_mask, region_v = _store_stats(
        m, total, programs_ptr, query_start_loc_ptr, regions_ptr, stats_ptr, num_programs, HEADS, FIELDS, M
    )
    if first < last:
        out = partial_ptr + at * stride_partial
        store_sums(out, row_mask, region_v, sums, weight, VALUE)
        for tile in tl.static_range(0 + EXACT_VALUE[1][0]):
            col, inside = coordinates(region_v, EXACT_VALUE, 0, tile, 0)
            o, _odd = tl.split(tl.reshape(acc[tile], [0 + EXACT_VALUE[0][0], M, 2]))
            tl.store(out[None, :] + col[:, None], o, mask=inside[:, None] & row_mask[None, :])


@dataclass(frozen=True)
class DecodeWorkspace:
    """Buffers of one launch, of any layer whose needs they cover; flat, float32."""

    partial: torch.Tensor
    stats: torch.Tensor

    @staticmethod
    def sizes(table: LayerTable, num_tokens: int, num_heads: int, num_splits: int) -> tuple[int, int]:
        """Numbers that `partial` and `stats` hold for at most so many tokens, query heads and splits."""
        rows = num_tokens * len(table.work[num_splits]) * (num_heads // table.num_groups)
        return rows * table.rank_v, rows * 2

    @classmethod
    def make(cls, table: LayerTable, num_tokens: int, num_heads: int, num_splits: int) -> DecodeWorkspace:
        device = table.regions.device
        sizes = cls.sizes(table, num_tokens, num_heads, num_splits)
        return cls(*(torch.empty(size, dtype=torch.float32, device=device) for size in sizes))


def decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    table: LayerTable,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    output: torch.Tensor,
    workspace: DecodeWorkspace,
    *,
    max_queries: int,
    num_splits: int,
    window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    """output = softmax(q' k'^T scale) v' D + mean for every token of requests of at most `max_queries` queries.

    Args:
        window: tokens that a query sees, its own included; 0 for all up to it. Others are not read.
        soft_cap: scores become soft_cap tanh(score / soft_cap) before the softmax; 0 leaves them.

    Shapes:
        query: q', [T, G, J, M, R] with R at least the layer's largest key rank
        cache: [num_blocks, 1, block_size, bytes_per_token / itemsize]
        block_table: [B, blocks] int32
        seq_lens: [B] int32, cached tokens of every request, this step's included
        query_start_loc: [B + 1] int32
        output: [T, H, d]; tokens behind those of the last request get the mean
    """
    shapes = launch.check_attention(query, cache, table, block_table, seq_lens, query_start_loc, output)
    if not 1 <= max_queries <= MAX_QUERIES:
        raise ValueError(f"{max_queries} queries per request; decode takes 1 to {MAX_QUERIES}, prefill any number")
    if num_splits not in table.work:
        raise ValueError(f"{num_splits} splits; take one of {SPLITS}, see choose_splits")
    launch.check_scores(scale, window, soft_cap)
    T, J, M = query.shape[0], table.group_heads, query.shape[3]
    programs, num_requests = table.work[num_splits], seq_lens.shape[0]
    num_programs = len(programs)
    launch.check_buffers(
        {"partial": workspace.partial, "stats": workspace.stats},
        DecodeWorkspace.sizes(table, T, table.num_groups * J * M, num_splits),
        query.device,
    )
    if num_requests == 0 or T == 0:
        return
    rows = max_queries * J * M
    target = launch.Target.of(_attend_kernel)
    tiles = launch.Tiles.of_decode(table.shapes, rows, query.element_size(), target)
    grid = (num_programs, num_requests, triton.cdiv(rows, tiles.rows))
    arguments = (
        query,
        *shapes.pages,
        block_table,
        seq_lens,
        query_start_loc,
        programs,
        table.regions,
        workspace.partial,
        workspace.stats,
        query.stride(0),
        query.stride(1),
        query.stride(3),
        *shapes.strides,
        block_table.stride(0),
        table.rank_v,
        num_programs,
        scale * launch.LOG2_E,
    )
    constants = {
        "BLOCK_SIZE": table.layout.block_size,
        "HEADS": J * M,
        "FIELDS": SIDE_FIELDS,
        "M": tiles.rows,
        "N": tiles.tokens,
        "STAGES": tiles.stages,
        "PTX": target.unpacks_in_ptx(query.dtype),
        "PRECISION": launch.precision(query.dtype),
        "WINDOW": window,
        "SOFT_CAP": soft_cap,
        "num_warps": tiles.warps,
    }
    if tiles.in_integers:
        integers = table.shapes.integers
        assert integers is not None
        on(_attend_codes_kernel, grid)(
            *arguments,
            KEY=integers.key.constants,
            VALUE=integers.value.constants,
            EXACT_KEY=integers.key.exact.constants,
            EXACT_VALUE=integers.value.exact.constants,
            maxnreg=tiles.registers,
            **constants,
        )
    else:
        sides = table.shapes.operands if tiles.in_warp else table.shapes
        assert sides is not None
        on(_attend_kernel, grid)(
            *arguments,
            table.half_shifts,
            RAISED=target.raises_values(query.dtype),
            KEY=sides.key.constants,
            VALUE=sides.value.constants,
            IN_WARP=tiles.in_warp,
            **constants,
        )
    combine(workspace.partial, workspace.stats, table, num_splits, query_start_loc, output)
