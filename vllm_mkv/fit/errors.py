# SPDX-License-Identifier: Apache-2.0
"""What every width does to every block of coordinates, measured on the keys and values of a model that runs.

Tokens are not Gaussian: blocks whose energy is that of few tokens clip far more of it than a Gaussian would, and blocks
that are small beside their token's others are better dropped than given two bits. So errors are measured.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mkv_kernels.codes import round_trip
from mkv_kernels.layout import BLOCK, WIDTHS
from vllm_mkv.fit.attention import layer_index
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
        sides = zip((key, value), self.truncation.layers[layer], strict=True)
        products = torch.stack([_products(side.coordinates(heads)) for heads, side in sides])
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


def _products(x: Tensor) -> Tensor:
    """[B, G, S, n] to [widths below 16, G, blocks, 16, 16] float64."""
    num_blocks = x.shape[-1] // BLOCK
    products = []
    for width in WIDTHS[1:]:
        error = (x - round_trip(x, (width,) * num_blocks)).unflatten(-1, (num_blocks, BLOCK))
        products.append(torch.einsum("bgsni,bgsnj->gnij", error, error).double())
    return torch.stack(products)
