# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as calls without arguments, with all that they write to allocated before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.layer import Layer, Queries, Requests, Shape
from mkv_kernels.fused.table import LayerTable

AttentionArguments = tuple[
    torch.Tensor, torch.Tensor, LayerTable, torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor
]


@dataclass(frozen=True)
class Launch:
    """`run` writes `output`: attention's, or q' of the store."""

    run: Callable[[], None]
    output: torch.Tensor


def decode(
    layer: Layer, shape: Shape, requests: Requests, query: torch.Tensor, cache: torch.Tensor, num_processors: int
) -> Launch:
    from mkv_kernels.fused.decode import DecodeWorkspace, decode
    from mkv_kernels.fused.splits import choose_splits

    num_splits = choose_splits(layer.table, shape.batch, shape.context, num_processors)
    workspace = DecodeWorkspace.make(layer.table, shape.num_tokens, layer.num_heads, num_splits)
    output = layer.new_output(shape.num_tokens)
    arguments = _attention_arguments(layer, requests, query, cache, output)
    return Launch(lambda: decode(*arguments, workspace, max_queries=shape.queries, num_splits=num_splits), output)


def prefill(layer: Layer, shape: Shape, requests: Requests, queries: Queries, cache: torch.Tensor) -> Launch:
    """As the backend launches it: pages are expanded first where that is faster."""
    from mkv_kernels.fused.expand import Expansion, expand
    from mkv_kernels.fused.prefill import prefill

    output = layer.new_output(shape.num_tokens)
    expansion = Expansion.of(layer.table)
    if expansion is None:
        arguments = _attention_arguments(layer, requests, queries.projected, cache, output)
        return Launch(lambda: prefill(*arguments), output)
    block_size = layer.layout.block_size
    numbers = expansion.numbers_per_block() // block_size
    expanded = torch.full_like(cache[..., :1], float("nan")).expand(-1, -1, -1, numbers).contiguous()
    table = torch.arange(len(cache), dtype=torch.int32, device=cache.device).view(shape.batch, -1)
    lengths, starts = requests.seq_lens, requests.query_start_loc
    query = queries.own if expansion.own_queries else queries.projected

    def run() -> None:
        expand(
            cache,
            layer.table,
            expansion,
            requests.block_table,
            lengths,
            expanded,
            table,
            max_seq_len=shape.context,
        )
        prefill(query, expanded, expansion.table, table, lengths, starts, layer.setting.scale, output)

    return Launch(run, output)


def _attention_arguments(
    layer: Layer, requests: Requests, query: torch.Tensor, cache: torch.Tensor, output: torch.Tensor
) -> AttentionArguments:
    """What decode and prefill both take, in order."""
    step = (requests.block_table, requests.seq_lens, requests.query_start_loc)
    return (query, cache, layer.table, *step, layer.setting.scale, output)


def store(layer: Layer, inputs: tuple[torch.Tensor, ...], slots: torch.Tensor, cache: torch.Tensor) -> Launch:
    from mkv_kernels.fused.store import StoreWorkspace, project_and_store

    q, k, v = inputs
    workspace = StoreWorkspace.make(layer.table, len(q))
    shape = (len(q), layer.num_groups, layer.group_heads, layer.query_heads, layer.table.rank_k)
    projected = torch.full(shape, float("nan"), dtype=q.dtype, device=q.device)

    def run() -> None:
        project_and_store(q, k, v, cache, layer.table, slots, projected, workspace)

    return Launch(run, projected)
