# SPDX-License-Identifier: Apache-2.0
"""How Python gets to compiled code: C functions that numba keeps, and the threads that run them."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import cfunc, from_dtype, types
from numba.core.registry import cpu_target

from mkv_kernels import codes


def record(*names: str) -> np.dtype:
    """Of int64 numbers."""
    return np.dtype([(name, np.int64) for name in names])


def sources() -> int:
    """Of this folder, and of the quantiser, whose steps and scales are compiled in."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(codes.__file__)]
    return zlib.crc32(b"".join(file.read_bytes() for file in files))


def compile_entry(worker: Callable[[Any], None], step: np.dtype, *variant: int) -> Any:
    """A C function of the address of a record.

    Args:
        variant: what the worker was made for.
    """
    signature = types.void(types.CPointer(from_dtype(step)))
    # numba's cache knows the date of a worker's own file, not what its functions call. And it has one index for all of
    # a name, writes it before what it points to, and locks neither: of two processes, each compiling another variant,
    # one could be given the other's. So no two variants, of no two states of the sources, share a name.
    target = cpu_target.target_context.codegen().magic_tuple()
    worker.__qualname__ += f"_{zlib.crc32(repr((variant, sources(), target)).encode()):08x}"
    try:
        return cfunc(signature, cache=True)(worker)
    except RuntimeError as error:
        # Neither this folder nor the user's cache can be written: every process compiles for itself.
        if "cannot cache function" not in str(error):
            raise
        return cfunc(signature)(worker)


@cache
def parallel() -> Callable[[int, int, int, int], None] | None:
    """The function that starts OpenMP's threads, of the library that PyTorch runs on; None where it has none.

    PyTorch's own threads, bound to cores as vLLM binds them, rather than a second pool beside them.
    """
    try:
        start = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    start.restype = None
    return start


def run_on_threads(worker: Any, step: np.ndarray) -> None:
    """Runs the worker with the record `step` on each of PyTorch's threads, and waits for all."""
    start = parallel()
    assert start is not None
    # All threads, even where tasks are fewer: a team of another size is made anew, and PyTorch's next one again.
    start(worker.address, step.ctypes.data, torch.get_num_threads(), 0)
