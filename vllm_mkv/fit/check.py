# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter fits a model, and whether full rank is exact, without an engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from vllm_mkv.adapter import Adapter
from vllm_mkv.allocation import AllocationPath
from vllm_mkv.fit.truncation import truncated

TOLERANCE = 1e-3
"""Largest difference of logits, as a share of the largest logit (or of 1), that float32 rounding explains."""


def inverse_error(adapter: Adapter) -> float:
    """Largest entry of `A B^T - I` and `C D - I` over all layers, multiplied in float64."""
    products = (
        down.astype(np.float64) @ up
        for bases in adapter.bases
        for down, up in ((bases.A, bases.B.swapaxes(-1, -2)), (bases.C, bases.D))
    )
    return max(float(np.abs(product - np.eye(product.shape[-1])).max()) for product in products)


@dataclass(frozen=True)
class Exactness:
    """Full rank against the model's own attention on the same tokens."""

    logit_difference: float
    logit_scale: float
    """Of the largest logit, or 1."""
    agreement: float
    """Share of positions where both find the same token most likely."""

    @property
    def exact(self) -> bool:
        return self.logit_difference <= TOLERANCE * self.logit_scale


@torch.inference_mode()
def full_rank_exactness(model: PreTrainedModel, adapter: Adapter, *, tokens: int, seed: int = 0) -> Exactness:
    """Compares logits at full rank with the model's own on `tokens` random tokens.

    Raises:
        NotImplementedError: the model's attention is of a kind that is not supported.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (1, tokens), generator=generator).to(model.device)
    full = AllocationPath(adapter.shape, np.empty((0, 5), np.int32)).replay(1.0)
    stock = model(input_ids=ids, use_cache=False).logits.float()
    with truncated(model, adapter, full):
        mkv = model(input_ids=ids, use_cache=False).logits.float()
    return Exactness(
        logit_difference=float((mkv - stock).abs().max()),
        logit_scale=max(1.0, float(stock.abs().max())),
        agreement=float((mkv.argmax(-1) == stock.argmax(-1)).float().mean()),
    )
