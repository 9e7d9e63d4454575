# SPDX-License-Identifier: Apache-2.0
"""Makes an adapter for a model from text: statistics after RoPE, bases, a uniform allocation path, measured quality."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from vllm_mkv import __version__
from vllm_mkv.adapter import Adapter, AdapterConfig, LayerBases, check_output
from vllm_mkv.allocation import Allocation, AllocationPath, CacheShape
from vllm_mkv.fingerprint import ModelFingerprint
from vllm_mkv.fit.attention import attention_layers, intercepted
from vllm_mkv.fit.bases import BASES, output_metric, whitened
from vllm_mkv.fit.card import model_card
from vllm_mkv.fit.data import batches, check_context, token_windows
from vllm_mkv.fit.held_out import HELD_OUT, num_held_out, possible_overlap, split_windows
from vllm_mkv.fit.model import Source, choose_group_heads, dtype_name
from vllm_mkv.fit.quality import measure, projected_caches
from vllm_mkv.fit.statistics import Statistics
from vllm_mkv.progress import progress

TOKENS_PER_BATCH = 8192
DEFAULT_CONTEXT = 1024
DEFAULT_BUDGET = 0.5
MEASURED_BUDGETS = (1.0, 0.75, 0.5, 0.375, 0.25)


def calibrate(
    model: str,
    text: Sequence[str],
    *,
    tokens: int,
    output: str | Path,
    basis: str = "query",
    group_heads: int | None = None,
    context: int | None = None,
    eval_windows: int = HELD_OUT,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Adapter:
    """Makes an adapter and writes it to the folder `output`, whole or not at all.

    Args:
        model: a folder or a Hub repository.
        text: files, folders or datasets; see `vllm_mkv.fit.data.token_windows`.
        tokens: to collect statistics on, rounded to windows.
        output: a folder that is new, empty or an adapter.
        basis: "query" or "pca".
        group_heads: J, KV heads per latent group; None for the largest whose query heads fit one tensor-core product.
        context: tokens per window; None for 1024 or the model's longest, whichever is shorter.
        eval_windows: windows, none of them used for fitting, to measure quality on; 0 for none. See `held_out`.
        seed: of the choice of windows.
        dtype, device: see `vllm_mkv.fit.model.Source.load`.
        revision, trust_remote_code: of the model's Hub repository.

    Raises:
        ValueError: an argument or a text is wrong; says which and what to do.
        NotImplementedError: the model's attention is of a kind that is not supported; names it.
    """
    if basis not in BASES:
        raise ValueError(f"basis {basis!r} is not one of {', '.join(BASES)}")
    check_output(output)
    source = Source(model, revision, trust_remote_code)
    fingerprint = source.fingerprint
    group_heads = choose_group_heads(fingerprint, group_heads)
    windows, held_out = draw_windows(source, text, tokens, eval_windows, context, seed)
    network = source.load(dtype, device)
    bases = fit_bases(network, fingerprint, windows, basis=basis, group_heads=group_heads)
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
    adapter = new_adapter(
        model,
        fingerprint,
        bases,
        basis=basis,
        group_heads=group_heads,
        revision=revision,
        made=how_made("calibrate", text, windows, eval_windows, seed, network) | versions,
    )
    if eval_windows:
        adapter = with_quality(adapter, network, held_out, MEASURED_BUDGETS, source.itemsize)
    adapter.save(output, model_card(adapter.config))
    return adapter


def draw_windows(
    source: Source,
    text: Sequence[str],
    tokens: int,
    eval_windows: int,
    context: int | None,
    seed: int,
    before: dict[str, Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """About `tokens` tokens to fit or probe on, and `eval_windows` windows to measure on, none in both.

    Args:
        before: what an adapter says of how it was made. Warns where a step of that may have fitted on what is measured.

    Returns:
        int64 [windows, context] and [eval_windows, context].

    Raises:
        ValueError: no such context, no window, too little text, or steps of `before` that fitted on what would be
            measured; says what to do.
    """
    if eval_windows < 0:
        raise ValueError(f"{eval_windows} windows to measure on; use 0 for none")
    context = choose_context(source.config, context)
    num_windows = round(tokens / context)
    if num_windows < 1:
        raise ValueError(f"{tokens} tokens are no window of {context}; use more --tokens or a shorter --context")
    overlap = possible_overlap(before or {}, text, context, seed, eval_windows)
    num_windows += num_held_out(eval_windows)
    windows = token_windows(text, source.tokenizer, num_windows=num_windows, context=context, seed=seed)
    if overlap and eval_windows:
        warnings.warn(
            f"quality may be measured on windows that were fitted on: {overlap}. Give every step the same --text, "
            "--seed and --context, or measure on other text with vllm-mkv eval",
            stacklevel=3,
        )
    return split_windows(windows, eval_windows)


def new_adapter(
    model: str,
    fingerprint: ModelFingerprint,
    bases: tuple[LayerBases, ...],
    *,
    basis: str,
    group_heads: int,
    revision: str | None = None,
    made: dict[str, Any] | None = None,
) -> Adapter:
    """Bases of every layer of a model with the uniform path of ranks, not measured."""
    path = AllocationPath.uniform(cache_shape(fingerprint, group_heads))
    config = AdapterConfig(
        base_model_name_or_path=model,
        revision=revision,
        model=fingerprint,
        basis=basis,
        group_heads=group_heads,
        layers=list(range(fingerprint.num_hidden_layers)),
        default_budget=first_reachable(path, [DEFAULT_BUDGET]),
        made=made or {},
    )
    return Adapter(config, bases, path)


def how_made(
    command: str,
    text: Sequence[str],
    windows: np.ndarray,
    eval_windows: int,
    seed: int,
    model: PreTrainedModel,
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What an adapter says of the command that made it, of one that was made as `before` says."""
    context = windows.shape[1]
    return {
        "by": f"vllm-mkv {__version__} {command}",
        "text": [str(name) for name in text],
        "tokens": windows.size,
        "context": context,
        "seed": seed,
        "eval_windows": eval_windows,
        "held_out": possible_overlap(before or {}, text, context, seed, eval_windows) is None,
        "dtype": dtype_name(model.dtype),
    }


