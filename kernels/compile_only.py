# SPDX-License-Identifier: Apache-2.0
"""Compiling kernels for a GPU that is not there, through the launchers that would launch them."""

from __future__ import annotations

import time
from typing import Any

import torch
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


def compiled_by(launch: Any) -> list[tuple[str, Any, float]]:
    """Runs a launcher with every kernel compiled in place of launched: their names, code, and seconds."""
    run, seen = JITFunction.run, []

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen.append((self.fn.__name__.strip("_").removesuffix("_kernel"), kernel, time.perf_counter() - start))
        return kernel

    JITFunction.run = compile_instead
    try:
        launch()
    finally:
        JITFunction.run = run
    return seen
