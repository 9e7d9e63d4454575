# SPDX-License-Identifier: Apache-2.0
"""Compiling kernels for a GPU that is not there, through the launchers that would launch them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from compile_table import key_of
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ARCHITECTURES = ("80", "90", "100", "gfx942")
WARP_SIZE = {"cuda": 32, "hip": 64}


class CompileOnly:
    """Stands in for Triton's driver: there is a device of this architecture, and nothing is ever run on it."""

    def __init__(self, arch: str) -> None:
        backend = backend_of(arch)
        self.target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, WARP_SIZE[backend])
        # Triton keeps what it compiled by the device's number alone.
        self.device = ARCHITECTURES.index(arch)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def backend_of(arch: str) -> str:
    return "cuda" if arch.isdigit() else "hip"


@dataclass
class Compiled:
    """A kernel that was launched.

    key: see `compile_table.key_of`.
    code: what Triton gives; None of a kernel that was known, and so not compiled.
    """

    name: str
    key: str
    code: Any
    seconds: float


class KnownKernel(Exception):
    """Ends a compilation; its argument is the kernel's key."""


def compiled_by(launch: Callable[[], None], arch: str, is_known: Callable[[str], bool] | None = None) -> list[Compiled]:
    """Runs a launcher with every kernel compiled in place of launched; of those with a known key, no more than that."""
    run, seen = JITFunction.run, []

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            code = run(self, *args, grid=grid, warmup=True, **kwargs)
            key = key_of(code.asm["ttir"], arch, code.metadata)
        except KnownKernel as known:
            code, key = None, known.args[0]
        name = self.fn.__name__.strip("_").removesuffix("_kernel")
        seen.append(Compiled(name, key, code, time.perf_counter() - start))
        return code

    def stop_where_known(
        backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
    ) -> tuple[str, str]:
        if stages is not None and is_known is not None:
            lower = stages["ttgir"]

            def lower_unless_known(module: Any, metadata: Any) -> Any:
                key = key_of(str(module), arch, options)
                if is_known(key):
                    raise KnownKernel(key)
                return lower(module, metadata)

            stages["ttgir"] = lower_unless_known
        # What Triton is to tell its cached kernels apart by: nothing, for what is compiled is the same.
        return "", ""

    JITFunction.run = compile_instead
    knobs.runtime.add_stages_inspection_hook = stop_where_known
    try:
        launch()
    finally:
        JITFunction.run = run
        knobs.runtime.add_stages_inspection_hook = None
    return seen