def with_quality(
    adapter: Adapter, model: PreTrainedModel, windows: np.ndarray, budgets: Sequence[float], itemsize: int
) -> Adapter:
    """The adapter with its quality on `windows`, int64 [windows, context], at those of `budgets` that it reaches."""
    caches = projected_caches(adapter, reachable_allocations(adapter.path, itemsize, budgets), itemsize)
    rows = measure(model, windows, caches, stock_bytes=adapter.shape.stock_bytes_per_token(itemsize))
    return replace(adapter, config=adapter.config.model_copy(update={"quality": rows}))


@torch.inference_mode()
def fit_bases(
    model: PreTrainedModel, fingerprint: ModelFingerprint, windows: np.ndarray, *, basis: str, group_heads: int
) -> tuple[LayerBases, ...]:
    """Bases of every layer from the statistics of `windows`, int64 [windows, context]."""
    metrics = output_metrics(model, fingerprint) if basis == "query" else {}
    statistics = attention_statistics(model, group_heads, windows)
    bases = []
    with progress(f"{basis} bases: {len(statistics)} layers", total=len(statistics), unit="layer") as bar:
        for layer in sorted(statistics):
            found = statistics.pop(layer)
            bases.append(whitened(BASES[basis](found, metrics.get(layer)), found))
            bar.update()
    return tuple(bases)


@torch.inference_mode()
def attention_statistics(model: PreTrainedModel, group_heads: int, windows: np.ndarray) -> Statistics:
    """Moments of every layer over `windows`, int64 [windows, context]: one forward pass.

    Raises:
        ValueError: queries, keys or values are not finite.
        NotImplementedError: the model's attention is of a kind that is not supported.
    """
    layers = attention_layers(model)
    statistics = Statistics(group_heads)
    bar = progress(f"statistics of attention: {len(windows)} windows", total=windows.size, unit="tok")
    with intercepted(model, statistics), bar:
        for batch in batches(windows, max(1, TOKENS_PER_BATCH // windows.shape[1])):
            # Without the language modelling head: logits would take most of the memory.
            model.base_model(input_ids=torch.from_numpy(batch).to(model.device), use_cache=False)
            bar.update(batch.size)
    for layer in layers:
        statistics[layer].check(layer)
    return statistics


def output_metrics(model: PreTrainedModel, fingerprint: ModelFingerprint) -> dict[int, torch.Tensor]:
    """`output_metric` of every layer. Raises NotImplementedError where an output projection is not plain."""
    heads, kv_heads, d = fingerprint.num_attention_heads, fingerprint.num_key_value_heads, fingerprint.head_size
    return {layer: output_metric(module, heads, kv_heads, d) for layer, module in attention_layers(model).items()}


def cache_shape(fingerprint: ModelFingerprint, group_heads: int) -> CacheShape:
    return CacheShape(
        num_layers=fingerprint.num_hidden_layers,
        num_groups=fingerprint.num_key_value_heads // group_heads,
        group_width=group_heads * fingerprint.head_size,
    )


def longest_context(config: Any) -> int:
    """Tokens that the model takes, as far as its configuration says."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or DEFAULT_CONTEXT


def choose_context(config: Any, context: int | None) -> int:
    """Tokens per window. Raises ValueError where the model's positions do not reach that far."""
    longest = longest_context(config)
    if context is None:
        return min(DEFAULT_CONTEXT, longest)
    check_context(context)
    if context > longest:
        raise ValueError(f"a context of {context} tokens is more than the model's {longest}; use a shorter --context")
    return context


def first_reachable(path: AllocationPath, budgets: Sequence[float]) -> float:
    """The first of `budgets` that the path reaches, or 1 where its smallest ranks take more than any of them."""
    for budget in budgets:
        try:
            path.replay(budget)
        except ValueError:
            continue
        return budget
    return 1.0


def reachable_allocations(path: AllocationPath, itemsize: int, budgets: Sequence[float]) -> list[Allocation]:
    """Allocations at those of `budgets`, falling, that the path reaches."""
    allocations = []
    for budget in budgets:
        try:
            allocations.append(path.replay(budget, itemsize=itemsize))
        except ValueError:
            break
    return allocations
