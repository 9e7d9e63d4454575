# SPDX-License-Identifier: Apache-2.0
"""One layer's step on a CPU: in PyTorch, the reference of all other kernels, or where it decodes, in numba."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mkv_kernels.attend import attend
from mkv_kernels.pages import RunPages, view_pages
from mkv_kernels.store import project_and_store

if TYPE_CHECKING:
    import torch

    from mkv_kernels.bases import LayerBases
    from mkv_kernels.compiled.decode import LayerDecode
    from mkv_kernels.compiled.store import LayerStore
    from vllm_mkv.serving.metadata import CPUMetadata


class CPUAttention:
    def __init__(
        self,
        bases: LayerBases,
        scale: float,
        compiled: tuple[LayerStore, LayerDecode] | None = None,
        *,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> None:
        """`compiled` stores where all requests decode, and attends for those that the step's metadata name so, with the
        same window and soft-cap."""
        self.bases, self.scale, self.compiled = bases, scale, compiled
        self.window, self.soft_cap = window, soft_cap
        self._pages: tuple[RunPages, ...] = ()
        self._pages_of: torch.Tensor | None = None

    def reserve(self) -> None:
        """PyTorch allocates as it goes."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        step: CPUMetadata,
        output: torch.Tensor,
    ) -> None:
        """Stores the step's tokens and attends; shapes as in `MKVAttentionImpl.forward`."""
        if self._pages_of is not kv_cache:
            self._pages, self._pages_of = view_pages(kv_cache, self.bases.layout), kv_cache
        tokens = slice(step.num_actual_tokens)
        query, key, value, output = query[tokens], key[tokens], value[tokens], output[tokens]
        if step.only_decodes:
            assert self.compiled is not None
            projected = self.compiled[0](query, key, value, kv_cache, step.slots)
        else:  # of many tokens, matrix products are faster
            projected = project_and_store(query, key, value, self._pages, self.bases, step.slots, step.tokens)
        if step.decodes is not None:
            assert self.compiled is not None
            self.compiled[1](projected, kv_cache, step.decodes, output)
        buckets = step.buckets[self.window]
        attend(projected, self._pages, self.bases, buckets, self.scale, output, self.soft_cap)
