# SPDX-License-Identifier: Apache-2.0
"""`vllm-mkv bench`: what a token of context costs a decode step of the real engine, with stock caches and MKV's."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mkv_kernels.layout import WIDTHS
from vllm_mkv.evaluation.latency import draw_latency, latency_row, refused_row
from vllm_mkv.evaluation.subject import ALLOCATIONS, Subject
from vllm_mkv.evaluation.synthetic import ModelShape, random_adapter
from vllm_mkv.evaluation.timing import Cache, Schedule, Start, Stepper, Timings, time_caches
from vllm_mkv.fit.calibrate import cache_shape, longest_context
from vllm_mkv.fit.model import DTYPES, dtype_name
from vllm_mkv.output import check_drawing, check_file, write_json

KERNELS = ("auto", "triton", "numba", "torch")
BLOCK_SIZE = 16
"""Tokens per page to reckon with before an engine has chosen them."""


def benchmark(
    name: str | None = None,
    *,
    shape: str | None = None,
    adapter: str | None = None,
    budgets: Sequence[float] | None = None,
    allocation: str = "path",
    group_heads: int | None = None,
    widths: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    batch: int = 4,
    output_len: int = 16,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
    dtype: str = "auto",
    eager: bool = False,
    compilation_config: dict[str, Any] | None = None,
    one_at_a_time: bool = False,
    mkv_kernels: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    json_file: str | Path | None = None,
    plot: str | Path | None = None,
) -> dict[str, Any]:
    """Times decode steps of the real engine, and fits a line over the context to each cache's.

    Args:
        name: a model, folder or Hub repository, or the folder of an adapter. A model without one gets a random one.
        shape: `layers,q_heads,kv_heads,head_size,hidden` of a Llama model without content, in place of `name`.
        adapter: of the model that `name` is; None for its folder `mkv`, if there is one.
        budgets: of MKV; None for the adapter's default.
        allocation: "path" or "uniform".
        group_heads, widths: of a random adapter; see `random_adapter`.
        contexts: tokens per request, two at least; None for those of 512, 1024, 2048 and 4096 that the model takes.
        batch: requests at once.
        output_len, repeats, warmup: see `Schedule`.
        seed: of prompts and random bases.
        dtype: to compute in; auto is what the weights are stored in, and bfloat16 for a shape.
        eager: without compilation and CUDA graphs, as always on the CPU.
        compilation_config: of `vllm.LLM`.
        one_at_a_time: start an engine when the one before it is done, as is always done on GPUs. Otherwise all live
            side by side and take turns, so that what else the machine does hits all of them.
        mkv_kernels: the option `kernels` of MKV.
        revision, trust_remote_code: of the model's Hub repository.
        json_file, plot: files to write, whole or not at all.

    Returns:
        What `json_file` holds, as the README explains it.

    Raises:
        ValueError, NotImplementedError: an argument, the adapter or the model cannot be; says why and what to do.
    """
    _check(name, shape, allocation, dtype, mkv_kernels, json_file, plot)
    with tempfile.TemporaryDirectory(prefix="vllm-mkv-") as folder:
        if shape is not None:
            name = f"{folder}/model"
            ModelShape.parse(shape).save(Path(name), "bfloat16" if dtype == "auto" else dtype)
        assert name is not None
        subject = Subject.find(
            name, adapter=adapter, model=None, revision=revision, trust_remote_code=trust_remote_code
        )
        schedule = Schedule.make(
            contexts,
            longest_context(subject.source.config),
            batch=batch,
            output_len=output_len,
            repeats=repeats,
            warmup=warmup,
            seed=seed,
        )
        digest = subject.digest
        subject = with_adapter(subject, Path(folder), group_heads, widths, seed)
        computed = subject.source.dtype if dtype == "auto" else getattr(torch, dtype)
        caches = [
            *stock_caches(subject, computed),
            *mkv_caches(subject, computed, budgets, allocation=allocation, kernels=mkv_kernels),
        ]
        from vllm_mkv.serving.stepper import hardware, on_cpu

        interleaved = on_cpu() and not one_at_a_time
        start = engine_start(
            subject, schedule, computed, dummy_weights=shape is not None, eager=eager, compilation=compilation_config
        )
        timings = time_caches(schedule, caches, start, interleaved=interleaved)
        found = {
            "model": f"shape {shape}" if shape else subject.source.name,
            "adapter_digest": digest,
            "hardware": hardware(),
            "dtype": dtype_name(computed),
            "batch": batch,
            "output_len": output_len,
            "repeats": repeats,
            "interleaved": interleaved,
            "contexts": list(schedule.contexts),
            "rows": latency_rows(caches, timings, batch),
        }
    if json_file is not None:
        write_json(json_file, found)
    if plot is not None:
        draw_latency(found, plot)
    return found


def _check(
    name: str | None,
    shape: str | None,
    allocation: str,
    dtype: str,
    mkv_kernels: str,
    json_file: str | Path | None,
    plot: str | Path | None,
) -> None:
    """Raises ValueError for arguments that cannot be, or not together."""
    if (name is None) == (shape is None):
        raise ValueError("give either MODEL or --shape layers,q_heads,kv_heads,head_size,hidden")
    for value, known in ((allocation, ALLOCATIONS), (dtype, DTYPES), (mkv_kernels, KERNELS)):
        if value not in known:
            raise ValueError(f"{value!r} is not one of {', '.join(known)}")
    if json_file is not None:
        check_file(json_file)
    if plot is not None:
        check_drawing(plot)
    if find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed, and is what is timed; pip install '.[cuda]' or '.[cpu]' in a clone of vllm-mkv"
        )


def with_adapter(
    subject: Subject, folder: Path, group_heads: int | None, widths: Sequence[int] | None, seed: int
) -> Subject:
    """The subject with an adapter, which is a random one in `folder` where it has none.

    Raises:
        ValueError: a random adapter is described and there is another, or it cannot be made.
    """
    if subject.adapter is None:
        source, widths = subject.source, WIDTHS if widths is None else widths
        made = random_adapter(source.name, source.fingerprint, group_heads=group_heads, widths=widths, seed=seed)
        made.save(folder / "mkv", "Random bases, to measure speed with.\n")
        return replace(subject, folder=folder / "mkv", adapter=made)
    if group_heads is not None or widths is not None:
        raise ValueError(
            f"--group-heads and --widths are of a random adapter, and there is one in {subject.folder}; leave them out"
        )
    return subject


def stock_caches(subject: Subject, dtype: torch.dtype) -> list[Cache]:
    """vLLM's own, in the dtype that is computed in and in fp8."""
    shape = cache_shape(subject.source.fingerprint, 1)
    own, fp8 = (shape.stock_bytes_per_token(itemsize) for itemsize in (dtype.itemsize, 1))
    return [
        Cache("stock", lambda block_size: own, {}),
        Cache("fp8", lambda block_size: fp8, {"kv_cache_dtype": "fp8"}, may_be_refused=True),
    ]


