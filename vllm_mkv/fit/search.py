# SPDX-License-Identifier: Apache-2.0
"""Finds the allocation path of an adapter: probes, exchange rates, steps of least damage per byte; then measures it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from mkv_kernels.layout import KEY, VALUE, WIDTHS, BlockWidths
from vllm_mkv.adapter import Adapter, LayerBases, check_output
from vllm_mkv.allocation import Allocation, AllocationPath, CacheShape, check_width_ladder
from vllm_mkv.fit.attention import Handler
from vllm_mkv.fit.bases import TRAINED, block_metrics, whitened
from vllm_mkv.fit.calibrate import (
    attention_statistics,
    draw_windows,
    first_reachable,
    how_made,
    output_metrics,
    with_quality,
)
from vllm_mkv.fit.card import model_card
from vllm_mkv.fit.errors import BlockErrors
from vllm_mkv.fit.held_out import HELD_OUT
from vllm_mkv.fit.model import Source
from vllm_mkv.fit.path import least_damage_path
from vllm_mkv.fit.quality import Cache, measure, projected_caches
from vllm_mkv.fit.truncation import Truncation

DEFAULT_TOKENS = 32_768
DEFAULT_BUDGETS = (0.25, 0.5)
"""What to serve at where nobody says, the first that is in reach; with ranks alone, from the second on."""
MEASURED_BUDGETS = (0.75, 0.5, 0.375, 0.25, 0.167, 0.125, 0.09, 0.07)
PROBE_WIDTH = 2
EXPONENTS = (1.0, 0.85, 0.7, 0.55)
TRIED_BUDGETS, TRIED_BUDGETS_OF_RANKS = (0.125, 0.07), (0.375, 0.25)
LEAST_DIVERGENCE = 1e-9
"""Nats per token: taken for what a model loses that loses nothing."""
LEAST_SHARE = 0.01
"""Of the mean side's cost, what any side's is taken for at least."""


@dataclass(frozen=True)
class Found:
    """What a search found out about a model.

    Shapes:
        rates:  [layers, 2], e: what a unit of error costs
        errors: [layers, groups, 2, blocks, widths], w: error of a block at each of `WIDTHS`; see `errors.BlockErrors`
    """

    bases: tuple[LayerBases, ...]
    rates: np.ndarray
    errors: np.ndarray
    exponent: float | None
    """That the measured rates were raised to; None where the adapter keeps its path."""
    path: AllocationPath
    passes: int
    """Forward passes of the calibration set that it took."""

    @property
    def damage(self) -> np.ndarray:
        return damage_of(self.rates, self.errors)


def damage_of(rates: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """What giving each block each width costs: [layers, groups, 2, blocks, widths]; see `Found` for the arguments."""
    return rates[:, None, :, None, None] * errors


def search(
    adapter: Adapter,
    text: Sequence[str],
    *,
    output: str | Path,
    widths: Sequence[int] = WIDTHS,
    shards: int = 1,
    tokens: int = DEFAULT_TOKENS,
    context: int | None = None,
    eval_windows: int = HELD_OUT,
    seed: int = 0,
    model: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Adapter, Found]:
    """Gives an adapter the path of least damage and writes it to the folder `output`, whole or not at all.

    Args:
        text: files, folders or datasets; see `vllm_mkv.fit.data.token_windows`.
        output: a folder that is new, empty or an adapter; it may be the adapter itself.
        widths: that blocks of 16 coordinates may have, falling from 16; (16, 0) finds ranks alone.
        shards: tensor-parallel ranks among which every prefix of the path is balanced.
        tokens: of the calibration set, rounded to windows.
        context: tokens per window; None for 1024 or the model's longest, whichever is shorter.
        eval_windows: windows, none of them probed on, to measure quality on; 0 for none. See `held_out`.
        seed: of the choice of windows.
        model: folder or Hub repository; None for the one that the adapter was made for.
        dtype, device: see `vllm_mkv.fit.model.Source.load`.
        revision, trust_remote_code: of the model's Hub repository.

    Raises:
        ValueError: an argument or a text is wrong; says which and what to do.
        NotImplementedError: the model's attention is of a kind that is not supported; names it.
    """
    check_width_ladder(widths)
    adapter.check_shards(shards)
    check_output(output)
    config = adapter.config
    source = Source.of_adapter(config, model, revision, trust_remote_code)
    adapter.check_model(source.fingerprint)
    # Of an earlier search nothing stays, unless bases were trained on what it found.
    before = {k: step for k, step in config.made.items() if k != "search" or config.basis == TRAINED}
    windows, held_out = draw_windows(source, text, tokens, eval_windows, context, seed, before)
    network = source.load(dtype, device)
    found = probe(network, adapter, windows, widths, shards)
    made = how_made("search", text, windows, eval_windows, seed, network, before) | {
        "widths": list(widths),
        "shards": shards,
        "exponent": found.exponent,
        "passes": found.passes,
    }
    budget = first_reachable(found.path, DEFAULT_BUDGETS if set(found.path.widths) - {16, 0} else DEFAULT_BUDGETS[1:])
    config = config.model_copy(
        update={"made": {**config.made, "search": made}, "default_budget": budget, "quality": []}
    )
    searched = Adapter(config, found.bases, found.path)
    if eval_windows:
        searched = with_quality(searched, network, held_out, MEASURED_BUDGETS, source.itemsize)
    searched.save(output, model_card(searched.config))
    return searched, found


def probe(
    model: PreTrainedModel, adapter: Adapter, windows: np.ndarray, widths: Sequence[int] = WIDTHS, shards: int = 1
) -> Found:
    """Whitens the bases anew and measures what an error in every side of every layer costs.

    Trained ones stay as they are: they suit the quantiser already, and turned inside of their blocks, they would lose
    some of what training won.

    A side's probe leaves it alone at 16 bits while every other one has 2: what that spares, divided by the error that
    its blocks have at 2 bits, is its rate. Seen from there, and not from a model without errors, sides count as they do
    where bytes are short: errors add up, and hide one another. What rates exaggerate all the same is found by trying:
    of the rates to the power of each of `EXPONENTS`, those are taken whose path has the least KL divergence at two
    small budgets, by its geometric mean.

    Forward passes of `windows`: one for the statistics, twice one for what the model itself predicts, one with every
    side quantised, one per layer and side, and two per exponent. Trained bases suit the path that they were trained on
    in ways that no probe sees, so that it is tried beside the others.
    """
    try:
        metrics = output_metrics(model, adapter.config.model)
    except NotImplementedError as error:
        # Within a layer, values are then weighed alike; between layers, the probes weigh them as ever.
        warnings.warn(f"errors of values are weighed before the output projection: {error}", stacklevel=2)
        metrics = {}
    statistics = attention_statistics(model, adapter.config.group_heads, windows)
    bases, of_blocks = [], {}
    for layer, of_layer in zip(adapter.config.layers, adapter.bases, strict=True):
        found = statistics.pop(layer)
        bases.append(of_layer if adapter.config.basis == TRAINED else whitened(of_layer, found))
        of_blocks[layer] = block_metrics(bases[-1], found, metrics.get(layer))
    prepared, shape = replace(adapter, bases=tuple(bases)), adapter.shape
    places = [(layer, side) for layer in range(shape.num_layers) for side in (KEY, VALUE)]
    block_errors = BlockErrors(Truncation(prepared, spared(shape, None)))
    probes: list[Handler] = [block_errors, *(Truncation(prepared, spared(shape, place)) for place in places)]
    rows = measure(model, windows, [Cache("probe", handler, 0) for handler in probes], stock_bytes=1)
    everything, *others = (row["kl"] for row in rows[1:])
    errors = block_errors.means(of_blocks)
    predicted = errors[..., WIDTHS.index(PROBE_WIDTH)].sum((1, 3))
    saved = everything - np.array(others).reshape(shape.num_layers, 2)
    # A side whose errors do the others good is one that costs next to nothing.
    saved = np.maximum(saved, LEAST_SHARE * everything / len(places))
    rates = saved / np.where(predicted > 0, predicted, 1.0)
    paths: dict[float | None, AllocationPath] = {
        exponent: least_damage_path(shape, damage_of(rates**exponent, errors), widths, shards) for exponent in EXPONENTS
    }
    if _suits(adapter, widths, shards):
        paths[None] = adapter.path
    budgets = TRIED_BUDGETS if set(widths) - {16, 0} else TRIED_BUDGETS_OF_RANKS
    allocations = [smallest_above(path, budget) for path in paths.values() for budget in budgets]
    rows = measure(model, windows, projected_caches(prepared, allocations, 2), stock_bytes=1)[1:]
    divergences = np.maximum([row["kl"] for row in rows], LEAST_DIVERGENCE)
    best = list(paths)[int(np.argmin(np.log(divergences).reshape(len(paths), -1).mean(1)))]
    rates = rates ** (1.0 if best is None else best)
    return Found(tuple(bases), rates, errors, best, paths[best], passes=4 + len(places) + len(allocations))


def _suits(adapter: Adapter, widths: Sequence[int], shards: int) -> bool:
    """Whether a trained adapter's own path is one that these arguments might find."""
    before = adapter.config.made.get("search", {})
    same = (list(widths), shards) == (before.get("widths", [16, 0]), before.get("shards", 1))
    return adapter.config.basis == TRAINED and same


def spared(shape: CacheShape, place: tuple[int, int] | None) -> Allocation:
    """Everything at `PROBE_WIDTH` bits, but the side `place` = (layer, side) at 16."""
    full, low = ((bits,) * shape.num_blocks for bits in (16, PROBE_WIDTH))

    def width(layer: int, side: int) -> BlockWidths:
        return full if place == (layer, side) else low

    groups = [(width(layer, KEY), width(layer, VALUE)) for layer in range(shape.num_layers)]
    return Allocation(shape, tuple((group,) * shape.num_groups for group in groups))


def smallest_above(path: AllocationPath, budget: float) -> Allocation:
    """The allocation at a budget, or where the path ends above it, the last one."""
    try:
        return path.replay(budget)
    except ValueError:
        return path.smallest()
