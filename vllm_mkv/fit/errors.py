# SPDX-License-Identifier: Apache-2.0
"""What every width does to every block of coordinates, measured on the keys and values of a model that runs.

Tokens are not Gaussian: blocks whose energy is that of few tokens clip far more of it than a Gaussian would, and blocks
that are small beside their token's others are better dropped than given two bits. Nor do errors of values average out
as independent ones would: equal tokens err alike, and a head that looks at many of them adds that up. So errors are
measured: of keys as they are stored, of values after attention.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mkv_kernels.codes import round_trip
from mkv_kernels.layout import BLOCK, WIDTHS
from vllm_mkv.fit.attention import Scores, layer_index, scores_of
from vllm_mkv.fit.truncation import Truncation


class BlockErrors:
    """Handler of `intercepted` that lets a truncation replace keys and values, and collects errors of their blocks.

    A token's scale is taken over all of its coordinates, whatever widths the truncation gives them.

    Args:
        truncation: one that stores every coordinate.
    """

    def __init__(self, truncation: Truncation) -> None:
        self.truncation = truncation
        self.products: dict[int, Tensor] = {}
        """Per layer, [2, widths below 16, G, blocks, 16, 16] float64: sums of e e^T over tokens."""
        self.counts: dict[int, int] = {}

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        layer = layer_index(module)
        truncated = self.truncation(module, query, key, value)
        keys, values = self.truncation.layers[layer]
        products = torch.stack(
            [
                _products(_errors(keys.coordinates(key))),
                _attended_products(_errors(values.coordinates(value)), query, key, scores_of(module)),
            ]
        )
        self.products[layer] = self.products.get(layer, 0) + products
        self.counts[layer] = self.counts.get(layer, 0) + key.shape[0] * key.shape[2]
        return truncated

    def means(self, metrics: dict[int, Tensor]) -> np.ndarray:
        """float64 [layers, G, 2, blocks, widths]: expected squared error in scores or outputs, for each of `WIDTHS`.

        Args:
            metrics: of every layer, see `bases.block_metrics`.
        """
        means = []
        for layer, metric in metrics.items():
            products = self.products[layer] / self.counts[layer]
            errors = torch.einsum("swgbij,gsbij->gsbw", products, metric.to(products))
            means.append(torch.cat([torch.zeros_like(errors[..., :1]), errors], dim=-1))
        return torch.stack(means).cpu().numpy()


def _errors(x: Tensor) -> Tensor:
    """[B, G, S, n] to [widths below 16, B, G, S, n]"""
    num_blocks = x.shape[-1] // BLOCK
    return torch.stack([x - round_trip(x, (width,) * num_blocks) for width in WIDTHS[1:]])


def _products(errors: Tensor) -> Tensor:
    """Sums over tokens, [W, B, G, S, n] to [W, G, blocks, 16, 16] float64."""
    e = errors.unflatten(-1, (-1, BLOCK))
    return torch.einsum("wbgsni,wbgsnj->wgnij", e, e).double()


def _attended_products(errors: Tensor, query: Tensor, key: Tensor, scores: Scores) -> Tensor:
    """As `_products`, of what the layer's attention makes of the errors; the mean over a group's query heads."""
    num_heads, num_tokens = query.shape[1:3]
    num_groups = errors.shape[2]
    repeats = num_heads // key.shape[1]
    sees = scores.sees(num_tokens, num_tokens, query.device)
    sums = []
    for group, heads in enumerate(torch.arange(num_heads).view(num_groups, -1).tolist()):
        of_heads = []
        for head in heads:
            attention = scores.weights(query[:, head], key[:, head // repeats], sees).to(errors.dtype)
            of_heads.append(_products((attention @ errors[:, :, group])[:, :, None]))
        sums.append(torch.stack(of_heads).mean(0))
    return torch.cat(sums, dim=1)
