# SPDX-License-Identifier: Apache-2.0
"""Causal attention of requests with many queries each, of any mix of lengths and cached prefixes.

One program takes a tile of one request's queries, in all query heads of one KV head, against all tokens that they see.
It attends to the latent vectors of the whole group, for `J` > 1 too: rebuilding a head's keys and values from a tile of
N tokens costs `2 N R d` products per tile of M rows, attending in the latent space `2 M N (R - d)` more than at full
size; with M of 64 to 128 rows, d = 128 and R up to a half of 4 d, neither is much less than the other, and the latter
needs no tile of rebuilt keys beside the accumulators. The product with D is the kernel's last step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mkv_kernels.fused import launch
from mkv_kernels.fused.ahead import on
from mkv_kernels.fused.exact import attend_exact, query_rows, tile_of_queries
from mkv_kernels.fused.table import SIDE_FIELDS, LayerTable, Shapes, power_of_two
from mkv_kernels.fused.tile import coordinates, parts_of, rank_of
from mkv_kernels.fused.warp import attend


@triton.jit
def _request_of(tile, query_start_loc_ptr, num_requests, QUERIES: tl.constexpr):
    """The request of a tile, given that request i's tiles start at tile `query_start_loc[i] // QUERIES + i`."""
    left, right = 0, num_requests
    while right - left > 1:
        middle = (left + right) // 2
        if tl.load(query_start_loc_ptr + middle) // QUERIES + middle <= tile:
            left = middle
        else:
            right = middle
    return left


