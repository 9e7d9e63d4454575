# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as calls without arguments, with all that they write to allocated before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.layer import Layer, Requests, Shape


@dataclass(frozen=True)
class Launch:
    """`run` writes `output`: attention's, or q' of the store."""

    run: Callable[[], None]
    output: torch.Tensor


def decode(
    layer: Layer, shape: Shape, requests: Requests, query: torch.Tensor, cache: torch.Tensor, num_processors: int
) -> Launch:
    from mkv_kernels.fused.decode import DecodeWorkspace, choose_splits, decode

    num_splits = choose_splits(layer.table, shape.batch, shape.context, num_processors)
    workspace = DecodeWorkspace.make(layer.table, shape.num_tokens, layer.num_heads, num_splits)
    output = layer.new_output(shape.num_tokens)

    def run() -> None:
        decode(
            query,
            cache,
            layer.table,
            requests.block_table,
            requests.seq_lens,
            requests.query_start_loc,
            layer.setting.scale,
            output,
            workspace,
            max_queries=shape.queries,
            num_splits=num_splits,
        )

    return Launch(run, output)


def prefill(layer: Layer, shape: Shape, requests: Requests, query: torch.Tensor, cache: torch.Tensor) -> Launch:
    from mkv_kernels.fused.prefill import prefill

    output = layer.new_output(shape.num_tokens)

    def run() -> None:
        prefill(
            query,
            cache,
            layer.table,
            requests.block_table,
            requests.seq_lens,
            requests.query_start_loc,
            layer.setting.scale,
            output,
        )

    return Launch(run, output)


def store(layer: Layer, inputs: tuple[torch.Tensor, ...], slots: torch.Tensor, cache: torch.Tensor) -> Launch:
    from mkv_kernels.fused.store import StoreWorkspace, project_and_store

    q, k, v = inputs
    workspace = StoreWorkspace.make(layer.table, len(q))
    shape = (len(q), layer.num_groups, layer.group_heads, layer.query_heads, layer.table.rank_k)
    projected = torch.full(shape, float("nan"), dtype=q.dtype, device=q.device)

    def run() -> None:
        project_and_store(q, k, v, cache, layer.table, slots, projected, workspace)

    return Launch(run, projected)
