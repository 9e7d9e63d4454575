# SPDX-License-Identifier: Apache-2.0
"""Project a step's queries, keys and values, and write keys and values into their pages, in one launch.

A program projects a tile of rows to a few columns of one latent group; `table._items` lists the columns. Queries and
the 16-bit tiers are written at once. Coordinates of the other tiers share a scale per token, so their programs leave
float32 in a scratch buffer, and the last of them to finish quantises and packs the tokens' rows: a step of few tokens
then still has many programs to read the bases with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mkv_kernels.codes import LARGEST_SCALE, LEAST_SCALE, STEPS
from mkv_kernels.fused import launch
from mkv_kernels.fused.ahead import on
from mkv_kernels.fused.table import SIDE_FIELDS, LayerTable
from mkv_kernels.fused.tile import rank_of, scales_at, tier_of
from mkv_kernels.fused.unpack import scale_codes, scale_values

FEW_TOKENS = 64
"""Up to which a launch is short of programs rather than of arithmetic."""


@triton.jit
def _project(
    rows, row_mask, basis, width, col, col_mask, ROWS: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x W[:, col] in float32. Shapes: rows [ROWS] pointers to x, basis a pointer to W transposed [R, width]."""
    acc = tl.zeros([ROWS, C], dtype=tl.float32)
    for start in range(0, width, K):
        i = start + tl.arange(0, K)
        b_x = tl.load(rows[:, None] + i[None, :], mask=row_mask[:, None] & (i < width)[None, :], other=0.0)  # [ROWS, K]
        at = basis + i[:, None] + col[None, :] * width
        b_w = tl.load(at, mask=(i < width)[:, None] & col_mask[None, :], other=0.0)  # [K, C]
        if PRECISION == "ieee":
            # Sums of sums: one after the other, a thousand products would err more than PyTorch's do. (What is added to
            # a product at once becomes its start.)
            part = tl.dot(b_x.to(tl.float32), b_w, input_precision=PRECISION)
            acc += tl.where(row_mask[:, None], part, 0.0)
        else:
            acc = tl.dot(b_x.to(tl.float32), b_w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _pack_tier(
    rows, row_mask, scale, to, size, begin, WIDTH: tl.constexpr, STEP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Codes of a tier, see `codes.quantise` and `codes.pack`.

    Shapes: rows [ROWS] pointers to float32, to [ROWS] pointers to the tokens' first words.
    """
    HALF: tl.constexpr = 1 << (WIDTH - 1)
    # One division per token: a coordinate within a rounding of a level's edge may get the code beside its twin's.
    levels = tl.div_rn(1.0, scale * STEP)[:, None]
    for start in range(0, size, C):
        col = start + tl.arange(0, C)
        mask = row_mask[:, None] & (col < size)[None, :]
        packed = tl.zeros([ROWS, C], dtype=tl.int32)
        for part in tl.static_range(16 // WIDTH):
            at = rows[:, None] + (begin + part * size + col)[None, :]
            x = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
            code = tl.floor(x * levels) + HALF
            code = tl.minimum(tl.maximum(code, 0.0), 2.0 * HALF - 1.0)
            packed |= code.to(tl.int32) << (part * WIDTH)
        tl.store(to[:, None] + (col * BLOCK_SIZE)[None, :], packed.to(tl.int16), mask=mask)


@triton.jit
def _pack(
    rows,
    row_mask,
    block,
    slot,
    words_ptr,
    stride_words,
    region,
    least,
    largest,
    BLOCK_SIZE: tl.constexpr,
    SIDE: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
):
    """Scales and codes of all coded tiers of tokens whose coordinates lie at `rows`, [ROWS] pointers."""
    exact = tl.multiple_of(tl.load(region + 1), 16)
    count = rank_of(region) - exact
    squares = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, count, C):
        col = start + tl.arange(0, C)
        # Other programs wrote these, so the first-level cache must not answer.
        x = tl.load(
            rows[:, None] + col[None, :],
            mask=row_mask[:, None] & (col < count)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        squares += tl.sum(x * x, 1)
    scale = tl.sqrt_rn(tl.div_rn(squares, count.to(tl.float32)))
    # Comparisons let NaN pass, so that it shows.
    scale = tl.where(scale < least, least, tl.where(scale > largest, largest, scale))
    code = scale_codes(scale)
    scale = scale_values(code)
    page = words_ptr + block * stride_words
    for tier in tl.static_range(1, 4):
        if SIDE[0][tier] > 0:
            offset, size, begin = tier_of(region, tier)
            to = page + offset + slot
            _pack_tier(rows, row_mask, scale, to, size, begin - exact, 16 >> tier, STEPS[tier], BLOCK_SIZE, ROWS, C)
    tl.store(scales_at(page, region).to(tl.pointer_type(tl.uint8), bitcast=True) + slot, code, mask=row_mask)


@triton.jit
def _store_side(
    x_ptr,
    basis_ptr,
    shift_ptr,
    cache_ptr,
    words_ptr,
    slots_ptr,
    item,
    region,
    scratch_ptr,
    counter,
    num_tokens,
    stride_x,
    stride_cache,
    stride_words,
    rank_max,
    stride_scratch,
    least,
    largest_scale,
    largest,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SIDE: tl.constexpr,
    STEPS: tl.constexpr,
    PROJECTED: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys or values: project, subtract the mean, and write; or, where columns are coded, leave them for the last."""
    group, share = tl.load(item + 1), tl.load(item + 5)
    begin, end = tl.multiple_of(tl.load(item + 3), 16), tl.multiple_of(tl.load(item + 4), 16)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_tokens
    col = begin + tl.arange(0, C)
    col_mask = col < end
    rows = x_ptr + row.to(tl.int64) * stride_x + group * WIDTH
    if PROJECTED:
        basis = basis_ptr + group.to(tl.int64) * WIDTH * rank_max
        x = _project(rows, row_mask, basis, WIDTH, col, col_mask, ROWS, C, K, PRECISION)
    else:
        x = tl.load(rows[:, None] + col[None, :], mask=row_mask[:, None] & col_mask[None, :], other=0.0).to(tl.float32)
    x -= tl.load(shift_ptr + group * rank_max + col, mask=col_mask, other=0.0)[None, :]

    place = tl.load(slots_ptr + row, mask=row_mask, other=-1)
    stored = place >= 0
    place = tl.where(stored, place, 0)
    block, slot = place // BLOCK_SIZE, place % BLOCK_SIZE
    if share == 0:
        x = tl.where(x > largest, largest, tl.where(x < -largest, -largest, x))
        offset, size, _ = tier_of(region, 0, cache_ptr.dtype.element_ty.primitive_bitwidth)
        to = cache_ptr + block * stride_cache + (offset + slot * size)
        tl.store(to[:, None] + col[None, :], x.to(cache_ptr.dtype.element_ty), mask=stored[:, None] & col_mask[None, :])
    else:
        scratch = scratch_ptr + row.to(tl.int64) * stride_scratch
        at = scratch[:, None] + (col - tl.multiple_of(tl.load(region + 1), 16))[None, :]
        tl.store(at, x, mask=stored[:, None] & col_mask[None, :])
        # All threads have written before one of them counts, and the last one to count sees what all others wrote.
        tl.debug_barrier()
        before = tl.atomic_add(counter, 1, sem="acq_rel")
        tl.debug_barrier()
        if before == share - 1:
            tl.store(counter, 0)
            _pack(
                scratch,
                stored,
                block,
                slot,
                words_ptr,
                stride_words,
                region,
                least,
                largest_scale,
                BLOCK_SIZE,
                SIDE,
                STEPS,
                ROWS,
                16,
            )


# Numbers, and places of tokens in a batch, that change from step to step must not each compile a kernel.
@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slots_ptr"])
def _store_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    projected_ptr,
    cache_ptr,
    words_ptr,
    slots_ptr,
    items_ptr,
    regions_ptr,
    key_down_ptr,
    key_shift_ptr,
    query_up_ptr,
    value_down_ptr,
    value_shift_ptr,
    scratch_ptr,
    counters_ptr,
    num_tokens,
    num_groups,
    stride_q,
    stride_k,
    stride_v,
    stride_p_token,
    stride_p_group,
    stride_p_head,
    stride_cache,
    stride_words,
    stride_scratch,
    rank_k,
    rank_v,
    least,
    largest_scale,
    largest,
    BLOCK_SIZE: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    D: tl.constexpr,
    FIELDS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    STEPS: tl.constexpr,
    FOLDED: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Shapes: q [T, H, d], k and v [T, G J, d], projected [T, G, J, M, R], scratch [2, G, T, R] float32,
    counters [2, G, tiles of T] int32."""
    item = items_ptr + 6 * tl.program_id(1)
    kind, group = tl.load(item), tl.load(item + 1)
    tile = tl.program_id(0)
    WIDTH: tl.constexpr = GROUP_HEADS * D
    if kind == 0:
        kv_head = group * GROUP_HEADS + tl.load(item + 2)
        begin, end = tl.multiple_of(tl.load(item + 3), 16), tl.multiple_of(tl.load(item + 4), 16)
        row = tile * ROWS + tl.arange(0, ROWS)
        row_mask = row < num_tokens * QUERY_HEADS
        token, query_head = (row // QUERY_HEADS).to(tl.int64), row % QUERY_HEADS
        col = begin + tl.arange(0, C)
        rows = q_ptr + token * stride_q + (kv_head * QUERY_HEADS + query_head) * D
        basis = query_up_ptr + kv_head.to(tl.int64) * D * rank_k
        x = _project(rows, row_mask, basis, D, col, col < end, ROWS, C, K, PRECISION)
        head = tl.load(item + 2) * QUERY_HEADS + query_head
        to = projected_ptr + token * stride_p_token + group * stride_p_group + head * stride_p_head
        tl.store(
            to[:, None] + col[None, :],
            x.to(projected_ptr.dtype.element_ty),
            mask=row_mask[:, None] & (col < end)[None, :],
        )
    elif tile * ROWS < num_tokens:
        side = (kind - 1) * num_groups + group
        region = regions_ptr + group * (2 * FIELDS)
        scratch = scratch_ptr + side.to(tl.int64) * num_tokens * stride_scratch
        counter = counters_ptr + side * tl.cdiv(num_tokens, ROWS) + tile
        if kind == 1:
            _store_side(
                k_ptr, key_down_ptr, key_shift_ptr, cache_ptr, words_ptr, slots_ptr, item, region,
                scratch, counter, num_tokens, stride_k, stride_cache, stride_words, rank_k,
                stride_scratch, least, largest_scale, largest, WIDTH, BLOCK_SIZE, KEY, STEPS, True, ROWS, C, K,
                PRECISION,
            )  # fmt: skip
        else:
            _store_side(
                v_ptr, value_down_ptr, value_shift_ptr, cache_ptr, words_ptr, slots_ptr, item,
                region + FIELDS, scratch, counter, num_tokens, stride_v, stride_cache, stride_words, rank_v,
                stride_scratch, least, largest_scale, largest, WIDTH, BLOCK_SIZE, VALUE, STEPS, not FOLDED,
                ROWS, C, K, PRECISION,
            )  # fmt: skip


@dataclass(frozen=True)
class StoreWorkspace:
    """Buffers of one launch, of any layer whose needs they cover; flat.

    scratch: float32, coordinates that wait to be quantised.
    counters: int32, zero before the first launch; every launch leaves them zero.
    """

    scratch: torch.Tensor
    counters: torch.Tensor

    @staticmethod
    def sizes(table: LayerTable, num_tokens: int) -> tuple[int, int]:
        """Numbers that `scratch` and `counters` hold for at most so many tokens."""
        coded = table.shapes.coded
        rows = 2 * table.num_groups * num_tokens
        return (rows * max(table.rank_k, table.rank_v), rows) if coded else (0, 0)

    @classmethod
    def make(cls, table: LayerTable, num_tokens: int) -> StoreWorkspace:
        device = table.regions.device
        scratch, counters = cls.sizes(table, num_tokens)
        return cls(
            torch.empty(scratch, dtype=torch.float32, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
        )


def project_and_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    table: LayerTable,
    slots: torch.Tensor,
    projected: torch.Tensor,
    workspace: StoreWorkspace,
) -> None:
    """k' = (k - mean) A, v' = (v - mean) C and q' = q B[head], cut to the group's rank; k' and v' go to their slots.

    Shapes:
        query: [T, H, d], key and value: [T, groups * J, d]; values already times C where the bases say so
        cache: [num_blocks, 1, block_size, bytes_per_token / itemsize]
        slots: [T] int64, block * block_size + offset; tokens of negative ones are not stored
        projected: [T, G, J, M, R], R at least the layer's largest key rank; gets q', up to each group's rank
    """
    T, H, d = query.shape
    G, J = table.num_groups, table.group_heads
    pages = launch.check_store(query, key, value, cache, table, slots, projected)
    launch.check_buffers(
        {"scratch": workspace.scratch, "counters": workspace.counters}, StoreWorkspace.sizes(table, T), query.device
    )
    if T == 0:
        return
    M = H // (G * J)
    rows, columns = (16, 32) if T <= FEW_TOKENS else (64, 64)
    items = table.items[columns]
    on(_store_kernel, (triton.cdiv(T * M, rows), len(items)))(
        query,
        key,
        value,
        projected,
        *pages.pages,
        slots,
        items,
        table.regions,
        table.key_down,
        table.key_shift,
        table.query_up,
        table.key_down if table.value_down is None else table.value_down,
        table.value_shift,
        workspace.scratch,
        workspace.counters,
        T,
        G,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        projected.stride(0),
        projected.stride(1),
        projected.stride(3),
        *pages.strides,
        max(table.rank_k, table.rank_v),
        table.rank_k,
        table.rank_v,
        LEAST_SCALE,
        LARGEST_SCALE,
        torch.finfo(query.dtype).max if query.dtype == torch.float16 else float("inf"),
        BLOCK_SIZE=table.layout.block_size,
        GROUP_HEADS=J,
        QUERY_HEADS=M,
        D=d,
        FIELDS=SIDE_FIELDS,
        KEY=(table.shapes.key.chunks,),
        VALUE=(table.shapes.value.chunks,),
        STEPS=(1.0, *STEPS.values()),
        FOLDED=table.value_down is None,
        ROWS=rows,
        C=columns,
        K=64,
        PRECISION=launch.precision(query.dtype),
        num_warps=4,
    )
