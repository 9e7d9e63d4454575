# SPDX-License-Identifier: Apache-2.0
"""Weights that bases are folded into are neither overwritten nor handed out; others may be."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def plain_parameters(monkeypatch):
    """Weights stay parameters, as on a GPU: this CPU would have them packed and dropped."""
    from vllm import _custom_ops

    monkeypatch.setattr(_custom_ops, "_supports_onednn", False)


@pytest.fixture
def start(start_engine, tiny_model, make_adapter):
    """`start(group_heads, **mkv options)`: an engine at a third of the bytes."""

    def run(group_heads=1, **mkv):
        model = tiny_model("llama")
        settings = {"additional_config": {"mkv": {"adapter": str(make_adapter(model, group_heads)), **mkv}}}
        return start_engine(model, attention_backend="mkv", **settings)

    return run


@pytest.fixture
def logprobs(serving):
    prompts = serving.random_prompts((40, 100))
    return lambda engine: np.concatenate(serving.prompt_logprobs(engine, prompts))


def call(engine, method, *args, **kwargs):
    return engine.llm_engine.collective_rpc(method, args=args, kwargs=kwargs)


def parameters(engine, serving):
    model = serving.worker_of(engine).model_runner.get_model()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("group_heads", [1, 2])
def test_folded_weights_stay(group_heads, start, logprobs, serving, tmp_path):
    from vllm.v1.worker.gpu_worker import Worker

    engine = start(group_heads, budget=0.5)
    before, weights = logprobs(engine), parameters(engine, serving)
    iterator = [(name, weight + 1) for name, weight in weights.items()]
    for method, arguments in {
        "reload_weights": {},
        "reload_weights ": {"weights_iterator": iterator, "is_checkpoint_format": False},
        "save_sharded_state": {"path": str(tmp_path)},
        "save_tensorized_model": {"tensorizer_config": None},
    }.items():
        with pytest.raises(NotImplementedError, match='"fold": false'):
            call(engine, method.strip(), **arguments)
    # The CPU's worker has its own of these, which do nothing.
    worker = serving.worker_of(engine)
    with pytest.raises(NotImplementedError, match=r'sleep of level 2.*"fold": false.* wake_up resumes it'):
        Worker.sleep(worker, level=2)
    for tags in ("weights", ("weights",), ("kv_cache", "weights")):
        with pytest.raises(NotImplementedError, match=r'discarding weights.*"fold": false'):
            Worker.discard(worker, tags)
    discarded = []
    worker._sleep_mode_backend = SimpleNamespace(discard=discarded.append)
    Worker.discard(worker, ("kv_cache",))
    assert discarded == [("kv_cache",)]
    # The engine refuses before it drops its requests and pauses.
    with pytest.raises(NotImplementedError, match=r"sleep of level 2.*mkv options$"):
        engine.sleep(level=2)
    assert not engine.llm_engine.engine_core.engine_core.is_scheduler_paused()
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(logprobs(engine), before)


@pytest.mark.parametrize("group_heads", [1, 2])
def test_weights_that_are_not_folded_can_be_reloaded(group_heads, start, start_engine, tiny_model, logprobs, serving):
    import torch

    folded = logprobs(start(group_heads, budget=0.5))
    engine = start(group_heads, budget=0.5, fold=False)
    before, own = logprobs(engine), parameters(engine, serving)
    # The same numbers are multiplied in another order.
    np.testing.assert_allclose(before, folded, atol=1e-4)
    with torch.inference_mode():
        call(engine, "reload_weights", weights_iterator=own.items(), is_checkpoint_format=False)
    np.testing.assert_array_equal(logprobs(engine), before)
    with torch.inference_mode():
        call(engine, "reload_weights")
    np.testing.assert_array_equal(logprobs(engine), before)
    stock = parameters(start_engine(tiny_model("llama")), serving)
    assert all(torch.equal(own[name], weight) for name, weight in stock.items())


def test_other_engines_in_the_process_are_left_alone(start, start_engine, tiny_model, serving):
    import torch

    start()
    engine = start_engine(tiny_model("llama"))
    with torch.inference_mode():
        call(engine, "reload_weights")
