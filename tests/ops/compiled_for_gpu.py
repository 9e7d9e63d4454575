# SPDX-License-Identifier: Apache-2.0
"""Has launchers compile their kernels for a GPU that is not there, and run the PTX of those on the CPU (see `ptx`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def install(arch: str) -> None:
    """From now on, launches do so."""
    sys.path[:0] = [str(ROOT / "kernels"), str(Path(__file__).parent)]
    from compile_only import CompileOnly
    from ptx import Kernel
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

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
        ready[id(compiled)][1].run(grid, [*arguments, 0, 0], metadata.num_warps, metadata.shared)
        return compiled

    JITFunction.run = run_ptx
