# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels of all layers before the first request, which would wait for them otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from mkv_kernels.fused.ahead import compile_ahead
from mkv_kernels.fused.combine import FEW_ROWS, FEW_SPLITS
from mkv_kernels.fused.splits import LEAST_TOKENS
from mkv_kernels.fused.store import FEW_TOKENS
from vllm_mkv.serving.metadata import Prefills, Requests, TritonMetadata
from vllm_mkv.serving.triton_attention import TritonAttention

if TYPE_CHECKING:
    from vllm_mkv.serving.attention import MKVAttentionImpl
    from vllm_mkv.serving.workspace import StepLimits, Workspace

logger = init_logger("vllm.mkv.warmup")


class WarmUp:
    """Of a model, during vLLM's profiling run: before CUDA graphs are captured, and while memory is measured.

    A kernel is compiled for its constants, which are the layer's, for the dtypes, and for which pointers and strides
    are multiples of 16: here those of tensors of the right shapes, of which nothing is read or written. Beyond that, it
    depends on few things of a step, which `steps` has all combinations of. Layers alike share what was compiled.
    """

    def __init__(self, impls: Sequence[MKVAttentionImpl], workspace: Workspace, num_threads: int) -> None:
        self.impls, self.workspace, self.num_threads = impls, workspace, num_threads
        self.done = False

    def run(self) -> None:
        """Does nothing when called again: vLLM has steps without metadata later too."""
        if self.done:
            return
        self.done = True
        start = time.perf_counter()
        num_kernels = compile_ahead(self._launch, self.num_threads)
        logger.info("MKV: %d Triton kernels compiled or loaded in %.1f s", num_kernels, time.perf_counter() - start)

    def _launch(self) -> None:
        for impl in self.impls:
            assert isinstance(impl.attention, TritonAttention)
            launch_steps(impl.attention, self.workspace)


def launch_steps(attention: TritonAttention, workspace: Workspace) -> None:
    """One layer's steps of all kinds; inside `compile_ahead`, since the tensors hold nothing."""
    table, num_heads = attention.table, attention.num_heads
    layout, num_kv_heads = table.layout, table.num_groups * table.group_heads
    dtype, device = workspace.dtype, workspace.device
    cache = torch.empty(2, 1, layout.block_size, layout.bytes_per_token // layout.itemsize, dtype=dtype, device=device)
    for step in steps(workspace.limits, num_heads // num_kv_heads, device):
        query, key, value, output = (
            torch.empty(step.num_actual_tokens, heads, table.head_size, dtype=dtype, device=device)
            for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
        )
        attention(query, key, value, cache, step, output)


def steps(limits: StepLimits, query_heads: int, device: torch.device) -> Iterator[TritonMetadata]:
    """Steps within the limits that between them launch every kernel that any step does.

    Decoding, with a request's single query or several, and prefill; few tokens and many, by the bounds of the store
    and of the product with D; one request and the most, which have most splits and fewest, and one of a context that is
    cut into few whatever the GPU; `query_heads` are those of a KV head.
    """
    many = FEW_ROWS // query_heads + 1
    for queries in sorted({1, limits.queries}):
        most = min(limits.tokens, limits.requests * queries)
        for tokens in sorted({min(queries, limits.tokens), min(many, most), most}):
            yield _step(tokens, queries, limits, device, decodes=True)
    short = replace(limits, seq_len=min(limits.seq_len, FEW_SPLITS * LEAST_TOKENS))
    yield _step(1, 1, short, device, decodes=True)
    for tokens in (1, FEW_TOKENS + 1):
        if tokens <= limits.tokens:
            yield _step(tokens, tokens, limits, device, decodes=False)
            if not limits.expands_all:
                yield _step(tokens, tokens, limits, device, decodes=False, expands=False)


def _step(
    tokens: int, queries: int, limits: StepLimits, device: torch.device, *, decodes: bool, expands: bool = True
) -> TritonMetadata:
    """Requests of `queries` tokens each, of which the last may have fewer."""
    starts = torch.arange(0, tokens + queries, queries, dtype=torch.int32, device=device).clamp(max=tokens)
    requests = len(starts) - 1
    own = Requests(
        torch.zeros(requests, 1, dtype=torch.int32, device=device),
        torch.full((requests,), queries, dtype=torch.int32, device=device),
        starts,
    )
    return TritonMetadata(
        num_actual_tokens=tokens,
        slots=torch.zeros(tokens, dtype=torch.int64, device=device),
        decodes=own if decodes else None,
        prefills=() if decodes else (Prefills(own, queries, torch.zeros_like(own.block_table) if expands else None),),
        num_decode_tokens=tokens if decodes else 0,
        max_decode_queries=queries if decodes else 1,
        max_seq_len=limits.seq_len,
    )
