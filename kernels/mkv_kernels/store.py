# SPDX-License-Identifier: Apache-2.0
"""Project a step's queries, keys and values, and write keys and values into their pages."""

from __future__ import annotations

import torch

from mkv_kernels.bases import LayerBases
from mkv_kernels.pages import RunPages


def project_and_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: tuple[RunPages, ...],
    bases: LayerBases,
    slots: torch.Tensor,
    tokens: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """k' = (k - mean) A, v' = (v - mean) C and q' = q B[head], cut to the group's rank; k' and v' go to their slots.

    Projections are computed in float32 whatever the dtype; q' and the 16-bit tier have the dtype of the inputs, and
    the coordinates of the other tiers are quantised as `codes` says.

    Shapes:
        query: [T, H, d], key and value: [T, groups * J, d]; values already times C where the bases say so
        slots: [S] int64, block * block_size + offset, none negative
        tokens: [S] int64, the token of each slot; None where token i goes to slot i

    Returns:
        q' for every run, [T, G, J, M, Rk].
    """
    block_size, J, d = bases.layout.block_size, bases.group_heads, bases.head_size
    T, num_groups = query.shape[0], len(bases.layout.widths)
    block, offset = slots // block_size, slots % block_size
    q_TGJMd = query.view(T, num_groups, J, -1, d)
    k_TGn = key.reshape(T, num_groups, J * d)
    v_TGn = value.reshape(T, num_groups, J * d)
    projected = []
    for run, page in zip(bases.runs, pages, strict=True):
        q, k, v = (x if run.groups is None else x[:, run.groups] for x in (q_TGJMd, k_TGn, v_TGn))
        if tokens is not None:
            k, v = k[tokens], v[tokens]
        k = torch.einsum("tgn,gnr->tgr", k.float(), run.key_down) - run.key_shift
        if run.value_down is None:
            v = v[..., : run.rank_v].float() - run.value_shift
        else:
            v = torch.einsum("tgn,gnr->tgr", v.float(), run.value_down) - run.value_shift
        page.key.write(block, offset, k)
        page.value.write(block, offset, v)
        projected.append(torch.einsum("tgjmd,gjdr->tgjmr", q.float(), run.query_up).to(query.dtype))
    return tuple(projected)
