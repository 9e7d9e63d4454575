# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of given tokens, of the whole vocabulary, from an engine that is started for it in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_mkv.serving import compat

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, which so can start one engine after the other
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or this process would stay bound to the cores of the first engine
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
"""Set where the user has not set them."""
SPARE_TOKENS = 512
"""That the cache has beside a window's own: whole blocks, and the one that vLLM keeps free."""


def log_probabilities(
    model: str,
    windows: np.ndarray,
    *,
    dtype: str,
    cache_bytes_per_token: int,
    mkv: dict[str, Any] | None = None,
    block_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Iterator[np.ndarray]:
    """Starts an engine, yields the log-probabilities of one window after the other, and stops the engine.

    Close the iterator where it is not used up: the engine runs until then.

    Args:
        model: a folder or a Hub repository.
        windows: token ids, int64 [windows, context].
        dtype: that the engine computes in: float32, bfloat16 or float16.
        cache_bytes_per_token: of the model's own cache in that dtype; the engine takes memory for one window.
        mkv: options of the MKV backend; None for vLLM's own attention.
        block_size: tokens per page; None for vLLM's choice.
        revision, trust_remote_code: of the model's Hub repository.

    Yields:
        float32 [context - 1, vocabulary] of every token of a window but the first.

    Raises:
        ValueError, NotImplementedError: what the plugin or vLLM refuses, with the mend.
    """
    context = windows.shape[1]
    settings = measuring_settings(
        model,
        dtype=dtype,
        max_model_len=context,
        max_num_seqs=1,
        max_num_batched_tokens=context,
        cache_bytes=2 * cache_bytes_per_token * (context + SPARE_TOKENS),
        mkv=mkv,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    settings |= {"max_logprobs": -1, "enforce_eager": True}
    if block_size is not None:
        settings["block_size"] = block_size
    with running_engine(settings) as llm, compat.prompt_logprobs_as_arrays():
        from vllm import SamplingParams

        # The last token is predicted, not fed: a model's longest context leaves no room for one more.
        parameters = SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True, detokenize=False
        )
        for window in windows:
            (output,) = llm.generate({"prompt_token_ids": window[:-1].tolist()}, parameters, use_tqdm=False)
            yield all_logprobs(output, llm.model_config.get_vocab_size())


def measuring_settings(
    model: str,
    *,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    cache_bytes: int,
    mkv: dict[str, Any] | None,
    revision: str | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for an engine that is measured: as much cache as is asked for, and no prefix caching.

    Args:
        mkv: options of the MKV backend; None for vLLM's own attention.
    """
    settings: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "tokenizer_revision": revision,
        "trust_remote_code": trust_remote_code,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": cache_bytes,
        "gpu_memory_utilization": 0.01,  # not used, but checked: what is free has to be more
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if mkv is not None:
        settings |= {"attention_backend": "mkv", "additional_config": {"mkv": mkv}}
    return settings


@contextmanager
def running_engine(settings: dict[str, Any]) -> Iterator[LLM]:
    """An engine in this process with these arguments of `vllm.LLM`, which is stopped and gives its memory back."""
    # vLLM reads some of them when it is imported.
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = LLM(**settings)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            # The caller still has a name for it, and memory is given back only where nothing holds the model.
            vars(llm).clear()
        cleanup_dist_env_and_memory()


def all_logprobs(output: RequestOutput, vocabulary: int) -> np.ndarray:
    """float32 [tokens of the prompt, vocabulary], of the token after each, from within `prompt_logprobs_as_arrays`."""
    num_tokens = len(output.prompt_token_ids)
    found = np.full((num_tokens, vocabulary), np.nan, np.float32)
    if num_tokens > 1:
        token_ids, logprobs = output.prompt_logprobs
        np.put_along_axis(found[:-1], token_ids, logprobs, axis=1)
    last = output.outputs[0].logprobs
    found[-1, last.token_ids] = last.logprobs
    return found