# Numbers, and places of requests in a batch, that change from step to step must not each compile a kernel.
@triton.jit(
    do_not_specialize=["num_requests", "stride_table"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "query_start_loc_ptr"],
)
def _prefill_kernel(
    q_ptr,
    cache_ptr,
    words_ptr,
    block_table_ptr,
    seq_lens_ptr,
    query_start_loc_ptr,
    programs_ptr,
    regions_ptr,
    up_ptr,
    mean_ptr,
    out_ptr,
    num_requests,
    stride_q_token,
    stride_q_group,
    stride_q_head,
    stride_cache,
    stride_words,
    stride_table,
    stride_out_token,
    rank_max,
    qk_scale,
    shifts_ptr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    FIELDS: tl.constexpr,
    QUERIES: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
    RAISED: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    IN_WARP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Shapes: q [T, G, J, M, R], up [G, J, R, d], mean [G, J, d], out [T, H, d]."""
    # Later queries see more tokens; a launch should not end with them.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    request = _request_of(tile, query_start_loc_ptr, num_requests, QUERIES)
    token, head, row_mask, q_len, q_first = query_rows(tile, request, query_start_loc_ptr, QUERIES, QUERY_HEADS, M)
    # Tiles before the first request, and behind the last one's queries, have no work.
    if (q_first >= 0) & (q_first < q_len):
        step = (q_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr, programs_ptr, regions_ptr)
        strides = (stride_q_token, stride_q_group, stride_q_head, stride_table)
        if not EXACT:
            query, row_mask, first, all_see, last, block_table, region_k, region_v = tile_of_queries(
                step, strides, tile, request, GROUP_HEADS, QUERIES, QUERY_HEADS, FIELDS, M, WINDOW
            )
            _, total, acc = attend(
                shifts_ptr,
                query,
                row_mask,
                tl.where(row_mask, all_see - 1 + tl.arange(0, M) // QUERY_HEADS, -1),
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
        else:
            _, total, acc = attend_exact(
                step,
                strides,
                tile,
                request,
                cache_ptr,
                stride_cache,
                qk_scale,
                BLOCK_SIZE,
                GROUP_HEADS,
                QUERIES,
                QUERY_HEADS,
                FIELDS,
                M,
                N,
                STAGES,
                KEY,
                VALUE,
                PRECISION,
                WINDOW,
                SOFT_CAP,
            )

        # Read and derived again: kept through the loop, they would take registers that it needs.
        token, head, row_mask, _, _ = query_rows(tile, request, query_start_loc_ptr, QUERIES, QUERY_HEADS, M)
        group = tl.load(programs_ptr + 4 * (tl.program_id(1) // GROUP_HEADS), volatile=True)
        kv_head = group * GROUP_HEADS + tl.program_id(1) % GROUP_HEADS
        region_v = regions_ptr + group * (2 * FIELDS) + FIELDS
        share = (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]
        i_d = tl.arange(0, D_PADDED)
        out = out_ptr + token * stride_out_token + (kv_head * QUERY_HEADS + head) * D
        to = out[:, None] + i_d[None, :]
        mean = tl.load(mean_ptr + kv_head * D + i_d, mask=i_d < D, other=0.0)[None, :]
        result = tl.zeros([M, D_PADDED], dtype=tl.float32) + mean
        left = acc
        for tier in tl.static_range(4):
            for i in tl.static_range(0 + VALUE[1][tier]):
                for part in tl.static_range(parts_of(tier, VALUE[0][tier])):
                    at, stored = coordinates(region_v, VALUE, tier, i, part)
                    o = left[0]
                    if IN_WARP:
                        o = tl.trans(o)
                    o = o * share
                    left = left[1:]
                    if FOLDED:
                        o += tl.load(mean_ptr + kv_head * D + at, mask=stored, other=0.0)[None, :]
                        tl.store(
                            out[:, None] + at[None, :],
                            o.to(out_ptr.dtype.element_ty),
                            mask=row_mask[:, None] & stored[None, :],
                        )
                    elif i * VALUE[0][tier] < tl.load(region_v + 2 * tier + 1):
                        b_up = tl.load(
                            up_ptr + (kv_head.to(tl.int64) * rank_max + at[:, None]) * D + i_d[None, :],
                            mask=stored[:, None] & (i_d < D)[None, :],
                            other=0.0,
                        )  # [C, D]
                        result = tl.dot(o, b_up, result, input_precision=PRECISION)
        inside = i_d < D
        if FOLDED:
            # A coordinate that is not stored counts as its mean.
            inside = inside & (i_d >= rank_of(region_v))
        tl.store(to, result.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & inside[None, :])


def check_served(shapes: Shapes, dtype: torch.dtype) -> None:
    """Raises NotImplementedError for a layer that `prefill` does not take, with the mend."""
    launch.check_prefill(shapes, dtype, launch.Target.of(_prefill_kernel))


def prefill(
    query: torch.Tensor,
    cache: torch.Tensor,
    table: LayerTable,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    output: torch.Tensor,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> None:
    """output = softmax(q' k'^T scale) v' D + mean for every token of the requests.

    Args:
        window, soft_cap: as in `decode`.

    Shapes:
        query: q', [T, G, J, M, R] with R at least the layer's largest key rank
        cache: [num_blocks, 1, block_size, bytes_per_token / itemsize]; holds this step's tokens too
        block_table: [B, blocks] int32
        seq_lens: [B] int32, cached tokens of every request, this step's included
        query_start_loc: [B + 1] int32
        output: [T, H, d]; rows of tokens that belong to no request are left as they are
    """
    pages = launch.check_attention(query, cache, table, block_table, seq_lens, query_start_loc, output)
    launch.check_scores(scale, window, soft_cap)
    T, M, d = query.shape[0], query.shape[3], table.head_size
    num_requests = seq_lens.shape[0]
    if num_requests == 0 or T == 0:
        return
    target = launch.Target.of(_prefill_kernel)
    launch.check_prefill(table.shapes, query.dtype, target)
    folded = table.value_up is None
    shapes = table.shapes
    tiles = launch.Tiles.of_prefill(shapes, M, query.element_size(), target, folded=folded)
    sides = shapes.operands if tiles.in_warp else shapes
    assert sides is not None
    exact = not shapes.coded and target.has_exact_loop
    # With a window there are waits nevertheless, and where D follows, 8 warps, which have registers enough.
    join = exact and folded and window == 0 and target.joins_values(query.dtype)
    value = sides.value.joined if join else sides.value
    queries = tiles.rows // M
    on(_prefill_kernel, (T // queries + num_requests, table.num_groups * table.group_heads))(
        query,
        *pages.pages,
        block_table,
        seq_lens,
        query_start_loc,
        table.work[1],
        table.regions,
        table.value_mean if folded else table.value_up,
        table.value_mean,
        output,
        num_requests,
        query.stride(0),
        query.stride(1),
        query.stride(3),
        *pages.strides,
        block_table.stride(0),
        output.stride(0),
        table.rank_v,
        scale * launch.LOG2_E,
        table.half_shifts,
        BLOCK_SIZE=table.layout.block_size,
        GROUP_HEADS=table.group_heads,
        QUERY_HEADS=M,
        FIELDS=SIDE_FIELDS,
        QUERIES=queries,
        M=tiles.rows,
        N=tiles.tokens,
        STAGES=tiles.stages,
        PTX=target.unpacks_in_ptx(query.dtype),
        RAISED=target.raises_values(query.dtype),
        KEY=sides.key.constants,
        VALUE=value.constants,
        D=d,
        D_PADDED=power_of_two(d),
        FOLDED=folded,
        PRECISION=launch.precision(query.dtype),
        WINDOW=window,
        SOFT_CAP=soft_cap,
        IN_WARP=tiles.in_warp,
        EXACT=exact,
        num_warps=tiles.warps,
    )
