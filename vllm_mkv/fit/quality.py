# SPDX-License-Identifier: Apache-2.0
"""What a cache does to a model's predictions, measured through transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from vllm_mkv.adapter import Adapter
from vllm_mkv.allocation import Allocation
from vllm_mkv.fit.attention import Handler, intercepted
from vllm_mkv.fit.data import batches
from vllm_mkv.fit.truncation import Truncation
from vllm_mkv.progress import progress

LOGITS_PER_BATCH = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits held at once, by kind of device. On a CPU, arrays of more than 32 MB are given back to the system every time,
and to get them anew costs more than the arithmetic."""


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


@dataclass(frozen=True)
class Cache:
    """A cache to measure: what it does to keys and values, and what it costs."""

    name: str
    handler: Handler
    bytes_per_token: int
    """Of all layers, keys and values; scales, alignment and padding included."""


def projected_caches(adapter: Adapter, allocations: Sequence[Allocation], itemsize: int) -> list[Cache]:
    """The caches of an adapter, each named "mkv", at allocations of its own; a number of the model takes `itemsize`."""
    return [
        Cache("mkv", Truncation(adapter, allocation), allocation.bytes_per_token(block_size=16, itemsize=itemsize))
        for allocation in allocations
    ]


@torch.inference_mode()
def measure(
    model: PreTrainedModel, windows: np.ndarray, caches: Sequence[Cache], *, stock_bytes: int
) -> list[dict[str, Any]]:
    """Perplexity, KL divergence from the full model in nats per token, and share of equal most likely tokens.

    Args:
        windows: int64 [windows, context]; every token but a window's first is predicted.
        caches: what to attend with in place of the model's own keys and values.
        stock_bytes: bytes per token of the model's own cache, by which budgets are reckoned.

    Returns:
        {"name", "budget", "bytes_per_token", "perplexity", "kl", "top1"} of the full model, named "stock", and then of
        every cache.

    Raises:
        ValueError: a cache makes log-probabilities that are not finite.
    """
    stock_sums, sums = Sums(), [Sums() for _ in caches]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    logits = LOGITS_PER_BATCH.get(model.device.type, LOGITS_PER_BATCH["cuda"])
    size = max(1, logits // (windows.shape[1] * vocabulary))
    count = 1 + len(caches)
    what = f"caches measured on {len(windows)} windows: {count}"
    with progress(what, total=count * len(windows), unit="window") as bar:
        for batch in batches(windows, size):
            ids = torch.from_numpy(batch).to(model.device)
            targets = ids[:, 1:].flatten()
            stock = log_probabilities(model, ids)
            stock_sums.add(stock, stock, targets)
            bar.update(len(batch))
            for cache, total in zip(caches, sums, strict=True):
                with intercepted(model, cache.handler):
                    total.add(stock, log_probabilities(model, ids), targets)
                bar.update(len(batch))
    rows = [quality_row("stock", stock_bytes, stock_bytes, stock_sums)]
    return rows + [
        quality_row(cache.name, cache.bytes_per_token, stock_bytes, total)
        for cache, total in zip(caches, sums, strict=True)
    ]


def quality_row(name: str, bytes_per_token: int, stock_bytes: int, sums: Sums) -> dict[str, Any]:
    """One row of `measure`. Raises ValueError where what was measured is not finite."""
    measured = sums.row
    if not all(map(math.isfinite, measured.values())):
        raise ValueError(
            f"{name} at {bytes_per_token} bytes per token: log-probabilities are not finite; measure in float32"
        )
    return {"name": name, "budget": bytes_per_token / stock_bytes, "bytes_per_token": bytes_per_token, **measured}


def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """float32 [B (T - 1), V] of the tokens after the first, from `ids` [B, T]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].to(ids.device)
    return F.log_softmax(logits.float().flatten(0, 1), dim=-1)
