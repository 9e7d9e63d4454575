# SPDX-License-Identifier: Apache-2.0
"""Has launchers compile their kernels for a GPU that is not there, and run the PTX of those on the CPU (see `ptx`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def install(arch: str, *, eager: bool) -> None:
    """From now on, launches do so.

    What multiplies with D is not run but computed here, for it takes several warps and products of float32.
    """
    sys.path[:0] = [str(ROOT / "kernels"), str(Path(__file__).parent)]
    from compile_check import CompileOnly
    from ptx import Kernel
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from mkv_kernels.fused import combine, decode

    driver.set_active(CompileOnly(arch))
    run, ready = JITFunction.run, dict[int, tuple[Any, Kernel]]()

    def run_ptx(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if warmup:
            return compiled
        if id(compiled) not in ready:
            ready[id(compiled)] = compiled, Kernel(compiled.asm["ptx"])
        bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
        signature = compiled.src.signature
        arguments = [bound[name] for name, kind in signature.items() if kind != "constexpr"]
        # Two more are scratch memory that our kernels ask none of.
        metadata = compiled.metadata
        ready[id(compiled)][1].run(grid, [*arguments, 0, 0], metadata.num_warps, metadata.shared, eager=eager)
        return compiled

    def combined(partial: torch.Tensor, stats: torch.Tensor, table: Any, num_splits: int, output: torch.Tensor) -> None:
        if table.value_up is None:
            combine.combine(partial, stats, table, num_splits, output)
        else:
            combine_on_cpu(partial, stats, table, num_splits, output)

    JITFunction.run = run_ptx
    decode.combine = combined


def combine_on_cpu(
    partial: torch.Tensor, stats: torch.Tensor, table: Any, num_splits: int, output: torch.Tensor
) -> None:
    """What `combine` does where D is not folded, in float64."""
    work, (T, H, d), G = table.work[num_splits], output.shape, table.num_groups
    P, heads = len(work.programs), H // table.num_groups
    stats = stats[: T * P * heads * 2].view(T, P, heads, 2).double()
    partial = partial[: T * P * heads * table.rank_v].view(T, P, heads, table.rank_v).double()
    found = output.view(T, G, table.group_heads, -1, d)
    for first in range(0, P, num_splits):
        group, count = int(work.programs[first, 0]), num_splits
        rank = table.layout.groups[group].value.rank
        m, total = stats[:, first : first + count].unbind(-1)
        largest = m.amax(1, keepdim=True)
        weights = torch.where(m > -torch.inf, torch.exp2(m - largest), 0)
        o = torch.where(m[..., None] > -torch.inf, partial[:, first : first + count, :, :rank], 0)
        o = (o * weights[..., None]).sum(1) / (torch.where(weights > 0, total, 0) * weights).sum(1)[..., None]
        for head in range(table.group_heads):
            rows = o.view(T, table.group_heads, heads // table.group_heads, rank)[:, head]
            up = table.value_up[group, head, :rank].double()
            found[:, group, head] = (rows @ up + table.value_mean[group, head].double()).to(output.dtype)
