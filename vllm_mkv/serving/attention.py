# SPDX-License-Identifier: Apache-2.0
"""One attention layer as vLLM knows it: what it refuses, and whom it hands a step to. No arithmetic of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionType

if TYPE_CHECKING:
    from vllm_mkv.serving.metadata import MKVMetadata


class LayerAttention(Protocol):
    """A layer's bases and the kernels that use them."""

    def reserve(self) -> None:
        """Allocates what the largest step needs beside the cache, and compiles what steps launch."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        step: Any,
        output: torch.Tensor,
    ) -> None:
        """Stores the step's tokens and attends; shapes as in `MKVAttentionImpl.forward`."""


class MKVAttentionImpl(AttentionImpl):
    """`MKVModelLoader` sets `attention` once the weights are there."""

    attention: LayerAttention | None = None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **other: Any,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes,
            "attention sinks": sinks,
            "a KV cache shared between layers": kv_sharing_target_layer_name,
            f"attention of type {attn_type}": attn_type if attn_type != AttentionType.DECODER else None,
            **other,
        }
        for feature, value in refused.items():
            if value is not None and value is not False and value != 0:
                raise NotImplementedError(f"{feature} is not supported with MKV; serve this model with another backend")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        # As the kernels take them: 0 is none.
        self.window, self.soft_cap = sliding_window or 0, float(logits_soft_cap or 0.0)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: MKVMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Shapes:
        query, output: [num_tokens, num_heads, head_size]
        key, value:    [num_tokens, num_kv_heads, head_size]
        kv_cache:      [num_blocks, 1, block_size, bytes_per_token / itemsize]
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantisation is not supported with MKV")
        if attn_metadata is None:  # profiling: vLLM has allocated no cache yet
            if self.attention is not None:
                self.attention.reserve()
            return output.fill_(0)
        assert self.attention is not None, "the adapter was not loaded into this layer"
        self.attention(query, key, value, kv_cache, attn_metadata, output)
        return output
