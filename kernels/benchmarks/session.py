# SPDX-License-Identifier: Apache-2.0
"""One run of a benchmark: its options, what it may still use of time and memory, its rows, and how it ends."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import GEOMETRIES, GROUP_HEADS, RANKS, TIERS, Spec, all_specs, quick_specs
from benchmarks.layer import Setting
from benchmarks.report import Row, add_ratios, document, plot, print_table, to_json
from benchmarks.timing import copy_bandwidth, measure

QUICK_SECONDS = 165
"""Of the quick subset, the start and the bandwidth aside: what is left then is named, not measured."""
MEMORY_SHARE = 0.9
NO_KERNELS = "Triton kernels need a GPU (its interpreter is never timed)"


class CheckFailed(Exception):
    """A kernel does not do what its twin does."""


def parser_of(description: str | None, peers: Iterable[str], *, graph: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    subset = parser.add_mutually_exclusive_group()
    subset.add_argument("--quick", action="store_true", help="a subset of less than three minutes on a GPU (default)")
    subset.add_argument("--full", action="store_true", help="all shapes, both models, every budget with every J")
    add("--model", nargs="+", choices=GEOMETRIES, help="default: the first; with --full, all")
    add("--ranks", type=float, nargs="*", help=f"budgets by ranks, of {RANKS} by default")
    add("--tiers", type=float, nargs="*", help=f"budgets by tiers, of {TIERS} by default")
    add("--group-heads", type=int, nargs="+", help=f"J, of {GROUP_HEADS} by default")
    add("--peers", nargs="*", choices=list(peers), default=list(peers), help="nothing behind it: none")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--block-size", type=int, default=16)
    add("--unfolded", action="store_true", help="the kernels multiply with C and D, the model's weights do not")
    add("--graph", action=argparse.BooleanOptionalAction, default=graph, help="on CUDA, time replays of a CUDA graph")
    add("--limit-s", type=float, help=f"start no measurement after so long; {QUICK_SECONDS} for the quick subset")
    add("--rep-ms", type=int, default=100, help="of every measurement on CUDA")
    add("--seed", type=int, default=0)
    add("--plot", type=Path, metavar="FILE.png")
    add("--json", type=Path, metavar="FILE")
    return parser


class Session:
    def __init__(self, script: Path, args: argparse.Namespace) -> None:
        self.script, self.args, self.rows = script.name, args, list[Row]()
        self.device = torch.device(args.device)
        if self.on_cuda and not torch.cuda.is_available():
            raise SystemExit("error: torch sees no CUDA device; use --device cpu for the PyTorch twins")
        self.absent: dict[str, str] = {}
        self.bandwidth = copy_bandwidth(self.device, args.rep_ms)
        self.release()
        limit = args.limit_s if args.limit_s is not None else None if args.full else QUICK_SECONDS
        self.deadline = None if limit is None else time.monotonic() + limit

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def settings(self) -> list[Setting]:
        names = self.args.model or (list(GEOMETRIES) if self.args.full else list(GEOMETRIES)[:1])
        dtype = getattr(torch, self.args.dtype)
        common: dict[str, Any] = {"block_size": self.args.block_size, "folded": not self.args.unfolded}
        return [Setting(GEOMETRIES[name], self.device, dtype, seed=self.args.seed, **common) for name in names]

    @property
    def specs(self) -> list[Spec]:
        chosen = (self.args.ranks, self.args.tiers, self.args.group_heads)
        if chosen == (None, None, None):
            if self.args.full:
                return all_specs(RANKS, TIERS, GROUP_HEADS)
            return quick_specs() if self.on_cuda else all_specs(RANKS[1:2], TIERS[1:2], GROUP_HEADS)
        ranks, tiers, group_heads = chosen
        if ranks is None and tiers is None:
            ranks, tiers = RANKS, TIERS
        return all_specs(ranks or (), tiers or (), group_heads or GROUP_HEADS)

    def release(self) -> None:
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()

    def attempt(self, row: Row, needed: int, work: Callable[[Row], None]) -> None:
        """Adds the row, with what `work` measures or with the reason why there is nothing."""
        self.rows.append(row)
        try:
            self.release()
            free = free_memory(self.device)
            if self.deadline is not None and time.monotonic() > self.deadline:
                row.status, row.note = "skipped", "the time limit was reached (--limit-s)"
            elif needed > MEMORY_SHARE * free:
                row.status, row.note = "skipped", f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            else:
                work(row)
                row.status = "timed"
        except torch.OutOfMemoryError as error:
            # Of a peer, nobody knows what it needs; of our own kernels, it was said before.
            row.status, row.note = "failed" if row.own else "skipped", f"out of memory: {error}"
        except ImportError as error:
            row.status, row.note = "failed" if row.own else "absent", f"{type(error).__name__}: {error}"
        # Whatever a peer raises is the peer's row, and of the others' there is no list. After an error of the device,
        # all calls to it fail, these too: what was measured before is told.
        except Exception as error:
            row.status, row.note = "failed", f"{type(error).__name__}: {error}"
        row.derive(self.bandwidth)
        took = "" if row.times is None else f"{row.times.median:.1f} µs"
        note = " ".join(row.note.split())[:200]
        print(row.kernel, row.cache, *row.shape, row.status, took or note, file=sys.stderr, flush=True)

    def attempt_peer(self, row: Row, on_cpu: bool, needed: int, work: Callable[[Row], None]) -> None:
        """One row where a peer cannot run at all, whatever the shape."""
        name = row.kernel
        if name not in self.args.peers or name in self.absent:
            return
        if not self.on_cuda and not on_cpu:
            row.status, row.note = "absent", "runs on GPUs only"
            self.rows.append(row)
        else:
            self.attempt(row, needed, work)
        if row.status == "absent":
            self.absent[name] = row.note

    def time(self, row: Row, run: Callable[[], Any]) -> None:
        row.graph = self.args.graph and self.on_cuda
        row.times = measure(run, self.device, graph=row.graph, rep_ms=self.args.rep_ms)

    def run(self, measure: Callable[[], None]) -> int:
        """Measures and prints everything, what was measured before an interruption too; the exit status."""
        ended = ""
        try:
            measure()
        except KeyboardInterrupt:
            ended = "interrupted"
        except Exception as error:
            traceback.print_exc()
            ended = f"{type(error).__name__}: {error}"
        status = self.finish()
        if ended:
            print(f"FAILED: ended before its time: {ended}", file=sys.stderr)
        return 1 if ended else status

    def finish(self) -> int:
        """Prints everything; the exit status: 1 where one of the project's own kernels failed, or none was timed."""
        add_ratios(self.rows)
        result = document(self.script, self.device, self.bandwidth, self.rows)
        title = f"{result['hardware']}; copy {self.bandwidth:.0f} GB/s; {self.args.dtype}"
        print_table(title, self.rows)
        if self.args.plot is not None:
            print(plot(f"{self.script}: {title}", self.rows, self.bandwidth, self.args.plot))
        own = [row for row in self.rows if row.own]
        failed = [row for row in own if row.status == "failed"]
        for row in failed:
            print(f"FAILED {row.kernel} {row.cache} {row.shape}: {' '.join(row.note.split())}")
        timed = not own or any(row.status == "timed" for row in own)
        if not timed:
            print("FAILED: none of the project's own kernels was timed; the rows' notes say why")
        line = to_json(result)
        if self.args.json is not None:
            self.args.json.write_text(line + "\n", "utf-8")
        print(line, flush=True)
        return 1 if failed or not timed else 0


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
