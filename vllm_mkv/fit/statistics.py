# SPDX-License-Identifier: Apache-2.0
"""Streaming moments of queries, keys and values after RoPE, in float64: memory depends on the model, not on the tokens.

bf16 and float32 sums cancel where a few coordinates are large; float64 ones do not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_mkv.fit.attention import layer_index, scores_of
from vllm_mkv.fit.truncation import by_group


class Moments:
    """Mean and second moment of vectors, `[G, n]` and `[G, n, n]`."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    def add(self, vectors: Tensor) -> None:
        """Counts `vectors` [B, G, N, n] in: B times N of them for each G."""
        x = vectors.to(torch.float64).transpose(0, 1).flatten(1, 2)
        self.count += x.shape[1]
        self.sum += x.sum(1)
        self.products += x.transpose(1, 2) @ x

    @property
    def mean(self) -> Tensor:
        """E[x], [G, n]"""
        return torch.as_tensor(self.sum) / self.count

    @property
    def second(self) -> Tensor:
        """E[x x^T], [G, n, n]"""
        return torch.as_tensor(self.products) / self.count

    @property
    def covariance(self) -> Tensor:
        """E[(x - E x)(x - E x)^T], [G, n, n]"""
        return self.second - self.mean[:, :, None] * self.mean[:, None, :]


class LayerStatistics:
    """Moments of one layer: of queries per KV head, of keys and values per latent group of `group_heads` KV heads.

    Keys of a layer that caps its scores are not `centred`: their mean would shift the scores that are capped.
    """

    def __init__(self, group_heads: int, *, centred: bool = True) -> None:
        self.group_heads, self.centred = group_heads, centred
        self.queries_per_head = 1
        self.query, self.key, self.value = Moments(), Moments(), Moments()

    def add(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Counts q [B, H, T, d], k [B, Hkv, T, d] and v [B, Hkv, T, d] in."""
        B, H, T, d = query.shape
        heads = key.shape[1]
        self.queries_per_head = H // heads
        self.query.add(query.reshape(B, heads, self.queries_per_head * T, d))
        self.key.add(by_group(key, self.group_heads))
        self.value.add(by_group(value, self.group_heads))

    @property
    def query_second(self) -> Tensor:
        """E[q q^T] summed over the query heads of a KV head, [Hkv, d, d]; uncentred."""
        return self.query.second * self.queries_per_head

    @property
    def key_mean(self) -> Tensor:
        """What keys are stored less, [G, n]"""
        return self.key.mean if self.centred else torch.zeros_like(self.key.mean)

    @property
    def key_covariance(self) -> Tensor:
        """Second moment of keys less `key_mean`, [G, n, n]"""
        return self.key.covariance if self.centred else self.key.second

    def check(self, layer: int) -> None:
        """Raises ValueError where a moment overflowed or is not a number."""
        if not all(torch.isfinite(moments.second).all() for moments in (self.query, self.key, self.value)):
            raise ValueError(
                f"queries, keys or values of layer {layer} are not finite; calibrate in another dtype: --dtype float32"
            )


class Statistics(dict[int, LayerStatistics]):
    """Handler of `intercepted` that collects the moments of every layer and changes nothing."""

    def __init__(self, group_heads: int) -> None:
        super().__init__()
        self.group_heads = group_heads

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        layer = layer_index(module)
        if layer not in self:
            self[layer] = LayerStatistics(self.group_heads, centred=scores_of(module).soft_cap is None)
        self[layer].add(query, key, value)
        return key, value
