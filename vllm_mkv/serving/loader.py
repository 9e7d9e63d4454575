# SPDX-License-Identifier: Apache-2.0
"""Loads the adapter into a model whose weights another loader has just loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.kv_cache_interface import FullAttentionSpec

from mkv_kernels.bases import LayerBases, with_orthonormal_exact_tiers
from mkv_kernels.codes import multipliers
from mkv_kernels.layout import BLOCK, KEY, VALUE
from vllm_mkv.allocation import split_groups
from vllm_mkv.serving import compat, fold
from vllm_mkv.serving.attention import MKVAttentionImpl
from vllm_mkv.serving.configure import configure
from vllm_mkv.serving.cpu_attention import CPUAttention
from vllm_mkv.serving.kernels import without_numba
from vllm_mkv.serving.options import MKVOptions
from vllm_mkv.serving.plan import ServingPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import ModelConfig, VllmConfig
    from vllm.model_executor.layers.attention import Attention

    from vllm_mkv.serving.attention import LayerAttention

logger = init_logger("vllm.mkv.loader")


class MKVModelLoader(BaseModelLoader):
    """Base weights by whichever loader the user chose, then the adapter: slice by tensor-parallel rank, fold values,
    hand each attention layer its bases and its layout."""

    def __init__(self, base: BaseModelLoader) -> None:
        super().__init__(base.load_config)
        self.base = base
        self._vllm_config: VllmConfig | None = None
        self._plan: ServingPlan | None = None

    def get_external_weight_memory(self, vllm_config: VllmConfig) -> int:
        return self.base.get_external_weight_memory(vllm_config)

    def download_model(self, model_config: ModelConfig) -> None:
        self.base.download_model(model_config)

    def create_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = self.base.create_model(*args, **kwargs)
        vllm_config = self._vllm_config or get_current_vllm_config_or_none()
        if vllm_config is not None and compat.uses_mkv(vllm_config):
            # Layers are there, and loading what they hold may take minutes.
            self._plan = ServingPlan.make(vllm_config, MKVOptions.of(vllm_config))
            check_layers(vllm_config, self._plan)
        return model

    def __getattr__(self, name: str) -> Any:
        # What some loaders have beyond the interface: all weights, for reloading them.
        return getattr(self.base, name)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        self.base.load_weights(model, model_config)
        vllm_config = self._vllm_config or get_current_vllm_config_or_none()
        assert vllm_config is not None
        load_adapter(model, vllm_config, self._plan, may_fold=True)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        self._vllm_config = vllm_config
        if compat.uses_mkv(vllm_config) and MKVOptions.of(vllm_config).digest is None:
            # The configuration was being made when MKV was first asked for, too early for the check in the front end.
            configure(vllm_config)
        if type(self.base).load_model is BaseModelLoader.load_model:
            return super().load_model(vllm_config, model_config, prefix)
        # A loader with ways of its own may process weights before they can be folded.
        model = self.base.load_model(vllm_config, model_config, prefix)
        load_adapter(model, vllm_config, self._plan, may_fold=False)
        return model


def load_adapter(model: nn.Module, vllm_config: VllmConfig, plan: ServingPlan | None, *, may_fold: bool) -> None:
    """Gives every MKV attention layer of the model its bases, layout and cache spec.

    Args:
        plan: None where no layer was checked against one yet.

    Raises:
        NotImplementedError, ValueError: see `check_layers`.
    """
    if not compat.uses_mkv(vllm_config):  # a model with another backend, in a process that has also served with MKV
        return
    modules = dict(model.named_modules())
    layers = compat.attention_layers(vllm_config)
    options = MKVOptions.of(vllm_config)
    if plan is None:
        plan = ServingPlan.make(vllm_config, options)
        check_layers(vllm_config, plan)
    # With LoRA, deltas computed from the model's own weights are added behind every projection.
    may_fold = may_fold and options.fold and vllm_config.lora_config is None
    make_attention = _attention_maker(vllm_config, plan, list(layers.values()))
    folded = [0, 0]
    for name, layer in layers.items():
        position = plan.adapter.config.layers.index(compat.layer_index(name))
        parent = modules.get(name.rpartition(".")[0])
        qkv, out = fold.foldable(parent, layer) if may_fold and parent is not None else (None, None)
        _adapt_layer(layer, plan, position, qkv, out, make_attention)
        folded[0] += qkv is not None
        folded[1] += out is not None and plan.adapter.config.group_heads == 1
    if any(folded):
        compat.keep_weights(model)
    logger.debug("value bases folded into %d value and %d output projections of %d", *folded, len(layers))


def check_layers(vllm_config: VllmConfig, plan: ServingPlan) -> None:
    """What is known of a model's layers before they hold weights.

    Raises:
        NotImplementedError: a layer with a cache does not attend as MKV does, or to keys of another shape than the
            adapter's, since a model may choose its layers' classes and backends itself, whatever the user asked for;
            or the Triton kernels do not take its pages.
        ValueError: the adapter has no bases for a layer, or its keys are less a mean and a layer caps its scores; or a
            latent group is too wide for the Triton kernels.
    """
    layers, model = compat.attention_layers(vllm_config), plan.adapter.config.model
    shape = (model.head_size, model.head_size, max(1, model.num_key_value_heads // plan.num_shards))
    for name, layer in layers.items():
        own = f"{type(layer).__name__} with {type(layer.impl).__name__}"
        if not compat.is_plain_attention(layer) or not isinstance(layer.impl, MKVAttentionImpl):
            raise NotImplementedError(
                f"{name} is {own}, which is not MKV's attention; serve this model with another backend"
            )
        found = (layer.head_size, layer.head_size_v, layer.num_kv_heads)
        if found != shape:
            raise NotImplementedError(
                f"{name} has {found[2]} KV heads of {found[0]} and {found[1]} coordinates, where the adapter's layers "
                f"have {shape[2]} of {shape[0]}; layers of several shapes are not supported with MKV: serve this model "
                "with another backend"
            )
        index = compat.layer_index(name)
        if index not in plan.adapter.config.layers:
            raise ValueError(
                f"the adapter in {plan.folder} has no bases for {name}; make an adapter for this model: "
                f"vllm-mkv calibrate {vllm_config.model_config.model} --text FILE --output ADAPTER"
            )
        if layer.impl.soft_cap:
            plan.adapter.check_soft_cap()
        if plan.kernels == "triton":
            from vllm_mkv.serving.triton_attention import check_layout

            layout = plan.layout(plan.adapter.config.layers.index(index), get_tensor_model_parallel_rank())
            check_layout(layout, model.head_size, vllm_config.model_config, window=layer.impl.window)
    if not layers:
        raise NotImplementedError("no layer of this model has a KV cache; serve it with another backend")


def _attention_maker(
    vllm_config: VllmConfig, plan: ServingPlan, layers: list[Attention]
) -> Callable[[LayerBases, Attention], LayerAttention]:
    """What makes a layer's kernels from its bases; `layers` are all for which it will be asked."""
    if plan.kernels == "torch":
        reason = without_numba(vllm_config.model_config.dtype)
        if reason and MKVOptions.of(vllm_config).kernels == "auto":
            logger.warning("MKV: PyTorch serves, slower than the compiled kernels, which cannot run: %s", reason)
        return lambda bases, layer: CPUAttention(
            bases, layer.impl.scale, window=layer.impl.window, soft_cap=layer.impl.soft_cap
        )
    if plan.kernels == "numba":
        return _compiled_attention_maker(vllm_config.model_config.dtype)
    from vllm_mkv.serving.triton_attention import TritonAttention
    from vllm_mkv.serving.warmup import WarmUp
    from vllm_mkv.serving.workspace import StepLimits, Workspace

    device = next(iter(layers[0].buffers())).device
    workspace = Workspace(StepLimits.of(vllm_config, device), vllm_config.model_config.dtype, device)
    threads = compat.warm_up_threads(vllm_config)
    warm_up = WarmUp([layer.impl for layer in layers], workspace, threads) if threads else None

    def make(bases: LayerBases, layer: Attention) -> LayerAttention:
        impl = layer.impl
        scores = {"window": impl.window, "soft_cap": impl.soft_cap}
        return TritonAttention(bases, impl.scale, layer.num_heads, workspace, warm_up, **scores)

    return make


