# SPDX-License-Identifier: Apache-2.0
"""An attention function in transformers' attention interface, and handlers that see or replace its keys and values.

No model code is copied: `intercepted` gives every attention layer of any model that calls its attention through
`transformers.AttentionInterface` a handler, which gets queries, keys and values after RoPE and returns the keys and
values that attention then uses. Windows are in the masks that models make; soft-caps are computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Scores:
    """What a layer makes of products of queries and keys.

    window: tokens that a query sees, its own included; None for all up to it.
    soft_cap: scores s are soft_cap tanh(s / soft_cap) where it is not None.
    """

    scale: float
    window: int | None
    soft_cap: float | None

    def sees(self, num_queries: int, num_tokens: int, device: torch.device) -> Tensor:
        """Which tokens each of the last queries sees, [num_queries, num_tokens] bool."""
        sees = torch.ones(num_queries, num_tokens, dtype=torch.bool, device=device)
        last = num_tokens - num_queries
        sees = sees.tril(last)
        return sees if self.window is None else sees.triu(last + 1 - self.window)

    def weights(self, query: Tensor, key: Tensor, sees: Tensor) -> Tensor:
        """Of q [.., T, d] and k [.., S, d], with `sees` bool [.., T, S]: [.., T, S] in float32 at least."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        s = query.to(dtype) @ key.to(dtype).mT * self.scale
        if self.soft_cap is not None:
            s = self.soft_cap * torch.tanh(s / self.soft_cap)
        # A padding token may see nothing; it must not make the others NaN.
        return s.masked_fill(~sees, torch.finfo(dtype).min).softmax(-1)


_handlers: WeakKeyDictionary[nn.Module, Handler] = WeakKeyDictionary()
_scores: WeakKeyDictionary[nn.Module, Scores] = WeakKeyDictionary()


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
    """Attention on the keys and values that the module's handler returns."""
    handler = _handlers.get(module)
    if handler is None:
        raise NotImplementedError(f"{type(module).__name__} has no layer index, so its layer in an adapter is unknown")
    refuse_attention(module, key, value, kwargs)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    scores = _scores[module] = Scores(scale, kwargs.get("sliding_window"), kwargs.get("softcap"))
    key, value = handler(module, query, key, value)
    if scores.soft_cap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return capped_attention(query, key, value, attention_mask, scores), None


def capped_attention(query: Tensor, key: Tensor, value: Tensor, sees: Tensor | None, scores: Scores) -> Tensor:
    """q [B, H, T, d], k and v [B, Hkv, S, d], `sees` bool [B, 1, T, S] or None for a causal one: [B, T, H, d]."""
    if sees is None:
        sees = scores.sees(query.shape[2], key.shape[2], query.device)
    out = []
    # A KV head at a time: scores of all of them would take most of the memory.
    for q, k, v in zip(query.chunk(key.shape[1], 1), key.split(1, 1), value.split(1, 1), strict=True):
        out.append(scores.weights(q, k, sees).to(v.dtype) @ v)
    return torch.cat(out, dim=1).transpose(1, 2).contiguous()


def scores_of(module: nn.Module) -> Scores:
    """Of an attention module that `intercepted` calls a handler for."""
    return _scores[module]


REFUSED_ARGUMENTS = {
    "s_aux": "attention sinks",
    "position_bias": "a position bias on its scores",
}
"""Arguments with which models call their attention function where it is more than scaled dot products."""


def refuse_attention(module: nn.Module, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError for kinds of attention that a projected cache does not serve."""
    name = type(module).__name__
    for argument, feature in REFUSED_ARGUMENTS.items():
        if kwargs.get(argument) is not None:
            raise NotImplementedError(
                f"{name} has {feature}, which a projected cache does not support; use another model"
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