def mkv_caches(
    subject: Subject, dtype: torch.dtype, budgets: Sequence[float] | None, *, allocation: str, kernels: str
) -> list[Cache]:
    """MKV at budgets; None is for the adapter's default. Raises ValueError where one is out of reach."""
    assert subject.adapter is not None
    path = subject.path(allocation)
    caches = []
    for budget in [subject.adapter.config.default_budget] if budgets is None else budgets:

        def bytes_per_token(block_size: int, budget: float = budget) -> int:
            found = path.replay(budget, block_size=block_size, itemsize=dtype.itemsize)
            return found.bytes_per_token(block_size=block_size, itemsize=dtype.itemsize)

        bytes_per_token(BLOCK_SIZE)
        options = {"adapter": str(subject.folder), "budget": budget, "allocation": allocation, "kernels": kernels}
        caches.append(Cache("mkv", bytes_per_token, {"mkv": options}))
    return caches


def engine_start(
    subject: Subject,
    schedule: Schedule,
    dtype: torch.dtype,
    *,
    dummy_weights: bool,
    eager: bool,
    compilation: dict[str, Any] | None,
) -> Start:
    """Starts the real engine."""
    source = subject.source

    def start(cache: Cache) -> AbstractContextManager[Stepper]:
        from vllm_mkv.serving.stepper import running_stepper

        return running_stepper(
            source.name,
            dtype=dtype_name(dtype),
            max_model_len=max(map(schedule.longest, schedule.contexts)),
            tokens_per_step=schedule.tokens_per_step,
            batch=schedule.batch,
            cache_bytes_per_token=cache.bytes_per_token(BLOCK_SIZE),
            eager=eager,
            compilation_config=compilation,
            dummy_weights=dummy_weights,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            **cache.settings,
        )

    return start


def latency_rows(caches: Sequence[Cache], timings: Sequence[Timings], batch: int) -> list[dict[str, Any]]:
    """One of each cache, the stock one first."""
    stock_bytes, stock = caches[0].bytes_per_token(BLOCK_SIZE), None
    rows = []
    for cache, timed in zip(caches, timings, strict=True):
        used = cache.bytes_per_token(timed.block_size or BLOCK_SIZE)
        named = {"name": cache.name, "budget": used / stock_bytes, "bytes_per_token": used}
        if timed.refused is not None:
            rows.append(refused_row(named, timed.refused))
            continue
        row, line = latency_row(named, batch, timed.windows, stock)
        stock = stock or line
        rows.append(row)
    return rows
