# SPDX-License-Identifier: Apache-2.0
"""The reference of what the engine computes: attention on keys and values that went through the cache's coordinates.

    k^ = quantised((k - key_mean) A) B^T + key_mean
    v^ = quantised((v - value_mean) C) D + value_mean

where `quantised` gives every block of 16 coordinates the width that it has in the allocation (`codes.round_trip`).
The engine never rebuilds k^ or v^, but its scores and outputs are these: the keys' mean shifts all scores of a query
alike, which softmax ignores (where scores are capped it is 0), and a dropped value coordinate is its mean.

Shapes: B batch, G latent groups, J heads per group, S tokens, d head size, n = J d, r largest rank of the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mkv_kernels.codes import round_trip
from mkv_kernels.layout import BLOCK, KEY, VALUE, BlockWidths
from vllm_mkv.adapter import Adapter, LayerBases
from vllm_mkv.allocation import Allocation
from vllm_mkv.fit.attention import intercepted, layer_index, scores_of


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


_tensors: WeakKeyDictionary[LayerBases, dict[tuple[str, torch.device, torch.dtype], Tensor]] = WeakKeyDictionary()
"""Bases as tensors, so that all truncations of an adapter share one copy per device."""


def _tensor(bases: LayerBases, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    made = _tensors.setdefault(bases, {})
    key = (name, device, dtype)
    if key not in made:
        made[key] = torch.from_numpy(getattr(bases, name)).to(device, dtype)
    return made[key]


@dataclass(frozen=True)
class Projection:
    """One side of one layer: down to the coordinates, through their widths, and up again."""

    bases: LayerBases
    side: int
    rank: int
    """r, the most coordinates that any group stores."""
    runs: tuple[tuple[list[int], BlockWidths], ...]
    """Groups of equal widths, and these, cut to the r coordinates."""
    group_heads: int
    quantiser: Quantiser

    @classmethod
    def of(
        cls, bases: LayerBases, side: int, widths: list[BlockWidths], group_heads: int, quantiser: Quantiser
    ) -> Projection:
        """From the block widths of every group."""
        blocks = max(sum(width > 0 for width in of_group) for of_group in widths)
        by_widths: dict[BlockWidths, list[int]] = {}
        for group, of_group in enumerate(widths):
            by_widths.setdefault(of_group[:blocks], []).append(group)
        runs = tuple((groups, of_run) for of_run, groups in by_widths.items())
        return cls(bases, side, blocks * BLOCK, runs, group_heads, quantiser)

    def _on(self, heads: Tensor, name: str) -> Tensor:
        """On the device of `heads`, in its dtype or in float32, whichever is wider."""
        return _tensor(self.bases, name, heads.device, torch.promote_types(heads.dtype, torch.float32))

    def mean(self, heads: Tensor) -> Tensor:
        """[G, 1, n]"""
        return self._on(heads, "key_mean" if self.side == KEY else "value_mean")[:, None]

    def down(self, heads: Tensor) -> Tensor:
        """[G, n, r]"""
        return self._on(heads, "A" if self.side == KEY else "C")[:, :, : self.rank]

    def up(self, heads: Tensor) -> Tensor:
        """[G, r, n]"""
        return (self._on(heads, "B").mT if self.side == KEY else self._on(heads, "D"))[:, : self.rank]

    def coordinates(self, heads: Tensor) -> Tensor:
        """[B, Hkv, S, d] -> [B, G, S, r], not quantised"""
        down, mean = self.down(heads), self.mean(heads)
        return (by_group(heads.to(down.dtype), self.group_heads) - mean) @ down

    def __call__(self, heads: Tensor) -> Tensor:
        """[B, Hkv, S, d] -> [B, Hkv, S, d]"""
        x = self.coordinates(heads)
        quantised = torch.empty_like(x)
        for groups, widths in self.runs:
            quantised[:, groups] = self.quantiser(x[:, groups], widths)
        return by_head(quantised @ self.up(heads) + self.mean(heads), self.group_heads).to(heads.dtype)


class Truncation:
    """Handler of `intercepted`: keys and values of every layer as the cache of an adapter at an allocation holds them.

    Raises:
        ValueError: the allocation is not for this adapter; from a forward pass, the adapter is not for this model.
    """

    def __init__(self, adapter: Adapter, allocation: Allocation, quantiser: Quantiser = round_trip) -> None:
        if allocation.shape != adapter.shape:
            raise ValueError(f"the allocation is for {allocation.shape}, and the adapter has {adapter.shape}")
        model, heads = adapter.config.model, adapter.config.group_heads
        self.head_size, self.num_heads = model.head_size, adapter.shape.num_groups * heads
        self.adapter = adapter
        self.layers: dict[int, tuple[Projection, Projection]] = {}
        for layer, bases, widths in zip(adapter.config.layers, adapter.bases, allocation.widths, strict=True):
            keys, values = ([group[side] for group in widths] for side in (KEY, VALUE))
            self.layers[layer] = (
                Projection.of(bases, KEY, keys, heads, quantiser),
                Projection.of(bases, VALUE, values, heads, quantiser),
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
        if scores_of(module).soft_cap is not None:
            self.adapter.check_soft_cap()
        keys, values = self.layers[layer]
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
