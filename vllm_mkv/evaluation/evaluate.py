# SPDX-License-Identifier: Apache-2.0
"""`vllm-mkv eval`: a model's quality at several budgets of its adapter, beside other caches at their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from vllm_mkv.evaluation.curve import draw_curve, title
from vllm_mkv.evaluation.engine import check_engine, measure_engine
from vllm_mkv.evaluation.rivals import rival_caches
from vllm_mkv.evaluation.subject import ALLOCATIONS, Subject
from vllm_mkv.fit.calibrate import choose_context
from vllm_mkv.fit.data import token_windows
from vllm_mkv.fit.model import DTYPES
from vllm_mkv.fit.quality import measure, projected_caches
from vllm_mkv.output import check_drawing, check_file, write_json

ENGINES = ("transformers", "vllm")
DEFAULT_WINDOWS = 64


def evaluate(
    name: str,
    text: Sequence[str],
    *,
    budgets: Sequence[float] | None = None,
    against: Sequence[str] = (),
    engine: str = "transformers",
    adapter: str | None = None,
    model: str | None = None,
    allocation: str = "path",
    num_windows: int = DEFAULT_WINDOWS,
    context: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    json_file: str | Path | None = None,
    plot: str | Path | None = None,
) -> dict[str, Any]:
    """Measures perplexity, KL divergence from the full model and share of equal most likely tokens.

    Args:
        name, adapter, model: see `Subject.find`.
        text: files, folders or datasets; see `vllm_mkv.fit.data.token_windows`. Not what the adapter was fitted on.
        budgets: of the adapter; None for its default budget, or none where there is no adapter.
        against: names of `vllm_mkv.evaluation.rivals.RIVALS`.
        engine: "transformers", or "vllm" for the real engine.
        allocation: "path" or "uniform".
        num_windows, context, seed: how many windows of how many tokens, and of their choice.
        dtype: to compute in. Bytes and budgets are those of the model's own dtype, whatever it is.
        device: of transformers.
        revision, trust_remote_code: of the model's Hub repository.
        json_file, plot: files to write, whole or not at all.

    Returns:
        {"model", "adapter_digest", "tokens", "context", "rows"}, which is also what `json_file` holds: the model's
        name; the adapter's digest or None; tokens of text read, of which each window's first is not predicted; tokens
        per window; and rows {"name", "budget", "bytes_per_token", "perplexity", "kl", "top1"}: of the full model, named
        "stock", of the adapter at each budget, named "mkv", and of the other caches. `budget` is the one reached, a
        share of the full model's bytes per token; `kl` is in nats per token; `top1` is a share.

    Raises:
        ValueError: an argument, the adapter or the text is wrong; says which and what to do.
        NotImplementedError: the model's attention is of a kind that is not supported; names it.
    """
    _check(engine, allocation, against, num_windows, dtype, device)
    if json_file is not None:
        check_file(json_file)
    if plot is not None:
        check_drawing(plot)
    subject = Subject.find(name, adapter=adapter, model=model, revision=revision, trust_remote_code=trust_remote_code)
    source = subject.source
    if budgets is None:
        budgets = [subject.adapter.config.default_budget] if subject.adapter else []
    rivals = rival_caches(against, source.fingerprint)
    allocations = subject.allocations(budgets, allocation)
    if plot is not None and not allocations and not rivals:
        raise ValueError("there is nothing to draw beside the full model; give --budgets or --against")
    context = choose_context(source.config, context)
    windows = token_windows(text, source.tokenizer, num_windows=num_windows, context=context, seed=seed)
    if engine == "vllm":
        rows = measure_engine(subject, windows, allocations, allocation, dtype)
    else:
        network = source.load(dtype, device)
        ours = projected_caches(subject.adapter, allocations, source.itemsize) if subject.adapter else []
        rows = measure(network, windows, [*ours, *rivals], stock_bytes=subject.stock_bytes)
    found = {
        "model": source.name,
        "adapter_digest": subject.digest,
        "tokens": windows.size,
        "context": context,
        "rows": rows,
    }
    if json_file is not None:
        write_json(json_file, found)
    if plot is not None:
        draw_curve(found, plot)
    return found


def _check(engine: str, allocation: str, against: Sequence[str], num_windows: int, dtype: str, device: str) -> None:
    """Raises ValueError for arguments that cannot be, or not together."""
    for value, known in ((engine, ENGINES), (allocation, ALLOCATIONS), (dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{value!r} is not one of {', '.join(known)}")
    if num_windows < 1:
        raise ValueError(f"{num_windows} windows leave nothing to measure on; use at least 1 (--windows)")
    if engine == "vllm":
        if against:
            raise ValueError(
                "other caches are measured through transformers: leave --against out, or use --engine transformers"
            )
        if device != "auto":
            raise ValueError(f"vLLM computes on the device it was built for; leave --device {device} out")
        check_engine()


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """What `evaluate` returns, the full model first."""
    stock = evaluation["rows"][0]["bytes_per_token"]
    table = Table(title=escape(title(evaluation)))
    table.add_column("cache", no_wrap=True)
    for column in ("budget", "x smaller", "bytes per token", "perplexity", "KL", "same top token"):
        table.add_column(column, justify="right", no_wrap=column == "perplexity")
    for row in evaluation["rows"]:
        used = row["bytes_per_token"]
        table.add_row(
            row["name"],
            f"{row['budget']:.4f}",
            f"{stock / used:.2f}",
            f"{used:,}",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.1%}",
        )
    return table
