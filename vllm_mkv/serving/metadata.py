# SPDX-License-Identifier: Apache-2.0
"""A step's metadata, built once for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from mkv_kernels.schedule import Bucket, make_buckets
from vllm_mkv.serving import compat


@dataclass(frozen=True)
class MKVMetadata:
    """Shapes: slots [S] int64, none negative; tokens [S] int64, or None where token i goes to slot i."""

    num_actual_tokens: int
    slots: torch.Tensor
    tokens: torch.Tensor | None
    buckets: list[Bucket]


class MKVMetadataBuilder(AttentionMetadataBuilder[MKVMetadata]):
    """Builds on the host: the attention of this version is PyTorch, and cannot be captured into a CUDA graph."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        self.dtype = vllm_config.model_config.dtype

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MKVMetadata:
        # Layers whose specs differ have builders of their own, which all get the same object in a step.
        return compat.memo_on_step(common_attn_metadata, lambda: self._build(common_attn_metadata))

    def _build(self, step: CommonAttentionMetadata) -> MKVMetadata:
        if step.causal is not True:
            raise NotImplementedError("attention that is not causal; serve this model with another backend")
        slots = step.slot_mapping[: step.num_actual_tokens].long()
        kept = slots >= 0
        tokens = None if bool(kept.all()) else kept.nonzero()[:, 0]
        return MKVMetadata(
            num_actual_tokens=step.num_actual_tokens,
            slots=slots if tokens is None else slots[tokens],
            tokens=tokens,
            buckets=make_buckets(
                step.query_start_loc_cpu[: step.num_reqs + 1],
                step.seq_lens[: step.num_reqs].cpu(),
                step.block_table_tensor[: step.num_reqs],
                self.block_size,
                self.dtype,
            ),
        )
