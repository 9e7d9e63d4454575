# SPDX-License-Identifier: Apache-2.0
"""Real engines, started and stopped inside the test process: seconds each in place of half a minute."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

CACHE_BYTES = 1 << 26


def engine_settings(model: Path, adapter: Path | None = None, budget: float = 1.0, **options: Any) -> dict[str, Any]:
    """Arguments of vllm.LLM for a tiny model in float32; MKV where an adapter is given, else the stock backend."""
    settings: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
    }
    if adapter is not None:
        settings["attention_backend"] = "mkv"
        settings["additional_config"] = {"mkv": {"adapter": str(adapter), "budget": budget}}
    return settings | options


freeze = gc.freeze


def hasten_starts() -> None:
    """Before an engine is started in a process where there will be others, and none runs now.

    At every start and end, vLLM looks at all objects five times over, since it thaws those that it froze. What is left
    of the engine before is of modules and fixtures, and no collection need look at it again.
    """
    _leave_out_what_was_done()
    gc.collect()
    freeze()


@cache
def _leave_out_what_was_done() -> None:
    """vLLM's freezing, and its looking through all modules for kernels that it has replaced before."""
    from vllm.triton_utils import dispatcher

    rebind = dispatcher._rebind_kernels

    def rebind_once(overrides: Any) -> None:
        dispatcher._rebind_kernels = lambda overrides: None
        rebind(overrides)

    gc.freeze = gc.unfreeze = lambda: None
    dispatcher._rebind_kernels = rebind_once


@contextmanager
def engine(*args: Any, **kwargs: Any) -> Iterator[Any]:
    """A running vllm.LLM with `engine_settings` of the arguments."""
    from vllm.model_executor.models.transformers import base

    from vllm_mkv.serving.score import running_engine

    # vLLM marks transformers' own model classes for compilation, after which they work inside vLLM alone; these tests
    # compile nothing, and compare with transformers in the same process.
    base.support_torch_compile = lambda **_: lambda cls: cls
    hasten_starts()
    with running_engine(engine_settings(*args, **kwargs)) as llm:
        yield llm


@pytest.fixture
def start_engine() -> Iterator[Callable[..., Any]]:
    """`start_engine(model, adapter=None, budget=1.0, **llm_arguments)`: a running vllm.LLM, stopped after the test.

    Starting one stops the one before it.
    """
    with ExitStack() as running:

        def start(*args: Any, **kwargs: Any) -> Any:
            running.close()
            return running.enter_context(engine(*args, **kwargs))

        yield start


@pytest.fixture
def inspected_here(monkeypatch) -> None:
    """vLLM looks at a model's class in a process of its own, which takes half a minute on a busy machine."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())


@pytest.fixture(scope="session")
def serving() -> Any:
    """The helpers of this file."""
    return sys.modules[__name__]


def worker_of(engine: Any) -> Any:
    """The worker of an engine of one process."""
    return engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def random_prompts(lengths: Sequence[int], vocab_size: int = 290, seed: int = 0) -> list[dict[str, list[int]]]:
    import random

    rng = random.Random(seed)
    return [{"prompt_token_ids": [rng.randrange(2, vocab_size) for _ in range(length)]} for length in lengths]


def greedy(engine: Any, prompts: Sequence[Any], num_tokens: int = 64) -> list[tuple[int, ...]]:
    from vllm import SamplingParams

    outputs = engine.generate(
        prompts, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True), use_tqdm=False
    )
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def prompt_logprobs(engine: Any, prompts: Sequence[Any]) -> list[list[float]]:
    """Log-probability of every prompt token but the first."""
    from vllm import SamplingParams

    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    return [
        [entry[token].logprob for token, entry in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:], strict=True)]
        for o in outputs
    ]


def generated_logprobs(engine: Any, prompts: Sequence[Any], num_tokens: int = 8) -> list[list[float]]:
    """Log-probability of every generated token."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    return [
        [entry[token].logprob for token, entry in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)]
        for o in outputs
    ]


def counter(engine: Any, name: str) -> int:
    """A counter of vLLM's metrics. The engine must have been started with disable_log_stats=False."""
    return sum(metric.value for metric in engine.get_metrics() if metric.name == name)


def cache_tokens(engine: Any) -> int:
    """Tokens that the cache holds, as vLLM's own start-up reckons them."""
    cache = engine.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size
