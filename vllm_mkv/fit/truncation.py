# SPDX-License-Identifier: Apache-2.0
"""The reference of what the engine computes: attention on keys and values that went through the cache's coordinates.

    k^ = quantised((k - key_mean) A) B^T + key_mean
    v^ = quantised((v - value_mean) C) D + value_mean

where `quantised` gives every block of 16 coordinates the width that it has in the allocation (`codes.round_trip`).
The engine never rebuilds k^ or v^, but its scores and outputs are these: the keys' mean shifts all scores of a query
alike, which softmax ignores, and a dropped value coordinate is its mean.

Shapes: B batch, G latent groups, J heads per group, S tokens, d head size, n = J d, r largest rank of the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mkv_kernels.codes import round_trip
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


Quantiser = Callable[[Tensor, BlockWidths], Tensor]
"""Coordinates [.., n] and their widths to the coordinates that the cache gives back."""


@dataclass(frozen=True)
class Projection:
    """One side of one layer: down to the coordinates, through their widths, and up again."""

    down: Tensor
    """[G, n, r]"""
    up: Tensor
    """[G, r, n]"""
    mean: Tensor
    """[G, 1, n]"""
    runs: tuple[tuple[list[int], BlockWidths], ...]
    """Groups of equal widths, and these, cut to the r coordinates that any group stores."""
    group_heads: int
    quantiser: Quantiser

    @classmethod
    def of(
        cls,
        down: np.ndarray,
        up: np.ndarray,
        mean: np.ndarray,
        widths: list[BlockWidths],
        group_heads: int,
        quantiser: Quantiser,
    ) -> Projection:
        """From `down` [G, n, n], `up` [G, n, n], `mean` [G, n] and the block widths of every group."""
        blocks = max(sum(width > 0 for width in side) for side in widths)
        by_widths: dict[BlockWidths, list[int]] = {}
        for group, side in enumerate(widths):
            by_widths.setdefault(side[:blocks], []).append(group)
        down_r, up_r = torch.from_numpy(down[:, :, : blocks * BLOCK]), torch.from_numpy(up[:, : blocks * BLOCK])
        runs = tuple((groups, side) for side, groups in by_widths.items())
        return cls(down_r, up_r, torch.from_numpy(mean)[:, None], runs, group_heads, quantiser)

    def like(self, heads: Tensor) -> Projection:
        """On the device of `heads`, in its dtype or in float32, whichever is wider."""
        dtype = torch.promote_types(heads.dtype, torch.float32)
        if self.down.device == heads.device and self.down.dtype == dtype:
            return self
        down, up, mean = (tensor.to(heads.device, dtype) for tensor in (self.down, self.up, self.mean))
        return replace(self, down=down, up=up, mean=mean)

    def coordinates(self, heads: Tensor) -> Tensor:
        """[B, Hkv, S, d] -> [B, G, S, r], not quantised"""
        return (by_group(heads.to(self.down.dtype), self.group_heads) - self.mean) @ self.down

    def __call__(self, heads: Tensor) -> Tensor:
        """[B, Hkv, S, d] -> [B, Hkv, S, d]"""
        x = self.coordinates(heads)
        quantised = torch.empty_like(x)
        for groups, widths in self.runs:
            quantised[:, groups] = self.quantiser(x[:, groups], widths)
        return by_head(quantised @ self.up + self.mean, self.group_heads).to(heads.dtype)


class Truncation:
    """Handler of `intercepted`: keys and values of every layer as the cache of an adapter at an allocation holds them.

    Raises:
        ValueError: the allocation is not for this adapter.
    """

    def __init__(self, adapter: Adapter, allocation: Allocation, quantiser: Quantiser = round_trip) -> None:
        if allocation.shape != adapter.shape:
            raise ValueError(f"the allocation is for {allocation.shape}, and the adapter has {adapter.shape}")
        model, heads = adapter.config.model, adapter.config.group_heads
        self.head_size, self.num_heads = model.head_size, adapter.shape.num_groups * heads
        self.layers: dict[int, tuple[Projection, Projection]] = {}
        for layer, bases, widths in zip(adapter.config.layers, adapter.bases, allocation.widths, strict=True):
            keys, values = ([group[side] for group in widths] for side in (KEY, VALUE))
            self.layers[layer] = (
                Projection.of(bases.A, bases.B.swapaxes(-1, -2), bases.key_mean, keys, heads, quantiser),
                Projection.of(bases.C, bases.D, bases.value_mean, values, heads, quantiser),
            )

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        layer = layer_index(module)
        if layer not in self.layers:
            raise ValueError(f"the adapter has no bases for layer {layer}, so it was made for another model")
        if key.shape[-1] != self.head_size or key.shape[1] != self.num_heads:
            raise ValueError(
                f"the adapter is for {self.num_heads} KV heads of {self.head_size}, and layer {layer} has "
                f"{key.shape[1]} of {key.shape[-1]}; make an adapter for this model with `vllm-mkv calibrate`"
            )
        keys, values = self.layers[layer]
        self.layers[layer] = keys, values = keys.like(key), values.like(value)
        return keys(key), values(value)


def truncated(model: PreTrainedModel, adapter: Adapter, allocation: Allocation) -> AbstractContextManager[None]:
    """Inside it, `model` attends on what the cache of `adapter` at `allocation` holds.

        with truncated(model, adapter, adapter.path.replay(0.5)):
            logits = model(input_ids).logits

    Raises:
        ValueError: the allocation is not for this adapter, or the adapter not for this model (from the forward pass).
        NotImplementedError: names what of the model's attention is not supported.
    """
    return intercepted(model, Truncation(adapter, allocation))
