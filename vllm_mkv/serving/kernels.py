# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve: Triton's on GPUs, those that numba compiles on CPUs, or PyTorch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def choose_kernels(option: str, dtype: torch.dtype) -> str:
    """ "triton", "numba" or "torch", from the option of that name.

    Raises:
        NotImplementedError: Triton or numba is asked for where it cannot run.
    """
    from vllm.platforms import current_platform

    # The platform, not a tensor's device, says what vLLM runs on.
    on_gpu = current_platform.is_cuda_alike()
    if option == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotImplementedError(
            "Triton kernels need a GPU; leave the mkv option kernels at auto, or set TRITON_INTERPRET=1 to debug them"
        )
    if option == "triton" or (option == "auto" and on_gpu):
        return "triton"
    if option == "torch":
        return option
    reason = "they are for CPUs" if on_gpu else without_numba(dtype)
    if option == "numba" and reason:
        raise NotImplementedError(f"numba kernels cannot run: {reason}; leave the mkv option kernels at auto")
    return "torch" if reason else "numba"


def without_numba(dtype: torch.dtype) -> str | None:
    """Why numba's kernels cannot serve this CPU; None where they can."""
    try:
        from mkv_kernels.compiled.decode import unsupported
    except ImportError as error:
        return str(error)
    return unsupported(dtype)
