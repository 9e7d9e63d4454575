# SPDX-License-Identifier: Apache-2.0
"""Times of a call: on CUDA between events, with the L2 cache flushed before each; on the CPU by the wall clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
LEAST_REPEATS, LEAST_SECONDS = 5, 0.5
"""On the CPU."""


@dataclass(frozen=True)
class Times:
    """Microseconds."""

    median: float
    p20: float
    p80: float


def measure(run: Callable[[], Any], device: torch.device, *, graph: bool = False, rep_ms: int = 100) -> Times:
    """`graph` replays a captured call, so that what is timed is the device and not the launching of kernels."""
    if device.type == "cuda":
        return _on_cuda(_captured(run) if graph else run, rep_ms)
    return _on_cpu(run)


def _on_cuda(run: Callable[[], Any], rep_ms: int) -> Times:
    from triton.testing import do_bench

    median, p20, p80 = do_bench(run, warmup=25, rep=rep_ms, quantiles=[0.5, 0.2, 0.8])
    return Times(1e3 * median, 1e3 * p20, 1e3 * p80)


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    # What a first call compiles or allocates does not belong into a graph.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _on_cpu(run: Callable[[], Any]) -> Times:
    run()
    times: list[float] = []
    while len(times) < LEAST_REPEATS or sum(times) < LEAST_SECONDS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Times(1e6 * statistics.median(times), 1e6 * fifths[0], 1e6 * fifths[-1])


def copy_bandwidth(device: torch.device, rep_ms: int = 100) -> float:
    """GB/s of a copy between two large tensors, bytes read and bytes written counted."""
    size = COPY_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / measure(lambda: target.copy_(source), device, rep_ms=rep_ms).median / 1e3
