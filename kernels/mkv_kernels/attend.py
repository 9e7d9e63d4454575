# SPDX-License-Identifier: Apache-2.0
"""Causal attention over the projected coordinates that the pages hold, for any mix of prefill and decode."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from mkv_kernels.bases import LayerBases, RunBases
from mkv_kernels.pages import RunPages, SidePages
from mkv_kernels.schedule import Bucket


def attend(
    query: tuple[torch.Tensor, ...],
    pages: tuple[RunPages, ...],
    bases: LayerBases,
    buckets: list[Bucket],
    scale: float,
    output: torch.Tensor,
    soft_cap: float = 0.0,
) -> None:
    """output = softmax(q' k'^T scale) v' D + mean, for every query head of every latent group.

    Buckets say what a query sees; those of a layer with a window are made for it. Where there is a `soft_cap`, scores
    become soft_cap tanh(score / soft_cap) before the softmax.

    Shapes:
        query:  q' for every run, [T, G, J, M, Rk]
        output: [T, H, d]; overwritten for every token of the buckets. Where D is folded into the weights, coordinates
            of v' come out instead: the first Rv attended, the others at their mean
    """
    d, J = bases.head_size, bases.group_heads
    out_TGJMd = output.view(output.shape[0], len(bases.layout.widths), J, -1, d)
    for bucket in buckets:
        for q, page, run in zip(query, pages, bases.runs, strict=True):
            o = _attend_run(q, page, run, bucket, scale, soft_cap)
            if run.groups is None:
                out_TGJMd[bucket.tokens] = o
            else:
                out_TGJMd[bucket.tokens[:, None], run.groups] = o


def _attend_run(
    q: torch.Tensor, page: RunPages, run: RunBases, bucket: Bucket, scale: float, soft_cap: float
) -> torch.Tensor:
    """Returns [N, G, J, M, d] in the query's dtype."""
    _, G, J, M, _ = q.shape
    B, Q = bucket.blocks.shape[0], bucket.num_queries
    # Odd integers times their token's scale may be beyond float16.
    dtype = torch.float32 if q.dtype == torch.float16 and (page.key.coded or page.value.coded) else q.dtype
    q_BQGHr = q[bucket.gather].to(dtype).unflatten(0, (B, Q)).flatten(3, 4)
    k, v = _gather(page.key, bucket, dtype), _gather(page.value, bucket, dtype)
    # The fused operator wants keys and values of one size, and on CUDA some; zeros change neither scores nor the
    # coordinates kept.
    size, rank_v = max(1, k.shape[-1], v.shape[-1]), v.shape[-1]
    q_GBHQr = F.pad(q_BQGHr.permute(2, 0, 3, 1, 4), (0, size - q.shape[-1])).flatten(0, 1)
    k_GB1Lr = F.pad(k, (0, size - k.shape[-1])).flatten(0, 1).unsqueeze(1)
    v_GB1Lr = F.pad(v, (0, size - rank_v)).flatten(0, 1).unsqueeze(1)
    mask = None if bucket.mask is None else bucket.mask.to(dtype)
    if mask is not None and G > 1 and B > 1:
        mask = mask.repeat(G, 1, 1, 1)
    attention = partial(_capped_attention, soft_cap=soft_cap) if soft_cap else F.scaled_dot_product_attention
    if Q == 1:
        # All query heads of a group read the same bytes: one product has them as its rows.
        rows_mask = None if mask is None else mask.expand(-1, -1, J * M, -1)
        o = attention(q_GBHQr.transpose(1, 2), k_GB1Lr, v_GB1Lr, attn_mask=rows_mask, scale=scale)
        o = o.transpose(1, 2)
    else:
        heads = (-1, J * M, -1, -1)
        o = attention(
            q_GBHQr, k_GB1Lr.expand(heads), v_GB1Lr.expand(heads), attn_mask=mask, is_causal=mask is None, scale=scale
        )
    o = o[..., :rank_v].unflatten(0, (G, B)).permute(1, 3, 0, 2, 4).flatten(0, 1).unflatten(2, (J, M))
    if bucket.rows is not None:
        o = o[bucket.rows]
    mean = run.value_mean[:, :, None]
    if run.value_up is None:
        wide = F.pad(o.float(), (0, mean.shape[-1] - rank_v))
        return (wide + mean).to(q.dtype)
    return (torch.einsum("tgjmr,gjrd->tgjmd", o.float(), run.value_up) + mean).to(q.dtype)


def _capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None,
    scale: float,
    soft_cap: float,
    is_causal: bool = False,
) -> torch.Tensor:
    """As torch's fused operator, which knows no soft-cap, of keys and values that all heads share.

    Shapes: q [B, H, Q, r], k and v [B, .., L, r], attn_mask broadcast to [B, H, Q, L]; returns [B, H, Q, r]. All scores
    are in memory at once, in float32 at least.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    # Heads are rows too: products of broadcast matrices would copy them.
    s = q.flatten(1, 2).to(wide) @ k[:, 0].mT.to(wide)
    s = s.mul_(scale / soft_cap).tanh_().mul_(soft_cap).unflatten(1, q.shape[1:3])
    if attn_mask is not None:
        s += attn_mask
    elif is_causal:
        s.masked_fill_(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -torch.inf)
    return (s.softmax(-1).to(v.dtype).flatten(1, 2) @ v[:, 0]).unflatten(1, q.shape[1:3])


def _gather(side: SidePages, bucket: Bucket, dtype: torch.dtype) -> torch.Tensor:
    """[G, B, L, R], with zeros where a request has no token, whatever lies there."""
    x = side.read(bucket.blocks, bucket.length, dtype)
    if bucket.unused is not None:
        x[:, :, bucket.first_unused :].masked_fill_(bucket.unused, 0)
    return x
