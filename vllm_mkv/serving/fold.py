# SPDX-License-Identifier: Apache-2.0
"""Folding the value bases into a model's weights, where nothing but the attention lies between them."""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm_mkv.serving import compat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.model_executor.layers.attention import Attention


def foldable(parent: nn.Module, attention: Attention) -> tuple[Any, Any]:
    """The projections of an attention module into which C and D may be folded; None for one that may not be.

    A projection may be folded where its weights are plain and its values reach the attention, or its input leaves it,
    untouched. Whether they do is tried out: the module's own code runs once with stand-ins for its projections and its
    attention, so no model is known by name.
    """
    qkv, out = compat.plain_linear_children(parent)
    if qkv is None and out is None:
        return None, None
    num_q, num_kv = attention.num_heads * attention.head_size, attention.num_kv_heads * attention.head_size
    if qkv is not None and qkv.weight.shape[0] != num_q + 2 * num_kv:
        qkv = None
    if out is not None and out.weight.shape[1] != num_q:
        out = None
    try:
        value_untouched, output_untouched = _trace(parent, attention, qkv, out)
    except Exception:
        # Code that cannot be run like this cannot be vouched for: C and D are then applied at run time, which is exact.
        return None, None
    return (qkv if value_untouched else None), (out if output_untouched else None)


def _trace(parent: nn.Module, attention: Attention, qkv: Any, out: Any) -> tuple[bool, bool]:
    weight = next(child.weight for child in (qkv, out) if child is not None)
    hidden = next((child.weight.shape[dim] for child, dim in ((qkv, 1), (out, 0)) if child is not None))
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(parent.forward).parameters.items():
        if name == "positions":
            arguments[name] = torch.arange(3, device=weight.device)
        elif name == "hidden_states":
            arguments[name] = torch.randn(3, hidden, dtype=weight.dtype, device=weight.device)
        elif parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            return False, False
    num_q, num_kv = attention.num_heads * attention.head_size, attention.num_kv_heads * attention.head_size

    def random(width: int) -> torch.Tensor:
        # Of all sizes, so that what only clips or rounds is seen.
        exponents = 8 * torch.rand(3, width, device=weight.device) - 4
        return (torch.randn(3, width, device=weight.device) * 10**exponents).to(weight.dtype)

    projected, attended = random(num_q + 2 * num_kv), random(num_q)
    seen: dict[str, torch.Tensor] = {}

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen["value"] = value
        return attended.clone()

    def project_out(x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        seen["output"] = x
        return random(hidden), None

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_stand_in(attention, attend))
        if qkv is not None:
            stack.enter_context(_stand_in(qkv, lambda *_, **__: (projected.clone(), None)))
        if out is not None:
            stack.enter_context(_stand_in(out, project_out))
        parent(**arguments)

    def same(name: str, expected: torch.Tensor) -> bool:
        return name in seen and torch.equal(seen[name].reshape(3, -1), expected)

    return qkv is not None and same("value", projected[:, num_q + num_kv :]), same("output", attended)


@contextmanager
def _stand_in(module: nn.Module, forward: Any) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own


@torch.no_grad()
def fold_down(qkv: Any, attention: Attention, C: torch.Tensor) -> None:
    """W_V becomes W_V C, and its bias b C, within every latent group. Shapes: C [G, n, n]."""
    start = (attention.num_heads + attention.num_kv_heads) * attention.head_size
    tensors = [qkv.weight] + ([qkv.bias] if getattr(qkv, "bias", None) is not None else [])
    for tensor in tensors:
        rows = tensor.data[start:]
        grouped = rows.float().reshape(C.shape[0], C.shape[1], -1)
        rows.copy_((C.to(rows.device).mT @ grouped).reshape(rows.shape))


@torch.no_grad()
def fold_up(out: Any, attention: Attention, D: torch.Tensor) -> None:
    """Columns of W_O become D W_O for every query head. Shapes: D [KV heads, d, d], one head per latent group."""
    columns = out.weight.data
    by_head = columns.float().reshape(columns.shape[0], attention.num_kv_heads, -1, attention.head_size)
    columns.copy_(torch.einsum("hgmd,ged->hgme", by_head, D.to(columns.device)).reshape(columns.shape))
