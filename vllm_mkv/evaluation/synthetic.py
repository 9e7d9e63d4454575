# SPDX-License-Identifier: Apache-2.0
"""Models and adapters of a given shape without content: what a step takes does not depend on the numbers in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mkv_kernels.layout import BLOCK, WIDTHS
from vllm_mkv.adapter import Adapter, LayerBases
from vllm_mkv.allocation import AllocationPath, check_width_ladder
from vllm_mkv.fingerprint import ModelFingerprint
from vllm_mkv.fit.calibrate import new_adapter
from vllm_mkv.fit.model import choose_group_heads

VOCABULARY = 32_000
POSITIONS = 131_072


@dataclass(frozen=True)
class ModelShape:
    """Of a Llama model."""

    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    hidden_size: int

    @classmethod
    def parse(cls, text: str) -> ModelShape:
        """From `layers,q_heads,kv_heads,head_size,hidden`. Raises ValueError where that is no model."""
        example = "give layers, query heads, KV heads, head size and hidden size such as 4,16,4,128,2048"
        try:
            numbers = [int(number) for number in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != 5 or min(numbers) < 1:
            raise ValueError(f"--shape {text!r} is not five whole numbers above 0; {example}")
        shape = cls(*numbers)
        if shape.query_heads % shape.kv_heads:
            raise ValueError(
                f"--shape {text}: {shape.query_heads} query heads do not divide among {shape.kv_heads} KV heads; "
                f"{example}"
            )
        if shape.head_size % BLOCK:
            raise ValueError(f"--shape {text}: the head size {shape.head_size} is no multiple of {BLOCK}; {example}")
        return shape

    def save(self, folder: Path, dtype: str) -> None:
        """Writes a configuration, and no weights."""
        from transformers import LlamaConfig

        LlamaConfig(
            num_hidden_layers=self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_size,
            hidden_size=self.hidden_size,
            # As wide as in Llama 3 8B, in whole cache lines.
            intermediate_size=-(-self.hidden_size * 7 // 2 // 64) * 64,
            vocab_size=VOCABULARY,
            max_position_embeddings=POSITIONS,
            architectures=["LlamaForCausalLM"],
            dtype=dtype,
        ).save_pretrained(folder)


def random_adapter(
    model: str,
    fingerprint: ModelFingerprint,
    *,
    group_heads: int | None = None,
    widths: Sequence[int] = WIDTHS,
    seed: int = 0,
) -> Adapter:
    """Random orthogonal bases, the same in every layer, and all latent groups alike down `widths`.

    Args:
        group_heads: J, KV heads per latent group; None for what `calibrate` takes.

    Raises:
        ValueError: the groups do not divide, or the widths are no ladder.
    """
    check_width_ladder(widths)
    group_heads = choose_group_heads(fingerprint, group_heads)
    groups, n = fingerprint.num_key_value_heads // group_heads, group_heads * fingerprint.head_size
    rng = np.random.default_rng(seed)
    key, value = (np.linalg.qr(rng.normal(size=(n, n)))[0].astype(np.float32) for _ in range(2))
    shape, zero = (groups, n, n), np.zeros((groups, n), np.float32)
    U, V, Vt = (np.broadcast_to(matrix, shape) for matrix in (key, value, value.T))
    layer = LayerBases(A=U, B=U, C=V, D=Vt, key_mean=zero, value_mean=zero)
    adapter = new_adapter(
        model, fingerprint, (layer,) * fingerprint.num_hidden_layers, basis="random", group_heads=group_heads
    )
    return replace(adapter, path=AllocationPath.uniform(adapter.shape, widths))