def _compiled_attention_maker(dtype: torch.dtype) -> Callable[[LayerBases, Attention], LayerAttention]:
    from mkv_kernels.compiled.decode import DecodeScratch, LayerDecode
    from mkv_kernels.compiled.store import LayerStore, StoreScratch

    logger.info("MKV: compiling CPU kernels, or loading what was compiled before")
    store_scratch, decode_scratch = StoreScratch(), DecodeScratch()

    def make(bases: LayerBases, layer: Attention) -> LayerAttention:
        impl, num_heads = layer.impl, layer.num_heads
        scores = {"window": impl.window, "soft_cap": impl.soft_cap}
        store = LayerStore(bases, num_heads, dtype, store_scratch)
        decode = LayerDecode(bases, impl.scale, num_heads, dtype, decode_scratch, **scores)
        return CPUAttention(bases, impl.scale, (store, decode), **scores)

    return make


def _adapt_layer(
    layer: Attention,
    plan: ServingPlan,
    position: int,
    qkv: Any,
    out: Any,
    make_attention: Callable[[LayerBases, Attention], LayerAttention],
) -> None:
    shard, num_shards = get_tensor_model_parallel_rank(), plan.num_shards
    groups = list(split_groups(range(plan.allocation.shape.num_groups), num_shards)[shard])
    bases = plan.adapter.bases[position]

    def mine(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[groups]))

    widths = [plan.allocation.widths[position][group] for group in groups]
    exact_k, exact_v = ([BLOCK * group[side].count(16) for group in widths] for side in (KEY, VALUE))
    A, B = with_orthonormal_exact_tiers(mine(bases.A), mine(bases.B), exact_k)
    C, D = with_orthonormal_exact_tiers(mine(bases.C), mine(bases.D.swapaxes(-1, -2)), exact_v)
    D = D.mT.contiguous()
    if plan.adapter.config.group_heads > 1:
        out = None
    if qkv is not None:
        fold.fold_down(qkv, layer, C)
    if out is not None:
        steps = torch.stack([multipliers(group[VALUE]) for group in widths])
        fold.fold_up(out, layer, D * steps[:, :, None])
    cut = partial(
        LayerBases.cut,
        A=A,
        B=B,
        C=C,
        D=D,
        key_mean=mine(bases.key_mean),
        value_mean=mine(bases.value_mean),
        head_size=layer.head_size,
        fold_down=qkv is not None,
        fold_up=out is not None,
        device=next(iter(layer.buffers())).device,
    )

    def make_spec(vllm_config: VllmConfig) -> FullAttentionSpec:
        block_size = vllm_config.cache_config.block_size
        layout = replace(plan, block_size=block_size).layout(position, shard)
        layer.impl.attention = make_attention(cut(layout), layer)
        return FullAttentionSpec(
            block_size=block_size,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            head_size_v=layer.head_size_v,
            dtype=layer.kv_cache_torch_dtype,
            num_head_slots=1,
            state_content_bytes=layout.bytes_per_token,
        )

    compat.set_cache_spec(layer, make_spec)
