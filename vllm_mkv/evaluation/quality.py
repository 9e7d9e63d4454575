# SPDX-License-Identifier: Apache-2.0
"""What a truncated cache does to a model's predictions, measured through transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from vllm_mkv.adapter import Adapter
from vllm_mkv.allocation import Allocation
from vllm_mkv.fit.attention import intercepted
from vllm_mkv.fit.data import batches
from vllm_mkv.fit.truncation import Truncation

LOGITS_PER_BATCH = 1 << 26
"""Logits held at once: 256 MB in float32."""


class Sums:
    """Running sums over predicted tokens of one cache."""

    def __init__(self) -> None:
        self.tokens = 0
        self.loss = self.divergence = self.agreed = 0.0

    def add(self, stock: Tensor, log_p: Tensor, targets: Tensor) -> None:
        """Counts log-probabilities `log_p` [N, V] in, beside `stock` [N, V] of the full model and `targets` [N]."""
        self.tokens += len(targets)
        self.loss += F.nll_loss(log_p, targets, reduction="sum").item()
        self.divergence += F.kl_div(log_p, stock, reduction="sum", log_target=True).item()
        self.agreed += (log_p.argmax(-1) == stock.argmax(-1)).sum().item()

    @property
    def row(self) -> dict[str, float]:
        return {
            "perplexity": math.exp(min(self.loss / self.tokens, 700.0)),
            "kl": max(self.divergence / self.tokens, 0.0),
            "top1": self.agreed / self.tokens,
        }


@torch.inference_mode()
def measure(
    model: PreTrainedModel, windows: np.ndarray, adapter: Adapter, allocations: Sequence[Allocation]
) -> list[dict[str, Any]]:
    """Perplexity, KL divergence from the full model in nats per token, and share of equal most likely tokens.

    Args:
        windows: int64 [windows, context]; every token but a window's first is predicted.
        allocations: of the adapter, one row each.

    Returns:
        The full model's row, {"name": "stock", ..}, and then one row per allocation; `budget` is the one reached.
    """
    itemsize = model.dtype.itemsize
    truncations = [Truncation(adapter, allocation) for allocation in allocations]
    stock_sums, sums = Sums(), [Sums() for _ in allocations]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    size = max(1, LOGITS_PER_BATCH // (windows.shape[1] * vocabulary))
    with tqdm(total=len(windows) * (1 + len(allocations)), unit="window", desc="quality", disable=None) as progress:
        for batch in batches(windows, size):
            ids = torch.from_numpy(batch).to(model.device)
            targets = ids[:, 1:].flatten()
            stock = log_probabilities(model, ids)
            stock_sums.add(stock, stock, targets)
            progress.update(len(batch))
            for truncation, total in zip(truncations, sums, strict=True):
                with intercepted(model, truncation):
                    total.add(stock, log_probabilities(model, ids), targets)
                progress.update(len(batch))
    stock_bytes = adapter.shape.stock_bytes_per_token(itemsize)
    rows: list[dict[str, Any]] = [{"name": "stock", "budget": 1.0, "bytes_per_token": stock_bytes, **stock_sums.row}]
    for allocation, total in zip(allocations, sums, strict=True):
        used = allocation.bytes_per_token(block_size=16, itemsize=itemsize)
        rows.append({"budget": used / stock_bytes, "bytes_per_token": used, **total.row})
    return rows


def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """float32 [B (T - 1), V] of the tokens after the first, from `ids` [B, T]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].to(ids.device)
    return F.log_softmax(logits.float().flatten(0, 1), dim=-1)
