# SPDX-License-Identifier: Apache-2.0
"""What each idea behind the tiers gives: KL at equal bytes per token, with one thing changed at a time.

    python examples/compare_tiers.py MODEL --text BOOKS_FOLDER --valid-text HELD_OUT --budgets 0.156 0.094

Bases, probes and paths are made from the one text and measured on the other, through transformers. A change that costs
or saves bytes per token is given fewer or more coordinates for it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mkv_kernels.codes import (
    LARGEST_SCALE,
    LEAST_SCALE,
    MEAN_SQUARED_ERRORS,
    STEPS,
    round_trip,
    scale_codes,
    scale_values,
)
from mkv_kernels.layout import BLOCK, SCALE_BYTES, WIDTHS, BlockWidths, side_bytes
from vllm_mkv.adapter import Adapter, LayerBases
from vllm_mkv.allocation import Allocation, AllocationPath, CacheShape
from vllm_mkv.evaluation.rivals import gaussian_levels
from vllm_mkv.fit.bases import hadamard
from vllm_mkv.fit.calibrate import fit_bases, new_adapter
from vllm_mkv.fit.data import token_windows
from vllm_mkv.fit.model import Source, choose_group_heads
from vllm_mkv.fit.path import least_damage_path
from vllm_mkv.fit.quality import Cache, measure
from vllm_mkv.fit.search import Found, probe
from vllm_mkv.fit.truncation import Quantiser, Truncation

ITEMSIZE = 2
CODED = (8, 4, 2)


def in_tiers(x: Tensor, widths: BlockWidths, of_tier: Callable[[Tensor, int, Tensor], Tensor]) -> Tensor:
    """Applies `of_tier(coordinates, width, all quantised coordinates)` to every tier of fewer bits than 16."""
    sizes = [BLOCK * widths.count(width) for width in WIDTHS]
    parts = list(x.split(sizes, dim=-1))
    quantised = x[..., sizes[0] : sum(sizes[:4])]
    for i, width in enumerate(WIDTHS):
        if width in CODED and sizes[i]:
            parts[i] = of_tier(parts[i], width, quantised)
    parts[4] = torch.zeros_like(parts[4])
    return torch.cat(parts, dim=-1)


def token_scales(x: Tensor) -> Tensor:
    return scale_values(scale_codes(x)).to(x.dtype)[..., None]


GAUSSIAN_STEPS = {8: 0.030762, 4: 0.335201, 2: 0.995687}


def uniform_codes(y: Tensor, width: int, steps: dict[int, float] = STEPS) -> Tensor:
    half = 1 << (width - 1)
    return (torch.floor(y / steps[width]).clamp(-half, half - 1) + 0.5) * steps[width]


def gaussian_steps(x: Tensor, widths: BlockWidths) -> Tensor:
    def of_tier(part: Tensor, width: int, quantised: Tensor) -> Tensor:
        scale = token_scales(quantised)
        return uniform_codes(part / scale, width, GAUSSIAN_STEPS) * scale

    return in_tiers(x, widths, of_tier)


def no_scale(x: Tensor, widths: BlockWidths) -> Tensor:
    return in_tiers(x, widths, lambda part, width, _: uniform_codes(part, width))


def scale_per_tier(x: Tensor, widths: BlockWidths) -> Tensor:
    def of_tier(part: Tensor, width: int, _: Tensor) -> Tensor:
        scale = token_scales(part)
        return uniform_codes(part / scale, width) * scale

    return in_tiers(x, widths, of_tier)


def scale_of_16_bits(x: Tensor, widths: BlockWidths) -> Tensor:
    """float16"""

    def of_tier(part: Tensor, width: int, quantised: Tensor) -> Tensor:
        scale = quantised.square().mean(-1).sqrt().clamp(LEAST_SCALE, LARGEST_SCALE).half().to(part.dtype)[..., None]
        return uniform_codes(part / scale, width) * scale

    return in_tiers(x, widths, of_tier)


def lloyd_max_codes(x: Tensor, widths: BlockWidths) -> Tensor:
    def of_tier(part: Tensor, width: int, quantised: Tensor) -> Tensor:
        scale = token_scales(quantised)
        if width == 8:
            return uniform_codes(part / scale, width) * scale
        levels = gaussian_levels(width).to(part)
        return levels[torch.bucketize(part / scale, (levels[1:] + levels[:-1]) / 2)] * scale

    return in_tiers(x, widths, of_tier)


def without_hadamard(bases: LayerBases) -> LayerBases:
    """Whitened coordinates themselves: the Hadamard matrix is its own inverse."""
    turn = np.kron(np.eye(bases.A.shape[-1] // BLOCK), hadamard(BLOCK).numpy()).astype(np.float32)
    return replace(bases, A=bases.A @ turn, B=bases.B @ turn, C=bases.C @ turn, D=turn @ bases.D)


def without_whitening(bases: LayerBases) -> LayerBases:
    """Every coordinate as large as its column of the down-basis makes it, rotated within its block all the same."""
    plain = without_hadamard(bases)
    n = plain.A.shape[-1]
    turn = np.kron(np.eye(n // BLOCK), hadamard(BLOCK).numpy()).astype(np.float32)

    def unscaled(down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Columns of equal weight in both matrices, as the query-weighted pair has them before it is whitened.
        ratio = np.sqrt(np.linalg.norm(up, axis=1) / np.linalg.norm(down, axis=1))[:, None]
        return down * ratio @ turn, up / ratio @ turn

    A, B = unscaled(plain.A, plain.B)
    C, D = unscaled(plain.C, plain.D.swapaxes(-1, -2))
    return replace(bases, A=A, B=B, C=C, D=np.ascontiguousarray(D.swapaxes(-1, -2)))


def blocks_of_32(shape: CacheShape, damage: np.ndarray) -> AllocationPath:
    """Two neighbouring blocks of 16 always have the same width."""
    halved = replace(shape, group_width=shape.group_width // 2)
    path = least_damage_path(halved, damage.reshape(*damage.shape[:3], -1, 2, len(WIDTHS)).sum(-2), WIDTHS)
    steps = [(*where, 2 * block + i, width) for *where, block, width in path.steps.tolist() for i in (1, 0)]
    return AllocationPath(shape, np.array(steps, dtype=np.int32))


def exact_allocation(shape: CacheShape, damage: np.ndarray, affordable: float) -> Allocation:
    """The least damage whose bytes fit, up to the convex hull: one price of a byte for all, found by bisection."""
    low, high = 1e-12, 1e3
    while high / low > 1 + 1e-6:
        price = (low * high) ** 0.5
        found = _at_price(shape, damage, price)
        low, high = (low, price) if _dense_bytes(found) <= affordable else (price, high)
    return _at_price(shape, damage, high)


def _at_price(shape: CacheShape, damage: np.ndarray, price: float) -> Allocation:
    def best(blocks: list[list[float]]) -> BlockWidths:
        """Over all ways to cut a side into its tiers, by dynamic programming over blocks and widths."""
        heads: dict[int, tuple[float, BlockWidths]] = {WIDTHS[0]: (0.0, ())}
        for costs in blocks:
            grown: dict[int, tuple[float, BlockWidths]] = {}
            for width, cost in zip(WIDTHS, costs, strict=True):
                total, widths = min(heads[before] for before in heads if before >= width)
                byte_count = BLOCK * (8 * ITEMSIZE if width == 16 else width) / 8
                grown[width] = (total + cost + price * byte_count, (*widths, width))
            heads = grown
        return min(heads.values())[1]

    return Allocation(
        shape,
        tuple(tuple((best(group[0].tolist()), best(group[1].tolist())) for group in layer) for layer in damage),
    )


def _dense_bytes(allocation: Allocation) -> int:
    return sum(side_bytes(side, ITEMSIZE) for layer in allocation.widths for group in layer for side in group)


def _scales(allocation: Allocation) -> int:
    return sum(any(w in CODED for w in side) for layer in allocation.widths for group in layer for side in group)


def _coded_tiers(allocation: Allocation) -> int:
    return sum(len({*side} & {*CODED}) for layer in allocation.widths for group in layer for side in group)


def same(value: Any) -> Any:
    return value


def of_gaussians(found: Found) -> np.ndarray:
    """What blocks would cost if errors of theirs were those of unit Gaussians."""
    return found.damage[..., -1:] * np.array([MEAN_SQUARED_ERRORS[width] for width in WIDTHS])


def as_measured(found: Found) -> Found:
    return replace(found, rates=found.rates ** (1 / (found.exponent or 1)))


def greedy(shape: CacheShape, found: Found) -> AllocationPath:
    return least_damage_path(shape, found.damage, WIDTHS)


@dataclass(frozen=True)
class Variant:
    name: str
    group_heads: int | None = None
    basis: str = "query"
    bases: Callable[[LayerBases], LayerBases] = same
    quantiser: Quantiser = round_trip
    path: Callable[[CacheShape, Found], AllocationPath] = greedy
    exact: bool = False
    extra_bytes: Callable[[Allocation], int] = lambda _: 0
    """Per token, beside what the page layout counts."""


VARIANTS = (
    Variant("as served: all heads, query, whitened, Hadamard, 8-bit scale, rates, blocks of 16, uniform codes, greedy"),
    Variant("J = 1", group_heads=1),
    Variant("basis pca", basis="pca"),
    Variant("no whitening", bases=without_whitening),
    Variant("no Hadamard", bases=without_hadamard),
    Variant("no token scale", quantiser=no_scale, extra_bytes=lambda a: -SCALE_BYTES * _scales(a)),
    Variant(
        "a scale per tier",
        quantiser=scale_per_tier,
        extra_bytes=lambda a: SCALE_BYTES * (_coded_tiers(a) - _scales(a)),
    ),
    Variant("scale of 16 bits", quantiser=scale_of_16_bits, extra_bytes=lambda a: (2 - SCALE_BYTES) * _scales(a)),
    Variant("no exchange rates", path=lambda s, f: least_damage_path(s, f.errors, WIDTHS)),
    Variant("errors of a Gaussian", path=lambda s, f: least_damage_path(s, of_gaussians(f), WIDTHS)),
    Variant("rates as measured", path=lambda s, f: least_damage_path(s, as_measured(f).damage, WIDTHS)),
    Variant("steps of a Gaussian", quantiser=gaussian_steps),
    Variant("blocks of 32", path=lambda s, f: blocks_of_32(s, f.damage)),
    Variant("Lloyd-Max codes", quantiser=lloyd_max_codes),
    Variant("exact allocation", exact=True),
)


def fitting(variant: Variant, path: AllocationPath, damage: np.ndarray, budget: float) -> tuple[Allocation, int]:
    """The allocation of a variant at a budget, and its bytes per token."""
    stock = path.shape.stock_bytes_per_token(ITEMSIZE)
    # What a variant saves is spent, and what it costs is saved, elsewhere.
    for asked in budget * np.linspace(1.3, 0.7, 121):
        allocation = exact_allocation(path.shape, damage, asked * stock) if variant.exact else path.replay(float(asked))
        used = allocation.bytes_per_token(block_size=16, itemsize=ITEMSIZE) + variant.extra_bytes(allocation)
        if used <= budget * stock:
            return allocation, used
    raise SystemExit(f"{variant.name}: nothing fits budget {budget}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", nargs="+", required=True, help="to fit and probe on")
    parser.add_argument("--valid-text", nargs="+", required=True, help="to measure on")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.156, 0.094])
    parser.add_argument("--windows", type=int, default=200, help="to fit bases on (default: 200)")
    parser.add_argument("--probe-windows", type=int, default=64, help="to probe on (default: 64)")
    parser.add_argument("--valid-windows", type=int, default=128, help="to measure on (default: 128)")
    parser.add_argument("--context", type=int, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    source = Source(args.model)
    fingerprint, tokenizer = source.fingerprint, source.tokenizer
    windows, valid = (
        token_windows(text, tokenizer, num_windows=number, context=args.context, seed=args.seed)
        for text, number in ((args.text, args.windows), (args.valid_text, args.valid_windows))
    )
    model = source.load("float32", "auto")
    all_heads = choose_group_heads(fingerprint, None)
    prepared: dict[tuple[str, int], tuple[Adapter, Found]] = {}
    caches, labels = [], []
    for variant in VARIANTS:
        key = (variant.basis, variant.group_heads or all_heads)
        if key not in prepared:
            bases = fit_bases(model, fingerprint, windows, basis=key[0], group_heads=key[1])
            adapter = new_adapter(args.model, fingerprint, bases, basis=key[0], group_heads=key[1])
            prepared[key] = adapter, probe(model, adapter, windows[: args.probe_windows])
        adapter, found = prepared[key]
        path = variant.path(adapter.shape, found)
        changed = replace(adapter, bases=tuple(variant.bases(bases) for bases in found.bases), path=path)
        for budget in args.budgets:
            allocation, used = fitting(variant, path, found.damage, budget)
            caches.append(Cache(variant.name, Truncation(changed, allocation, variant.quantiser), used))
            labels.append(budget)
    rows = measure(model, valid, caches, stock_bytes=adapter.shape.stock_bytes_per_token(ITEMSIZE))
    table = Table(
        title=f"{args.model}, {args.valid_windows} x {args.context} tokens; perplexity {rows[0]['perplexity']:.2f}"
    )
    for column in ("change", "budget", "reached", "perplexity", "KL", "x as served"):
        table.add_column(column, justify="left" if column == "change" else "right")
    served = {label: row["kl"] for label, row in zip(labels, rows[1 : 1 + len(args.budgets)], strict=False)}
    for label, row in zip(labels, rows[1:], strict=True):
        figures = (f"{row['budget']:.4f}", f"{row['perplexity']:.2f}", f"{row['kl']:.4f}")
        table.add_row(row["name"], f"{label:g}", *figures, f"{row['kl'] / served[label]:.2f}")
    Console().print(table)
    print(json.dumps({"torch": torch.__version__, "arguments": vars(args), "rows": rows}))


if __name__ == "__main__":
    main()
