# SPDX-License-Identifier: Apache-2.0
"""Bases that can be trained: an adapter's own, turned, and a cache of any widths that gradients go through.

A pair with A B^T = I stays one when A gets a matrix on its right and B that matrix's inverse, transposed. `orthogonal`
matrices R = (I - S/2)^-1 (I + S/2) with S = X - X^T (Cayley) keep covariances too, so that whitened coordinates stay
whitened; `free` ones are I + X. Both start at X = 0 with the adapter's own bases, and in float32, as MatryoshkaKV
(arXiv 2410.14731) does from its PCA.

Shapes: L layers, G latent groups, n coordinates of a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from mkv_kernels.codes import STEPS, scale_codes, scale_values
from mkv_kernels.layout import BLOCK, KEY, VALUE
from vllm_mkv.adapter import Adapter, LayerBases
from vllm_mkv.allocation import Allocation
from vllm_mkv.fit.attention import Handler, layer_index
from vllm_mkv.fit.truncation import by_group, by_head

FORMS = ("orthogonal", "free")


def cayley(x: Tensor) -> Tensor:
    """Orthogonal matrices [.., n, n] from any; the identity from zeros."""
    half, identity = (x - x.mT) / 2, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(identity - half, identity + half)


def turned(down: Tensor, up: Tensor, x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """The pair down, up [G, n, n] after the turn that x [G, n, n] stands for."""
    if form == "free":
        turn = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) + x
        return down @ turn, torch.linalg.solve(turn, up)
    turn = cayley(x)
    return down @ turn, turn.mT @ up


class Side(nn.Module):
    """Keys or values of one layer."""

    down: Tensor
    up: Tensor
    mean: Tensor

    def __init__(self, down: np.ndarray, up: np.ndarray, mean: np.ndarray, group_heads: int, form: str) -> None:
        """Shapes: down and up [G, n, n] with down up = I; mean [G, n]."""
        super().__init__()
        self.group_heads, self.form = group_heads, form
        self.x = nn.Parameter(torch.zeros(down.shape))
        for name, array in (("down", down), ("up", up), ("mean", mean[:, None])):
            self.register_buffer(name, torch.tensor(array), persistent=False)

    def forward(self, heads: Tensor, widths: Tensor) -> Tensor:
        """Keys or values [B, Hkv, S, d] as a cache of `widths` [G, n] gives them back."""
        down, up = turned(self.down, self.up, self.x, self.form)
        x = (by_group(heads.float(), self.group_heads) - self.mean) @ down
        return by_head(straight_through(x, widths[:, None]) @ up + self.mean, self.group_heads).to(heads.dtype)


def straight_through(x: Tensor, widths: Tensor) -> Tensor:
    """`codes.round_trip` for widths that differ between groups; gradients pass as if nothing had been rounded.

    Args:
        x: coordinates, [B, G, S, n].
        widths: bits of every coordinate, [G, 1, n] int, blocks alike; 0 gives 0, and no gradient.
    """
    with torch.no_grad():
        coded = (widths > 0) & (widths < 16)
        # The mean over coded coordinates alone, as `scale_codes` takes it.
        share = (x.shape[-1] / coded.sum(-1, keepdim=True).clamp(min=1)).sqrt()
        scale = scale_values(scale_codes(x * coded * share)).unsqueeze(-1)
        step, half = torch.ones_like(widths, dtype=x.dtype), torch.ones_like(widths, dtype=x.dtype)
        for width, of_width in STEPS.items():
            step = step.masked_fill(widths == width, of_width)
            half = half.masked_fill(widths == width, 1 << (width - 1))
        level = torch.minimum(torch.maximum(torch.floor(x / scale / step), -half), half - 1)
        error = torch.where(coded, (level + 0.5) * step * scale - x, 0.0)
    return (x + error) * (widths > 0)


class Student(nn.Module):
    """An adapter's bases on their way to better ones."""

    def __init__(self, adapter: Adapter, form: str = "orthogonal") -> None:
        """Raises ValueError for a form that is none of `FORMS`."""
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form {form!r} is not one of {', '.join(FORMS)}")
        self.adapter, J = adapter, adapter.config.group_heads
        self.sides = nn.ModuleDict(
            {
                str(layer): nn.ModuleList(
                    [
                        Side(bases.A, np.ascontiguousarray(bases.B.swapaxes(-1, -2)), bases.key_mean, J, form),
                        Side(bases.C, bases.D, bases.value_mean, J, form),
                    ]
                )
                for layer, bases in zip(adapter.config.layers, adapter.bases, strict=True)
            }
        )

    def of_layer(self, layer: int) -> tuple[Side, Side]:
        """Keys and values."""
        keys, values = cast(Iterable[Side], self.sides[str(layer)])
        return keys, values

    def handler(self, widths: Tensor) -> Handler:
        """For `intercepted`: a cache of these widths.

        Args:
            widths: bits of every coordinate, [L, G, 2, n] int, keys before values.
        """
        places = {layer: place for place, layer in enumerate(self.adapter.config.layers)}

        def handle(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            layer = layer_index(module)
            keys, values = self.of_layer(layer)
            of_layer = widths[places[layer]]
            return keys(key, of_layer[:, KEY]), values(value, of_layer[:, VALUE])

        return handle

    @torch.no_grad()
    def bases(self) -> tuple[LayerBases, ...]:
        """As trained so far, turned in float64."""
        found = []
        for layer, bases in zip(self.adapter.config.layers, self.adapter.bases, strict=True):
            pairs = []
            for side in self.of_layer(layer):
                down, _ = turned(side.down.double(), side.up.double(), side.x.double(), side.form)
                down = down.float()
                # The inverse of what was rounded, so that A B^T = I is off by the rounding of B alone.
                up = torch.linalg.inv(down.double()).float()
                pairs.append((down.cpu().numpy(), up.cpu().numpy()))
            (A, B_transposed), (C, D) = pairs
            found.append(replace(bases, A=A, B=np.ascontiguousarray(B_transposed.swapaxes(-1, -2)), C=C, D=D))
        return tuple(found)


def coordinate_widths(allocation: Allocation) -> Tensor:
    """Bits of every coordinate, [L, G, 2, n] int32."""
    return torch.tensor(allocation.widths, dtype=torch.int32).repeat_interleave(BLOCK, dim=-1)
