# SPDX-License-Identifier: Apache-2.0
"""What a cache does to a model's predictions, measured through the real engine: stock attention first, then MKV."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from tempfile import TemporaryFile, gettempdir
from typing import IO, Any

import numpy as np
import torch

from vllm_mkv.allocation import Allocation, AllocationPath
from vllm_mkv.evaluation.subject import Subject
from vllm_mkv.fit.calibrate import cache_shape
from vllm_mkv.fit.model import Source, dtype_name
from vllm_mkv.fit.quality import Sums, quality_row
from vllm_mkv.progress import progress

BLOCK_SIZE = 16
"""Tokens per page of the MKV engine: those that bytes per token are reckoned with everywhere."""
Scores = Callable[[dict[str, Any] | None], Iterator[np.ndarray]]
"""Options of MKV, or None for stock attention -> float32 [context - 1, vocabulary] of one window after the other."""


@dataclass(frozen=True)
class Served:
    """One start of the engine with MKV."""

    options: dict[str, Any]
    bytes_per_token: int


def check_engine() -> None:
    """Raises ValueError where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ValueError(
            "vLLM is not installed, and --engine vllm needs it; pip install '.[cuda]' or '.[cpu]' in a clone of "
            "vllm-mkv, or measure with --engine transformers"
        )


def engine_budget(path: AllocationPath, allocation: Allocation, itemsize: int) -> float:
    """The budget at which an engine whose numbers take `itemsize` bytes replays `path` to this very allocation.

    Raises:
        ValueError: there is none.
    """
    # A little more than the quotient, which may have been rounded down.
    budget = min(1.0, allocation.budget(block_size=BLOCK_SIZE, itemsize=itemsize) * (1 + 1e-12))
    if path.replay(budget, block_size=BLOCK_SIZE, itemsize=itemsize) != allocation:
        raise ValueError(
            f"an engine whose numbers take {itemsize} bytes has other bytes per token along this adapter's path than "
            "the model's own dtype has; measure in that: --dtype auto"
        )
    return budget


def measure_engine(
    subject: Subject, windows: np.ndarray, allocations: Sequence[Allocation], allocation: str, dtype: str
) -> list[dict[str, Any]]:
    """The rows of `vllm_mkv.fit.quality.measure`, of a subject's model and of its adapter at allocations.

    Args:
        windows: int64 [windows, context].
        allocation: "path" or "uniform": the path that they are of.
        dtype: that the engines compute in; auto is what the weights are stored in.

    Raises:
        ValueError, NotImplementedError: what vLLM or the plugin refuses, with the mend.
    """
    source = subject.source
    computed = source.dtype if dtype == "auto" else getattr(torch, dtype)
    starts = []
    for found in allocations:
        budget = engine_budget(subject.path(allocation), found, computed.itemsize)
        options = {"adapter": str(subject.folder), "allocation": allocation, "budget": budget}
        starts.append(Served(options, found.bytes_per_token(block_size=BLOCK_SIZE, itemsize=source.itemsize)))
    scores = engine_scores(source, windows, computed)
    return measure_served(windows, scores, starts, stock_bytes=subject.stock_bytes)


def engine_scores(source: Source, windows: np.ndarray, dtype: torch.dtype) -> Scores:
    """Log-probabilities of the windows from engines that compute in `dtype`."""
    shape = cache_shape(source.fingerprint, 1)

    def scores(mkv: dict[str, Any] | None) -> Iterator[np.ndarray]:
        from vllm_mkv.serving.score import log_probabilities

        return log_probabilities(
            source.name,
            windows,
            dtype=dtype_name(dtype),
            cache_bytes_per_token=shape.stock_bytes_per_token(dtype.itemsize),
            mkv=mkv,
            block_size=None if mkv is None else BLOCK_SIZE,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )

    return scores


def measure_served(
    windows: np.ndarray, scores: Scores, starts: Sequence[Served], *, stock_bytes: int
) -> list[dict[str, Any]]:
    """The rows of `vllm_mkv.fit.quality.measure`, of stock attention and then of every start of the engine.

    Stock log-probabilities are kept in a file without a name, so that memory does not grow and nothing is left behind.

    Raises:
        ValueError: the temporary folder has too little room for them, or they are not finite.
    """
    rows = []
    count = 1 + len(starts)
    what = f"engines measured on {len(windows)} windows: {count}"
    with TemporaryFile() as file, progress(what, total=count * len(windows), unit="window") as bar:
        kept = np.empty(0)
        for start in (None, *starts):
            total = Sums()
            with closing(scores(start.options if start else None)) as found:  # type: ignore[type-var]
                for index, log_p in enumerate(found):
                    if start is None and starts:
                        kept = kept if len(kept) else array_in(file, (len(windows), *log_p.shape))
                        kept[index] = log_p
                    full = log_p if start is None else np.array(kept[index])
                    total.add(*map(torch.from_numpy, (full, log_p, windows[index, 1:])))
                    bar.update()
            name, used = ("mkv", start.bytes_per_token) if start else ("stock", stock_bytes)
            rows.append(quality_row(name, used, stock_bytes, total))
    return rows


def array_in(file: IO[bytes], shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array in a file. Raises ValueError where the disk has too little room for it."""
    size = 4 * math.prod(shape)
    try:
        # All of it now: a disk that fills up later would end the process without a word.
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise ValueError(
            f"{gettempdir()} has no room for the full model's log-probabilities, {size / 2**30:.1f} GiB "
            f"({error.strerror}); use fewer --windows, a shorter --context, or set TMPDIR to a larger disk"
        ) from error
    return np.memmap(file, np.float32, "r+", shape=shape)
