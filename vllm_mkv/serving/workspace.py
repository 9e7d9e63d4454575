# SPDX-License-Identifier: Apache-2.0
"""Memory that the Triton kernels of all layers share: reserved once for the largest step, never allocated in one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mkv_kernels.fused.decode import MAX_QUERIES, DecodeWorkspace
from mkv_kernels.fused.expand import Expansion
from mkv_kernels.fused.splits import choose_splits
from mkv_kernels.fused.store import StoreWorkspace
from vllm_mkv.serving import compat

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from mkv_kernels.fused.table import LayerTable


MOST_EXPANDED_TOKENS = 1 << 16
"""Cached tokens that prefill expands at once, in all requests of a step: 256 MiB for 8 KV heads of 128."""


@dataclass(frozen=True)
class StepLimits:
    """What no step of an engine exceeds.

    tokens: of a step; padding for CUDA graphs included.
    requests: that decode in a step.
    queries: of a request that counts as decoding: 1, and the speculative ones where there are any.
    seq_len: cached tokens of a request.
    processors: of the device, which work is cut up for.
    """

    tokens: int
    requests: int
    queries: int
    seq_len: int
    processors: int

    @property
    def expands_all(self) -> bool:
        """Whether there is room to expand a request of any length."""
        return self.seq_len <= MOST_EXPANDED_TOKENS

    def expanded_blocks(self, block_size: int) -> int:
        """Room for the context of a request of any length, and for a step's prompts with twice as many tokens."""
        tokens = min(max(self.seq_len, 2 * self.tokens), MOST_EXPANDED_TOKENS)
        # The last block of every request has one token at least.
        return -(-tokens // block_size) + min(self.requests, self.tokens)

    @classmethod
    def of(cls, vllm_config: VllmConfig, device: torch.device) -> StepLimits:
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        scheduler = vllm_config.scheduler_config
        return cls(
            tokens=max(scheduler.max_num_batched_tokens, captured),
            requests=max(scheduler.max_num_seqs, captured),
            queries=decode_queries(vllm_config),
            seq_len=vllm_config.model_config.max_model_len,
            processors=compat.num_processors(device),
        )


def decode_queries(vllm_config: VllmConfig) -> int:
    """Queries of a decoding request at most. Longer drafts than the decode kernel takes count as prefill."""
    queries = compat.max_decode_queries(vllm_config)
    return queries if queries <= MAX_QUERIES else 1


@dataclass(frozen=True)
class Buffers:
    """Views of one allocation.

    projected: [numbers] of the model's dtype, q' of a step.
    expanded: [numbers] of the model's dtype, pages that prefill expands.
    """

    projected: torch.Tensor
    expanded: torch.Tensor
    store: StoreWorkspace
    decode: DecodeWorkspace


class Workspace:
    """One for all layers of a model: they run one after another.

    `admit` every layer, `reserve` before memory is measured, and ask for `buffers` in a step.
    """

    def __init__(self, limits: StepLimits, dtype: torch.dtype, device: torch.device) -> None:
        self.limits, self.dtype, self.device = limits, dtype, device
        self._projected, self._expanded = 0, 0
        self._scratch, self._counters = 0, 0
        self._partial, self._stats = 0, 0
        self._buffers: Buffers | None = None

    def admit(self, table: LayerTable, num_heads: int, expansion: Expansion | None) -> None:
        """Makes room for a layer of `num_heads` query heads."""
        limits = self.limits
        self._buffers = None
        if expansion is not None:
            numbers = limits.expanded_blocks(table.layout.block_size) * expansion.numbers_per_block()
            self._expanded = max(self._expanded, numbers)
        self._projected = max(self._projected, limits.tokens * num_heads * table.rank_k)
        scratch, counters = StoreWorkspace.sizes(table, limits.tokens)
        self._scratch, self._counters = max(self._scratch, scratch), max(self._counters, counters)
        # The more requests, the fewer splits; of all numbers of requests with as many splits, the largest needs most.
        largest: dict[int, int] = {}
        for requests in range(1, limits.requests + 1):
            largest[choose_splits(table, requests, limits.seq_len, limits.processors)] = requests
        for splits, requests in largest.items():
            partial, stats = DecodeWorkspace.sizes(table, requests * limits.queries, num_heads, splits)
            self._partial, self._stats = max(self._partial, partial), max(self._stats, stats)

    def reserve(self) -> None:
        """Allocates all that any step will need, so that vLLM's memory profile counts it."""
        self._take()

    def buffers(self) -> Buffers:
        if self._buffers is not None:
            return self._buffers
        buffers = self._take()
        # Until vLLM locks its workspace, it may still grow and move.
        if compat.workspace_is_final():
            self._buffers = buffers
        return buffers

    def _take(self) -> Buffers:
        projected, expanded, scratch, partial, stats = compat.shared_workspace(
            self.device,
            (self._projected, self.dtype),
            (self._expanded, self.dtype),
            (self._scratch, torch.float32),
            (self._partial, torch.float32),
            (self._stats, torch.float32),
        )
        # Every launch leaves the counters at zero, which others that share memory would not.
        counters = compat.zeroed_workspace(self.device, "mkv_counters", self._counters, torch.int32)
        return Buffers(projected, expanded, StoreWorkspace(scratch, counters), DecodeWorkspace(partial, stats))
