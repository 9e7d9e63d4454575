# SPDX-License-Identifier: Apache-2.0
"""The attention backend that `--attention-backend mkv` names: what it supports, and which classes do the work."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf

from mkv_kernels.layout import PAGE_STEP
from vllm_mkv.serving.attention import MKVAttentionImpl
from vllm_mkv.serving.metadata import MKVMetadataBuilder


class MKVAttentionBackend(AttentionBackend):
    """Causal decoder attention over a projected KV cache.

    Cache: `[num_blocks, 1, block_size, bytes_per_token / itemsize]`; `mkv_kernels.layout` says what lies where in it.
    """

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float32", "bfloat16", "float16"]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_STEP)]

    @staticmethod
    def get_name() -> str:
        return "MKV"

    @staticmethod
    def get_impl_cls() -> type[MKVAttentionImpl]:
        return MKVAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[MKVMetadataBuilder]:
        return MKVMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 16 == 0

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        # Steps are planned from the lengths on the CPU.
        return False
