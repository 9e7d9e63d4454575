# SPDX-License-Identifier: Apache-2.0
"""What is served: the adapter, and the allocation that the budget buys from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_mkv.adapter import Adapter, choose_budget, digest, locate
from vllm_mkv.allocation import Allocation
from vllm_mkv.fingerprint import ModelFingerprint
from vllm_mkv.serving.kernels import choose_kernels
from vllm_mkv.serving.options import MKVOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from mkv_kernels.layout import PageLayout

DEFAULT_BLOCK_SIZE = 16
"""Tokens per page to reckon with while vLLM has not chosen them yet; pages of any multiple of 16 have the same bytes
per token."""
KERNELS = {"torch": "PyTorch", "numba": "compiled CPU", "triton": "Triton"}


@dataclass(frozen=True)
class ServingPlan:
    folder: Path
    digest: str
    adapter: Adapter
    budget: float
    is_default: bool
    """Whether the adapter, not the user, chose the budget."""
    allocation: Allocation
    block_size: int
    itemsize: int
    num_shards: int
    kernels: str

    @classmethod
    def make(cls, vllm_config: VllmConfig, options: MKVOptions) -> ServingPlan:
        """Finds, reads and checks the adapter, and replays its path.

        Raises:
            ValueError: the adapter is missing, damaged, or of another model, or the budget is out of its reach.
        """
        model = vllm_config.model_config
        folder = locate(options.adapter, model.model, options.revision, model.revision)
        adapter = Adapter.load(folder)
        found = digest(folder)
        if options.digest not in (None, found):
            raise ValueError(
                f"the adapter in {folder} has the digest {found}, not {options.digest}: it changed while vLLM was "
                "starting. Start again, and without the option digest, which the plugin sets"
            )
        adapter.check_model(ModelFingerprint.of(model.hf_config))
        if getattr(model.hf_text_config, "attn_logit_softcapping", None):
            adapter.check_soft_cap()
        _check_layers(adapter, folder, may_lack_some=model.has_noops)
        budget = choose_budget(options.budget, adapter.config)
        path = adapter.path if options.allocation == "path" else adapter.uniform_path
        block_size = vllm_config.cache_config.block_size or DEFAULT_BLOCK_SIZE
        itemsize = model.dtype.itemsize
        num_shards = vllm_config.parallel_config.tensor_parallel_size
        adapter.check_shards(num_shards)
        allocation = path.replay(budget, block_size=block_size, itemsize=itemsize, num_shards=num_shards)
        kernels = choose_kernels(options.kernels, model.dtype)
        is_default = options.budget is None
        return cls(folder, found, adapter, budget, is_default, allocation, block_size, itemsize, num_shards, kernels)

    def layout(self, position: int, shard: int) -> PageLayout:
        """Of a layer's pages on a tensor-parallel rank, by the layer's place among the adapter's."""
        return self.allocation.layout(
            position, block_size=self.block_size, itemsize=self.itemsize, shard=shard, num_shards=self.num_shards
        )

    @property
    def bytes_per_token(self) -> int:
        """Of all layers and tensor-parallel ranks."""
        return self.allocation.bytes_per_token(
            block_size=self.block_size, itemsize=self.itemsize, num_shards=self.num_shards
        )

    @property
    def reached(self) -> float:
        return self.allocation.budget(block_size=self.block_size, itemsize=self.itemsize, num_shards=self.num_shards)

    def describe(self) -> str:
        """The one line that a start logs."""
        reached, used = self.reached, self.bytes_per_token
        waste = used - sum(
            layout.content_bytes // layout.block_size
            for layer in range(self.allocation.shape.num_layers)
            for layout in (self.layout(layer, shard) for shard in range(self.num_shards))
        )
        return (
            f"MKV: adapter {self.folder} ({self.digest}), budget {self.budget:g} "
            f"{'by default' if self.is_default else 'asked'} and {reached:.4f} reached: "
            f"{used} bytes per token in place of {round(used / reached)}"
            + (f" ({waste} of them padding)" if waste else "")
            + f", {1 / reached:.2f} times the tokens in the same memory; {KERNELS[self.kernels]} kernels"
        )


def _check_layers(adapter: Adapter, folder: Path, *, may_lack_some: bool) -> None:
    """Raises ValueError unless the adapter has bases for every layer of the model."""
    layers, count = adapter.config.layers, adapter.config.model.num_hidden_layers
    if len(layers) < count and not may_lack_some:
        raise ValueError(
            f"{folder}/adapter_config.json: layers {layers} are not the model's layers 0 to {count - 1}; "
            "make the adapter again"
        )
