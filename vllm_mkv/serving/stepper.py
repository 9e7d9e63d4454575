# SPDX-License-Identifier: Apache-2.0
"""An engine that decodes when it is told to, so that steps of several engines can be timed in turns."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_mkv.serving.score import ENVIRONMENT, SPARE_TOKENS, measuring_settings, running_engine

if TYPE_CHECKING:
    from vllm import LLM

PAGE = 128
"""Tokens that a request may waste in its last page: vLLM's default block on the CPU, the largest of its defaults."""


@dataclass(frozen=True)
class Window:
    """Decode steps in which every request of the batch got a token.

    seconds: of a step, the median: what else the machine did meanwhile hits few of them.
    cached: tokens in the cache per request, the mean over the window.
    """

    seconds: float
    cached: float


class Stepper:
    """One batch of requests at a time: `prefill` it, `decode` as often as wanted, `release` it."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm.llm_engine
        self._cached: dict[str, int] = {}
        self._num_batches = 0

    @property
    def block_size(self) -> int:
        """Tokens per page, which vLLM may have chosen."""
        return self._engine.vllm_config.cache_config.block_size

    @property
    def vocab_size(self) -> int:
        return self._engine.model_config.get_vocab_size()

    def prefill(self, prompts: np.ndarray, num_tokens: int) -> None:
        """Returns when every request has its first token.

        Args:
            prompts: int [batch, tokens].
            num_tokens: that each request may be given.
        """
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        self._num_batches += 1
        parameters = SamplingParams(
            temperature=0,
            max_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        waiting = set()
        for number, prompt in enumerate(prompts):
            name = f"{self._num_batches}-{number}"
            self._engine.add_request(name, tokens_input(prompt.tolist()), parameters)
            waiting.add(name)
            self._cached[name] = len(prompt)
        while waiting:
            waiting -= self._step()

    def decode(self, num_steps: int) -> Window:
        """Every request gets `num_steps` tokens."""
        cached, ends = [], [time.perf_counter()]
        for _ in range(num_steps):
            cached.append(sum(self._cached.values()) / len(self._cached))
            waiting = set(self._cached)
            while waiting:
                waiting -= self._step()
            ends.append(time.perf_counter())
        return Window(float(np.median(np.diff(ends))), float(np.mean(cached)))

    def release(self) -> None:
        """Ends the requests, and gives their pages back."""
        self._engine.abort_request(list(self._cached))
        self._cached.clear()

    def _step(self) -> set[str]:
        """Names of the requests that got a token. A step that vLLM only schedules ahead gives none."""
        found = set()
        for output in self._engine.step():
            assert not output.finished, "a request ended before it was released"
            self._cached[output.request_id] += len(output.outputs[0].token_ids)
            found.add(output.request_id)
        return found


@contextmanager
def running_stepper(
    model: str,
    *,
    dtype: str,
    max_model_len: int,
    tokens_per_step: int,
    batch: int,
    cache_bytes_per_token: int,
    eager: bool = False,
    compilation_config: dict[str, Any] | None = None,
    dummy_weights: bool = False,
    kv_cache_dtype: str = "auto",
    mkv: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Iterator[Stepper]:
    """Starts an engine in this process without prefix caching, and stops it.

    Args:
        model: a folder or a Hub repository.
        dtype: that the engine computes in: float32, bfloat16 or float16.
        max_model_len: tokens of a request at most.
        tokens_per_step: of prompts and new ones, at most.
        batch: requests at once.
        cache_bytes_per_token: of the cache that is served; the engine takes memory for a whole batch.
        eager: without compilation and CUDA graphs; always so on the CPU, where compiling takes minutes and attention
            has no part in it.
        compilation_config: of `vllm.LLM`; None for vLLM's default.
        dummy_weights: do not read any.
        kv_cache_dtype: of vLLM's own attention.
        mkv: options of the MKV backend; None for vLLM's own attention.
        revision, trust_remote_code: of the model's Hub repository.

    Raises:
        ValueError, NotImplementedError: what the plugin or vLLM refuses, with the mend.
    """
    tokens = batch * (max_model_len + PAGE) + SPARE_TOKENS
    settings = measuring_settings(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=batch,
        max_num_batched_tokens=tokens_per_step,
        # A quarter more: a tier of few bits is padded in small pages.
        cache_bytes=cache_bytes_per_token * tokens * 5 // 4,
        mkv=mkv,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    settings |= {
        "skip_tokenizer_init": True,
        "load_format": "dummy" if dummy_weights else "auto",
        "kv_cache_dtype": kv_cache_dtype,
        "enforce_eager": eager or on_cpu(),
    }
    if compilation_config is not None:
        settings["compilation_config"] = compilation_config
    with running_engine(settings) as llm:
        yield Stepper(llm)


def on_cpu() -> bool:
    return _platform().is_cpu()


def hardware() -> str:
    """What engines of this process run on."""
    import torch
    import vllm

    device = _cpu_name() if on_cpu() else _platform().get_device_name()
    return f"{device}, {torch.get_num_threads()} threads, vLLM {vllm.__version__}, torch {torch.__version__}"


def _cpu_name() -> str:
    # vLLM's name for it is "cpu", and Python's is that of the architecture.
    file = Path("/proc/cpuinfo")
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _platform() -> Any:
    # vLLM reads some of them when it is imported. It warns at length of the tokenizer, which nothing here needs.
    for name, value in (ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "ERROR"}).items():
        os.environ.setdefault(name, value)
    from vllm.platforms import current_platform

    return current_platform
