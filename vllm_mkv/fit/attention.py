# SPDX-License-Identifier: Apache-2.0
"""An attention function in transformers' attention interface, and handlers that see or replace its keys and values.

No model code is copied: `intercepted` gives every attention layer of any model that calls its attention through
`transformers.AttentionInterface` a handler, which gets queries, keys and values after RoPE and returns the keys and
values that scaled dot-product attention then uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "mkv"
Handler = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(attention module, q [B, H, T, d], k [B, Hkv, S, d], v [B, Hkv, S, d]) -> (k, v) to attend with."""

_handlers: WeakKeyDictionary[nn.Module, Handler] = WeakKeyDictionary()


@contextmanager
def intercepted(model: PreTrainedModel, handler: Handler) -> Iterator[None]:
    """Lets `handler` see and replace the keys and values of all attention layers of `model`.

    Raises:
        NotImplementedError: from a forward pass, naming what of the model's attention is not supported.
    """
    AttentionInterface.register(NAME, mkv_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    layers = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    previous = {module: _handlers[module] for module in layers if module in _handlers}
    implementation = _implementation(model)
    try:
        _handlers.update(dict.fromkeys(layers, handler))
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(implementation)
        for module in layers:
            _handlers.pop(module, None)
        _handlers.update(previous)


def _implementation(model: PreTrainedModel) -> dict[str, str]:
    """The attention implementation of a model and its parts, as `set_attn_implementation` takes it."""
    parts = {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    names = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"": model.config._attn_implementation, **names}


def mkv_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention on the keys and values that the module's handler returns."""
    handler = _handlers.get(module)
    if handler is None:
        raise NotImplementedError(f"{type(module).__name__} has no layer index, so its layer in an adapter is unknown")
    refuse_attention(module, key, value, kwargs)
    key, value = handler(module, query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


REFUSED_ARGUMENTS = {
    "softcap": "an attention soft-cap",
    "s_aux": "attention sinks",
    "position_bias": "a position bias on its scores",
}
"""Arguments with which models call their attention function where it is more than scaled dot products."""


def refuse_attention(module: nn.Module, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError for kinds of attention that a projected cache does not serve."""
    window = kwargs.get("sliding_window")
    longest = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    name = type(module).__name__
    for argument, feature in REFUSED_ARGUMENTS.items():
        if kwargs.get(argument) is not None:
            raise NotImplementedError(
                f"{name} has {feature}, which a projected cache does not support; use another model"
            )
    if window is not None and not (longest and window >= longest):
        raise NotImplementedError(
            f"{name} attends through a sliding window of {window} tokens, which a projected cache does not support "
            "yet; use a model with full attention, or one whose window covers its context"
        )
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise NotImplementedError(f"{name} is an encoder's attention; a projected cache is for decoders")
    if key.shape[1:] != value.shape[1:]:
        raise NotImplementedError(
            f"{name} has keys {list(key.shape[1:])} and values {list(value.shape[1:])} of different shapes, as MLA "
            "has; a projected cache is for keys and values of one head size"
        )


def layer_index(module: nn.Module) -> int:
    """Of an attention module that `intercepted` called a handler for."""
    index = module.layer_idx
    assert isinstance(index, int)
    return index


@torch.no_grad()
def attention_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention module of every layer, found by one forward pass of two tokens.

    Raises:
        NotImplementedError: a layer does not call its attention through the interface, or not exactly once.
    """
    calls: list[nn.Module] = []

    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(module)
        return key, value

    with intercepted(model, record):
        model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    found = {layer_index(module): module for module in calls}
    wanted = set(range(model.config.get_text_config(decoder=True).num_hidden_layers))
    if set(found) != wanted or len(calls) != len(wanted):
        missing = sorted(wanted - set(found))
        what = f"layers {missing} do not" if missing else "its layers do not, or not once each,"
        raise NotImplementedError(
            f"{type(model).__name__}: {what} call their attention through transformers' attention interface; "
            "only decoders whose every layer does are supported"
        )
    return dict(sorted(found.items()))
