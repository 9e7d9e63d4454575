# SPDX-License-Identifier: Apache-2.0
"""A step's metadata, built once for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from mkv_kernels.schedule import MAX_SCORES, Bucket, Decodes, make_buckets, split_decodes
from vllm_mkv.serving import compat
from vllm_mkv.serving.attention import MKVAttentionImpl
from vllm_mkv.serving.kernels import choose_kernels
from vllm_mkv.serving.options import MKVOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

COMPILED_QUERIES = 4
"""Of a request, at most, for which numba's kernel attends. It reads the cache once for each."""


@dataclass(frozen=True)
class CPUMetadata:
    """Shapes: slots [S] int64, none negative; tokens [S] int64, or None where token i goes to slot i.

    decodes: what the compiled kernel attends for; None where there is none, or it is not used.
    buckets: of the other requests, for every window that a layer of the model has; 0 is none.
    """

    num_actual_tokens: int
    slots: torch.Tensor
    tokens: torch.Tensor | None
    decodes: Decodes | None
    buckets: dict[int, list[Bucket]]

    @property
    def only_decodes(self) -> bool:
        """And every token has a slot."""
        return self.decodes is not None and self.tokens is None and not any(self.buckets.values())


@dataclass(frozen=True)
class Requests:
    """Shapes: block_table [B, blocks], seq_lens [B], query_start_loc [B + 1], all int32."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor

    @classmethod
    def of(cls, step: CommonAttentionMetadata, first: int, last: int) -> Requests | None:
        if first == last:
            return None
        return cls(
            step.block_table_tensor[first:last], step.seq_lens[first:last], step.query_start_loc[first : last + 1]
        )


@dataclass(frozen=True)
class Prefills:
    """Requests that do not decode.

    max_seq_len: at least the longest one's.
    expanded_table: [B, blocks] int32, where `expand` puts their pages; None for one that is too long for that.
    """

    requests: Requests
    max_seq_len: int
    expanded_table: torch.Tensor | None


@dataclass(frozen=True)
class TritonMetadata:
    """Views of the step's own tensors. Decoding requests come before all others.

    slots: [num_actual_tokens] int64, negative for tokens that are padding.
    max_seq_len: at least the longest decoding request's; for a CUDA graph, that of any request.
    """

    num_actual_tokens: int
    slots: torch.Tensor
    decodes: Requests | None
    prefills: tuple[Prefills, ...]
    num_decode_tokens: int
    max_decode_queries: int
    max_seq_len: int


MKVMetadata = CPUMetadata | TritonMetadata


def one_behind_the_other(seq_lens: torch.Tensor, block_size: int, most_blocks: int) -> torch.Tensor:
    """A block table, [B, most_blocks] int32, of requests whose blocks follow each other, from 0 on."""
    blocks = (seq_lens + (block_size - 1)) // block_size
    own = torch.arange(most_blocks, dtype=torch.int32, device=seq_lens.device)
    return (blocks.cumsum(0, dtype=torch.int32) - blocks)[:, None] + own


def kernels_of(vllm_config: VllmConfig) -> str:
    return choose_kernels(MKVOptions.of(vllm_config).kernels, vllm_config.model_config.dtype)


class MKVMetadataBuilder(AttentionMetadataBuilder[MKVMetadata]):
    """With Triton, from shapes alone, nothing is waited for; the others need the lengths on the host."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        self.dtype = vllm_config.model_config.dtype
        self.kernels = kernels_of(vllm_config)
        self.max_model_len = vllm_config.model_config.max_model_len
        layers = compat.attention_layers(vllm_config).values()
        impls = [layer.impl for layer in layers if isinstance(layer.impl, MKVAttentionImpl)]
        self.windows = {impl.window for impl in impls}
        # Where scores are capped, those of all heads are in memory.
        self.max_scores = MAX_SCORES // max([1, *(impl.num_heads for impl in impls if impl.soft_cap)])
        if self.kernels == "triton":
            from vllm_mkv.serving.workspace import StepLimits, decode_queries

            self.expanded_blocks = StepLimits.of(vllm_config, device).expanded_blocks(self.block_size)
            # vLLM's runners bring requests of at most so many queries to the front.
            self.reorder_batch_threshold = decode_queries(vllm_config)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: object) -> AttentionCGSupport:
        """Steps in which all requests decode, with their speculative tokens where there are few enough."""
        if kernels_of(vllm_config) != "triton":
            return AttentionCGSupport.NEVER
        from vllm_mkv.serving.workspace import decode_queries

        if decode_queries(vllm_config) == compat.max_decode_queries(vllm_config):
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MKVMetadata:
        # Layers whose specs differ have builders of their own, which all get the same object in a step.
        return compat.memo_on_step(common_attn_metadata, lambda: self._build(common_attn_metadata))

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> MKVMetadata:
        # A graph serves requests of any length.
        return self.build(0, common_attn_metadata.replace(max_seq_len=self.max_model_len))

    def _build(self, step: CommonAttentionMetadata) -> MKVMetadata:
        if step.causal is not True:
            raise NotImplementedError("attention that is not causal; serve this model with another backend")
        return self._build_triton(step) if self.kernels == "triton" else self._build_cpu(step)

    def _build_triton(self, step: CommonAttentionMetadata) -> TritonMetadata:
        assert self.reorder_batch_threshold is not None
        num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(step, self.reorder_batch_threshold)
        lengths = step.query_start_loc_cpu[: num_decodes + 1].diff()
        # Two kinds of steps rather than one per number of queries: each compiles kernels of its own.
        single = num_decodes == 0 or int(lengths.max()) <= 1
        return TritonMetadata(
            num_actual_tokens=step.num_actual_tokens,
            slots=step.slot_mapping[: step.num_actual_tokens],
            decodes=Requests.of(step, 0, num_decodes),
            prefills=self._prefills(step, num_decodes),
            num_decode_tokens=num_decode_tokens,
            max_decode_queries=1 if single else self.reorder_batch_threshold,
            max_seq_len=step.max_seq_len,
        )

    def _prefills(self, step: CommonAttentionMetadata, first: int) -> tuple[Prefills, ...]:
        """Of the requests from `first` on, as many at once as can be expanded at once."""
        if first == step.num_reqs:
            return ()
        bounds = step.seq_lens_cpu_upper_bound
        lengths = [step.max_seq_len] * step.num_reqs if bounds is None else bounds[: step.num_reqs].tolist()
        blocks, found = [-(-length // self.block_size) for length in lengths], []
        while first < step.num_reqs:
            last = first + 1
            while last < step.num_reqs and sum(blocks[first : last + 1]) <= self.expanded_blocks:
                last += 1
            requests, table = Requests.of(step, first, last), None
            assert requests is not None
            if sum(blocks[first:last]) <= self.expanded_blocks:
                table = one_behind_the_other(requests.seq_lens, self.block_size, max(blocks[first:last]))
            found.append(Prefills(requests, max(lengths[first:last]), table))
            first = last
        return tuple(found)

    def _build_cpu(self, step: CommonAttentionMetadata) -> CPUMetadata:
        slots = step.slot_mapping[: step.num_actual_tokens].long()
        kept = slots >= 0
        tokens = None if bool(kept.all()) else kept.nonzero()[:, 0]
        starts = step.query_start_loc_cpu[: step.num_reqs + 1]
        lengths, table = step.seq_lens[: step.num_reqs].cpu(), step.block_table_tensor[: step.num_reqs]
        decodes, others = None, None
        if self.kernels == "numba":
            decodes, others = split_decodes(starts, lengths, table, COMPILED_QUERIES)
        buckets = {
            window: make_buckets(
                starts, lengths, table, self.block_size, self.dtype, self.max_scores, requests=others, window=window
            )
            for window in self.windows
        }
        return CPUMetadata(
            num_actual_tokens=step.num_actual_tokens,
            slots=slots if tokens is None else slots[tokens],
            tokens=tokens,
            decodes=decodes,
            buckets=buckets,
        )
