# SPDX-License-Identifier: Apache-2.0
"""Attention at full rank by others: same heads, requests and lengths, each from a cache of its own kind."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from benchmarks import vllm_peers
from benchmarks.layer import Requests, Setting, Shape

CHUNK = 1 << 16
"""Tokens whose keys and values are made, and stored, at once."""
CHECKED_QUERIES = 16
EXACT_ERROR, CODED_ERROR = 0.02, 1.0
"""Mean error beyond which a peer was called wrongly, against the mean of the result. Keys and values are random, so
what a quantised cache errs by says nothing of its quality."""

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass
class Problem:
    """Random queries, keys and values at full rank; of the first request, what comes out."""

    setting: Setting
    shape: Shape
    requests: Requests
    query: torch.Tensor
    """[T, H, d]"""
    first: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def make(cls, setting: Setting, shape: Shape) -> Problem:
        size = (shape.num_tokens, setting.geometry.query_heads, setting.geometry.head_size)
        query = torch.empty(size, dtype=setting.dtype, device=setting.device).normal_(generator=setting.generator())
        return cls(setting, shape, Requests.make(shape, setting), query)

    @property
    def num_blocks(self) -> int:
        return self.shape.num_blocks(self.setting.block_size)

    @property
    def output(self) -> torch.Tensor:
        return torch.full_like(self.query, float("nan"))

    def fill(self, write: Write) -> None:
        """Calls `write(keys, values, slots)` until all tokens of all requests are stored; the same ones every time."""
        setting, context = self.setting, self.shape.context
        generator, geometry, block_size = setting.generator(), setting.geometry, setting.block_size
        table, keep = self.requests.block_table.long(), not self.first
        for start in range(0, self.shape.batch * context, CHUNK):
            token = torch.arange(start, min(start + CHUNK, self.shape.batch * context), device=setting.device)
            request, place = token // context, token % context
            slots = table[request, place // block_size] * block_size + place % block_size
            size = (2, len(token), geometry.kv_heads, geometry.head_size)
            kv = torch.empty(size, dtype=setting.dtype, device=setting.device).normal_(generator=generator)
            if keep and start < context:
                self.first.append((kv[0, : context - start].clone(), kv[1, : context - start].clone()))
            write(kv[0], kv[1], slots)

    def relative_error(self, output: torch.Tensor) -> float:
        """Mean over the first request's last queries, divided by the mean of the result in float32."""
        count, geometry = min(CHECKED_QUERIES, self.shape.queries), self.setting.geometry
        own = slice(self.shape.queries - count, self.shape.queries)
        k, v = (torch.cat(parts).float().transpose(0, 1) for parts in zip(*self.first, strict=True))
        q = self.query[own].float().view(count, geometry.kv_heads, -1, geometry.head_size)
        s = torch.einsum("qgmd,gld->gmql", q, k) * self.setting.scale
        future = torch.ones(s.shape[2:], dtype=torch.bool, device=s.device).triu(self.shape.context - count + 1)
        p = s.masked_fill_(future, -torch.inf).softmax(-1)
        exact = torch.einsum("gmql,gld->qgmd", p, v).reshape(count, geometry.query_heads, -1)
        return float((output[own].float() - exact).abs().mean() / exact.abs().mean())


@dataclass(frozen=True)
class Prepared:
    """`run` returns the output, [T, H, d]; `token_bytes` of a cached token in that cache."""

    run: Callable[[], torch.Tensor]
    token_bytes: int


@dataclass(frozen=True)
class Peer:
    name: str
    prepare: Callable[[Problem], Prepared]
    exact: bool = True
    decode_only: bool = False
    on_cpu: bool = False

    @property
    def largest_error(self) -> float:
        return EXACT_ERROR if self.exact else CODED_ERROR


def sdpa(problem: Problem) -> Prepared:
    """torch's fused attention over dense keys and values, without pages."""
    from torch.nn.attention.bias import causal_lower_right

    setting, shape, geometry = problem.setting, problem.shape, problem.setting.geometry
    size = (2, shape.batch, geometry.kv_heads, shape.context, geometry.head_size)
    dense = torch.empty(size, dtype=setting.dtype, device=setting.device)
    written = 0

    def write(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        nonlocal written
        token = torch.arange(written, written + len(keys), device=setting.device)
        for side, x in zip(dense, (keys, values), strict=True):
            side[token // shape.context, :, token % shape.context] = x
        written += len(keys)

    problem.fill(write)
    k, v = dense
    q = problem.query.unflatten(0, (shape.batch, shape.queries)).transpose(1, 2)
    mask = None if shape.queries == 1 else causal_lower_right(shape.queries, shape.context)

    def run() -> torch.Tensor:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=setting.scale, enable_gqa=True)
        return o.transpose(1, 2).flatten(0, 1)

    return Prepared(run, geometry.full_bytes(setting.dtype.itemsize))


def flashinfer(problem: Problem) -> Prepared:
    module = importlib.import_module("flashinfer")
    setting, shape, geometry = problem.setting, problem.shape, problem.setting.geometry
    size = (2, problem.num_blocks, setting.block_size, geometry.kv_heads, geometry.head_size)
    cache = torch.empty(size, dtype=setting.dtype, device=setting.device)

    def write(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        for side, x in zip(cache, (keys, values), strict=True):
            side.flatten(0, 1)[slots] = x

    problem.fill(write)
    blocks = problem.num_blocks // shape.batch
    indptr = torch.arange(0, problem.num_blocks + 1, blocks, dtype=torch.int32)
    last = torch.full((shape.batch,), (shape.context - 1) % setting.block_size + 1, dtype=torch.int32)
    pages = problem.requests.block_table.flatten()
    heads = (geometry.query_heads, geometry.kv_heads, geometry.head_size, setting.block_size)
    types = {"q_data_type": setting.dtype, "kv_data_type": setting.dtype, "sm_scale": setting.scale}
    workspace = torch.zeros(512 << 20, dtype=torch.uint8, device=setting.device)
    if shape.queries == 1:
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(indptr, pages, last, *heads, **types)
    else:
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(problem.requests.query_start_loc.cpu(), indptr, pages, last, *heads, causal=True, **types)
    output = problem.output
    return Prepared(
        lambda: wrapper.run(problem.query, (cache[0], cache[1]), out=output),
        geometry.full_bytes(setting.dtype.itemsize),
    )


def _of_vllm(prepare: Callable[..., tuple[Callable[[], torch.Tensor], int]], **kwargs: str) -> Callable[..., Prepared]:
    return lambda problem: Prepared(*prepare(problem, **kwargs))


PEERS = (
    Peer("sdpa", sdpa, on_cpu=True),
    Peer("fa3", _of_vllm(vllm_peers.flash_attention_3)),
    Peer("triton", _of_vllm(vllm_peers.unified)),
    Peer("flashinfer", flashinfer),
    Peer("int8", _of_vllm(vllm_peers.per_token_head, cache_dtype="int8_per_token_head"), exact=False),
    Peer("int4", _of_vllm(vllm_peers.per_token_head, cache_dtype="int4_per_token_head"), exact=False),
    *(
        Peer(
            short,
            _of_vllm(vllm_peers.turboquant, cache_dtype=cache_dtype),
            exact=False,
            decode_only=True,
        )
        for short, cache_dtype in (
            ("tq-k8v4", "turboquant_k8v4"),
            ("tq-4bit", "turboquant_4bit_nc"),
            ("tq-3bit", "turboquant_3bit_nc"),
        )
    ),
)
