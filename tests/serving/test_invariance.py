# SPDX-License-Identifier: Apache-2.0
"""A request's output does not depend on what else is in the batch, nor on chunks, blocks, prefix hits or preemption."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.engine

ATOL = 1e-3
LENGTHS = (5, 16, 17, 33, 63, 64, 90, 100, 127, 128, 129, 150, 177, 200, 255, 300)


@pytest.fixture(scope="module")
def prompts(serving):
    return serving.random_prompts(LENGTHS, seed=1)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module", params=["ranks", "tiers"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(model, make_adapter, make_searched, uneven_path, kind):
    from vllm_mkv.adapter import Adapter

    if kind == "tiers":
        return make_searched(model, group_heads=2)
    shape = Adapter.load(make_adapter(model, group_heads=2)).shape
    return make_adapter(model, group_heads=2, path=uneven_path(shape))


@pytest.fixture(scope="module")
def budget(kind):
    return {"ranks": 0.5, "tiers": 0.125}[kind]


@pytest.fixture(scope="module")
def alone(model, adapter, budget, prompts, serving):
    """Log-probabilities of every prompt when it is the only request."""
    with serving.engine(model, adapter, budget=budget) as engine:
        return [serving.prompt_logprobs(engine, [prompt])[0] for prompt in prompts]


@pytest.fixture
def assert_same(kind):
    """Equal up to rounding. With tiers, rounding may take a coordinate from one level to the next, and all that follows
    differs by more: by far less still than what another request's pages would do.
    """

    def ranks(found, expected):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=ATOL)

    def tiers(found, expected):
        errors = np.abs(np.concatenate(found) - np.concatenate(expected))
        assert errors.mean() < 0.01 and errors.max() < 0.3, (errors.mean(), errors.max())

    return {"ranks": ranks, "tiers": tiers}[kind]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 32, "enable_chunked_prefill": True},
        {"block_size": 16},
        {"block_size": 32},
        {"block_size": 128, "max_num_batched_tokens": 32, "enable_chunked_prefill": True},
        {"block_size": 48},
    ],
    ids=["batch-of-16", "chunks-of-32", "block-16", "block-32", "block-128-chunks-of-32", "block-48"],
)
def test_batch_chunk_and_block_size(
    options, start_engine, model, adapter, budget, prompts, alone, serving, assert_same
):
    engine = start_engine(model, adapter, budget=budget, **options)
    assert_same(serving.prompt_logprobs(engine, prompts), alone)


def test_prefix_cache_hit(start_engine, model, adapter, budget, prompts, serving, assert_same):
    """The second time, all but the last block of the prompt comes from the cache that the first time filled."""
    engine = start_engine(
        model, adapter, budget=budget, enable_prefix_caching=True, block_size=16, disable_log_stats=False
    )
    first = serving.generated_logprobs(engine, prompts[-4:])
    before = serving.counter(engine, "vllm:prefix_cache_hits")
    second = serving.generated_logprobs(engine, prompts[-4:])
    assert serving.counter(engine, "vllm:prefix_cache_hits") - before >= sum(LENGTHS[-4:]) - 4 * 16
    assert_same(second, first)


def test_preemption(start_engine, model, adapter, budget, prompts, serving, assert_same):
    from vllm_mkv.adapter import Adapter

    generated = 64
    roomy = start_engine(model, adapter, budget=budget, block_size=16)
    expected = serving.generated_logprobs(roomy, prompts, generated)
    per_token = Adapter.load(adapter).path.replay(budget, itemsize=4).bytes_per_token(block_size=16, itemsize=4)
    engine = start_engine(
        model,
        adapter,
        budget=budget,
        block_size=16,
        max_model_len=512,
        kv_cache_memory_bytes=per_token * 1024,
        disable_log_stats=False,
    )
    found = serving.generated_logprobs(engine, prompts, generated)
    assert serving.counter(engine, "vllm:num_preemptions") > 0
    assert_same(found, expected)


def test_poisoned_cache_never_reaches_an_output(
    start_engine, model, adapter, budget, prompts, alone, serving, assert_same
):
    """Every page is NaN before the first token; a page that a request gets holds NaN beyond what was written."""
    engine = start_engine(model, adapter, budget=budget)
    runner = serving.worker_of(engine).model_runner
    runner._zero_block_ids = lambda block_ids: None
    for cache in runner.kv_caches:
        # Bytes that are NaN in every dtype, scales of tiers included.
        cache.view(torch.uint8).fill_(0xFF)
    assert_same(serving.prompt_logprobs(engine, prompts), alone)
    logprobs = serving.generated_logprobs(engine, prompts, 40)
    assert np.isfinite(np.concatenate(logprobs)).all()
    for cache in runner.kv_caches:
        written = (cache.view(torch.uint8) != 0xFF).any(-1).flatten()
        assert 0 < written.sum() < written.numel()


def test_tensor_parallel(start_engine, model, adapter, budget, prompts, serving, assert_same):
    """In a process of its own: two workers, one per rank.

    Pages are padded to the rank that needs most, so two ranks go further down the path than one at the same budget.
    """
    from vllm_mkv.adapter import Adapter

    path = Adapter.load(adapter).path
    sharded = path.replay(budget, itemsize=4, num_shards=2)
    same_on_one = sharded.budget(itemsize=4)
    assert path.replay(same_on_one, itemsize=4).widths == sharded.widths
    expected = serving.prompt_logprobs(start_engine(model, adapter, budget=same_on_one), prompts)
    settings = serving.engine_settings(
        model, adapter, budget=budget, tensor_parallel_size=2, distributed_executor_backend="mp"
    )
    code = (
        "import json, sys\n"
        "from vllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        "    settings, prompts = json.loads(sys.argv[1])\n"
        "    outputs = LLM(**settings).generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0))\n"
        "    found = [[e[t].logprob for t, e in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:])] for o in outputs]\n"
        "    print('RESULT', json.dumps(found))\n"
    )
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    script = model.parent / "tensor_parallel.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps([settings, prompts])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-4000:] + done.stderr[-4000:]
    assert_same(json.loads(results[0].removeprefix("RESULT ")), expected)
