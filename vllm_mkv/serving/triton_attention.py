# SPDX-License-Identifier: Apache-2.0
"""One layer's step in Triton: what runs on GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mkv_kernels.fused.decode import decode
from mkv_kernels.fused.expand import Expansion, expand
from mkv_kernels.fused.prefill import check_served, prefill
from mkv_kernels.fused.splits import choose_splits, visible_tokens
from mkv_kernels.fused.store import project_and_store
from mkv_kernels.fused.table import LayerTable, Shapes
from vllm_mkv.serving.workspace import MOST_EXPANDED_TOKENS

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig

    from mkv_kernels.bases import LayerBases
    from mkv_kernels.layout import PageLayout
    from vllm_mkv.serving.metadata import Prefills, TritonMetadata
    from vllm_mkv.serving.warmup import WarmUp
    from vllm_mkv.serving.workspace import Buffers, Workspace


def check_layout(layout: PageLayout, head_size: int, model: ModelConfig, *, window: int) -> None:
    """Raises ValueError or NotImplementedError for a layer that the kernels do not take."""
    shapes = Shapes.of(layout.groups, head_size)
    if window or model.max_model_len > MOST_EXPANDED_TOKENS:
        # Pages are not expanded then, or not of all requests.
        check_served(shapes, model.dtype)


class TritonAttention:
    """`warm_up` is that of the model; None where kernels are compiled when a step first needs them."""

    def __init__(
        self,
        bases: LayerBases,
        scale: float,
        num_heads: int,
        workspace: Workspace,
        warm_up: WarmUp | None = None,
        *,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> None:
        self.table = LayerTable.build(bases)
        self.scale, self.num_heads, self.workspace, self.warm_up = scale, num_heads, workspace, warm_up
        self.window, self.soft_cap = window, soft_cap
        # Of a window, most of what is expanded would not be seen.
        self.expansion = None if window else Expansion.of(self.table)
        workspace.admit(self.table, num_heads, self.expansion)

    def reserve(self) -> None:
        self.workspace.reserve()
        if self.warm_up is not None:
            self.warm_up.run()

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        step: TritonMetadata,
        output: torch.Tensor,
    ) -> None:
        """Stores the step's tokens and attends; shapes as in `MKVAttentionImpl.forward`."""
        table, buffers, T = self.table, self.workspace.buffers(), step.num_actual_tokens
        shape = (T, table.num_groups, table.group_heads, self.num_heads // (table.num_groups * table.group_heads))
        projected = buffers.projected[: T * self.num_heads * table.rank_k].view(*shape, table.rank_k)
        project_and_store(query[:T], key[:T], value[:T], kv_cache, table, step.slots, projected, buffers.store)
        if step.decodes is not None:
            requests, tokens = step.decodes, slice(step.num_decode_tokens)
            visible = visible_tokens(step.max_seq_len, step.max_decode_queries, self.window)
            num_splits = choose_splits(table, len(requests.seq_lens), visible, self.workspace.limits.processors)
            decode(
                projected[tokens],
                kv_cache,
                table,
                requests.block_table,
                requests.seq_lens,
                requests.query_start_loc,
                self.scale,
                output[tokens],
                buffers.decode,
                max_queries=step.max_decode_queries,
                num_splits=num_splits,
                window=self.window,
                soft_cap=self.soft_cap,
            )
        for prefills in step.prefills:
            self._prefill(query[:T], projected, kv_cache, buffers, prefills, output[:T])

    def _prefill(
        self,
        query: torch.Tensor,
        projected: torch.Tensor,
        kv_cache: torch.Tensor,
        buffers: Buffers,
        step: Prefills,
        output: torch.Tensor,
    ) -> None:
        requests, expansion = step.requests, self.expansion
        table, block_table = self.table, requests.block_table
        if expansion is not None and step.expanded_table is not None:
            block_size, numbers = table.layout.block_size, expansion.numbers_per_block()
            blocks = self.workspace.limits.expanded_blocks(block_size)
            expanded = buffers.expanded[: blocks * numbers].view(blocks, 1, block_size, numbers // block_size)
            expand(
                kv_cache,
                table,
                expansion,
                block_table,
                requests.seq_lens,
                expanded,
                step.expanded_table,
                max_seq_len=step.max_seq_len,
            )
            table, block_table, kv_cache = expansion.table, step.expanded_table, expanded
            if expansion.own_queries:
                projected = query.unflatten(1, (table.num_groups, 1, -1))
        prefill(
            projected,
            kv_cache,
            table,
            block_table,
            requests.seq_lens,
            requests.query_start_loc,
            self.scale,
            output,
            window=self.window,
            soft_cap=self.soft_cap,
        )
