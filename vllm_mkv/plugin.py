# SPDX-License-Identifier: Apache-2.0
"""Entry point that vLLM calls in every one of its processes."""

from __future__ import annotations

import logging
import sys


def register() -> None:
    """Makes `--attention-backend mkv` known to vLLM. Idempotent; costs next to nothing and changes nothing without it.

    Never raises: vLLM calls this at every start on the machine, whether MKV is asked for or not.
    """
    try:
        from vllm_mkv.serving import compat

        compat.register_backend()
    except Exception as error:
        wanted = any(argument.lower() in ("mkv", "--attention-backend=mkv") for argument in sys.argv)
        logging.getLogger("vllm.mkv").log(
            logging.ERROR if wanted else logging.DEBUG,
            "vllm-mkv cannot run in this vLLM (%s: %s); it supports vLLM 0.32 and 0.33",
            type(error).__name__,
            error,
        )
