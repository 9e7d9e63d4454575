# SPDX-License-Identifier: Apache-2.0
"""The reference of what the engine computes: attention on keys and values that went through a truncated basis.

    k^ = (k - key_mean) A[:, :rank] B[:, :rank]^T + key_mean
    v^ = (v - value_mean) C[:, :rank] D[:rank] + value_mean

The engine never rebuilds k^ or v^, but its scores and outputs are these: the keys' mean shifts all scores of a query
alike, which softmax ignores, and a dropped value coordinate is its mean.

Shapes: B batch, G latent groups, J heads per group, S tokens, d head size, n = J d, r largest rank of the layer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mkv_kernels.layout import BLOCK, KEY, VALUE, BlockWidths
from vllm_mkv.adapter import Adapter
from vllm_mkv.allocation import Allocation
from vllm_mkv.fit.attention import intercepted, layer_index


def by_group(heads: Tensor, group_heads: int) -> Tensor:
    """[B, Hkv, S, d] -> [B, G, S, n]: consecutive heads side by side."""
    B, H, S, d = heads.shape
    return heads.reshape(B, H // group_heads, group_heads, S, d).transpose(2, 3).reshape(B, -1, S, group_heads * d)


def by_head(groups: Tensor, group_heads: int) -> Tensor:
    """[B, G, S, n] -> [B, Hkv, S, d]: the inverse of `by_group`."""
    B, G, S, n = groups.shape
    return groups.reshape(B, G, S, group_heads, n // group_heads).transpose(2, 3).reshape(B, G * group_heads, S, -1)


@dataclass(frozen=True)
class Projection:
    """One side of one layer, down to the ranks and up again; `down` is 0 in the columns beyond a group's own rank."""

    down: Tensor
    """[G, n, r]"""
    up: Tensor
    """[G, r, n]"""
    mean: Tensor
    """[G, 1, n]"""
    group_heads: int

    @classmethod
    def of(
        cls, down: np.ndarray, up: np.ndarray, mean: np.ndarray, widths: list[BlockWidths], group_heads: int
    ) -> Projection:
        """From `down` [G, n, n], `up` [G, n, n], `mean` [G, n] and the block widths of every group."""
        kept = torch.from_numpy(np.repeat(np.array(widths) > 0, BLOCK, axis=1))
        rank = int(kept.sum(1).max())
        full = torch.from_numpy(down) * kept[:, None, :]
        return cls(full[:, :, :rank], torch.from_numpy(up)[:, :rank], torch.from_numpy(mean)[:, None], group_heads)

    def like(self, heads: Tensor) -> Projection:
        """On the device of `heads`, in its dtype or in float32, whichever is wider."""
        dtype = torch.promote_types(heads.dtype, torch.float32)
        if self.down.device == heads.device and self.down.dtype == dtype:
            return self
        down, up, mean = (tensor.to(heads.device, dtype) for tensor in (self.down, self.up, self.mean))
        return Projection(down, up, mean, self.group_heads)

    def __call__(self, heads: Tensor) -> Tensor:
        """[B, Hkv, S, d] -> [B, Hkv, S, d]"""
        x = by_group(heads.to(self.down.dtype), self.group_heads) - self.mean
        return by_head(x @ self.down @ self.up + self.mean, self.group_heads).to(heads.dtype)


class Truncation:
    """Handler of `intercepted`: keys and values of every layer as the cache of an adapter at an allocation holds them.

    Raises:
        ValueError: the allocation is not for this adapter.
        NotImplementedError: the allocation has coordinates of a width other than 16 and 0.
    """

    def __init__(self, adapter: Adapter, allocation: Allocation) -> None:
        if allocation.shape != adapter.shape:
            raise ValueError(f"the allocation is for {allocation.shape}, and the adapter has {adapter.shape}")
        self.head_size = adapter.config.model.head_size
        heads = adapter.config.group_heads
        self.layers: dict[int, tuple[Projection, Projection]] = {}
        for layer, bases, widths in zip(adapter.config.layers, adapter.bases, allocation.widths, strict=True):
            for width in {width for group in widths for side in group for width in side} - {16, 0}:
                raise NotImplementedError(
                    f"coordinates of {width} bits are not computed by this version; use an allocation of 16 and 0 bits"
                )
            keys, values = ([group[side] for group in widths] for side in (KEY, VALUE))
            self.layers[layer] = (
                Projection.of(bases.A, bases.B.swapaxes(-1, -2), bases.key_mean, keys, heads),
                Projection.of(bases.C, bases.D, bases.value_mean, values, heads),
            )

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        layer = layer_index(module)
        if layer not in self.layers:
            raise ValueError(f"the adapter has no bases for layer {layer}, so it was made for another model")
        keys, values = self.layers[layer]
        G, n = keys.down.shape[:2]
        if key.shape[-1] != self.head_size or key.shape[1] * key.shape[-1] != G * n:
            raise ValueError(
                f"the adapter is for {G * n // self.head_size} KV heads of {self.head_size}, and layer {layer} has "
                f"{key.shape[1]} of {key.shape[-1]}; make an adapter for this model with `vllm-mkv calibrate`"
            )
        self.layers[layer] = keys, values = keys.like(key), values.like(value)
        return keys(key), values(value)


def truncated(model: PreTrainedModel, adapter: Adapter, allocation: Allocation) -> AbstractContextManager[None]:
    """Inside it, `model` attends on what the cache of `adapter` at `allocation` holds.

        with truncated(model, adapter, adapter.path.replay(0.5)):
            logits = model(input_ids).logits

    Raises:
        ValueError: the allocation is not for this adapter, or the adapter not for this model (from the forward pass).
        NotImplementedError: names what of the allocation or of the model's attention is not supported.
    """
    return intercepted(model, Truncation(adapter, allocation))
