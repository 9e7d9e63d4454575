# SPDX-License-Identifier: Apache-2.0
"""Compiling kernels ahead of their first launch, through the launchers, which say what they are compiled for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

import triton

_compiled: ContextVar[list[Any] | None] = ContextVar("mkv_compiled", default=None)


def on(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """`kernel[grid]`; inside `compile_ahead`, what compiles the kernel for its arguments and launches nothing."""
    compiled = _compiled.get()
    if compiled is None:
        return kernel[grid]

    def compile_only(*args: Any, **kwargs: Any) -> None:
        compiled.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))

    return compile_only


def compile_ahead(launch_all: Callable[[], None], num_threads: int) -> int:
    """Compiles and loads the kernels that `launch_all` would launch, and launches none; returns how many there are.

    Args:
        num_threads: that compile at once; one where Triton cannot do so, or the GPU's compiler must not.
    """
    asynchronous = getattr(triton, "AsyncCompileMode", None)
    if num_threads > 1 and asynchronous is not None:
        with ThreadPoolExecutor(num_threads) as threads:
            # Triton 3.6 stays in this mode where a kernel does not compile, so it gets a context of its own.
            copy_context().run(_compile_in, asynchronous(threads), launch_all)
    with _compile_only() as compiled:
        launch_all()
    # None where a kernel is interpreted, or its compiler only pretended to.
    kernels = {id(kernel): kernel for kernel in compiled if kernel is not None}
    for kernel in kernels.values():
        # What a launch asks for first: it brings the code to the GPU, and raises where the GPU lacks what it needs.
        _ = kernel.run
    return len(kernels)


@contextmanager
def _compile_only() -> Iterator[list[Any]]:
    compiled: list[Any] = []
    token = _compiled.set(compiled)
    try:
        yield compiled
    finally:
        _compiled.reset(token)


def _compile_in(mode: Any, launch_all: Callable[[], None]) -> None:
    with mode, _compile_only():
        launch_all()
