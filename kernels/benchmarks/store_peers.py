# SPDX-License-Identifier: Apache-2.0
"""Writing keys and values into caches of other kinds. None of them projects anything, which the store kernel does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import vllm_peers
from benchmarks.layer import Setting


@dataclass(frozen=True)
class Writer:
    """`write(keys, values, slots)`; `token_bytes` of a token in that cache."""

    write: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    token_bytes: int


@dataclass(frozen=True)
class StorePeer:
    name: str
    prepare: Callable[[Setting, int], Writer]
    """From the setting and the number of blocks."""
    on_cpu: bool = False


def index_put(setting: Setting, num_blocks: int) -> Writer:
    """torch, to a cache of the model's dtype."""
    geometry = setting.geometry
    size = (2, num_blocks * setting.block_size, geometry.kv_heads, geometry.head_size)
    cache = torch.empty(size, dtype=setting.dtype, device=setting.device)

    def write(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        cache[0][slots], cache[1][slots] = keys, values

    return Writer(write, geometry.full_bytes(setting.dtype.itemsize))


def triton(setting: Setting, num_blocks: int) -> Writer:
    _, write = vllm_peers.exact_writer(setting, num_blocks)
    return Writer(write, setting.geometry.full_bytes(setting.dtype.itemsize))


def _coded(cache_dtype: str) -> Callable[[Setting, int], Writer]:
    def prepare(setting: Setting, num_blocks: int) -> Writer:
        _, write, token_bytes = vllm_peers.coded_writer(setting, num_blocks, cache_dtype)
        return Writer(write, token_bytes)

    return prepare


def _turboquant(cache_dtype: str) -> Callable[[Setting, int], Writer]:
    def prepare(setting: Setting, num_blocks: int) -> Writer:
        _, write, token_bytes = vllm_peers.turboquant_writer(setting, num_blocks, cache_dtype)
        return Writer(write, token_bytes)

    return prepare


PEERS = (
    StorePeer("index_put", index_put, on_cpu=True),
    StorePeer("triton", triton),
    StorePeer("int8", _coded("int8_per_token_head")),
    StorePeer("int4", _coded("int4_per_token_head")),
    StorePeer("tq-k8v4", _turboquant("turboquant_k8v4")),
    StorePeer("tq-4bit", _turboquant("turboquant_4bit_nc")),
    StorePeer("tq-3bit", _turboquant("turboquant_3bit_nc")),
)
