# SPDX-License-Identifier: Apache-2.0
"""The engine with the compiled kernels of CPUs, which are what `auto` chooses there."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("numba")

pytestmark = pytest.mark.engine


@pytest.fixture
def generate(start_engine, serving):
    """`generate(model, adapter, budget, kernels, prompts)`: tokens and log-probabilities per prompt."""
    from vllm import SamplingParams

    def run(model, adapter, budget, kernels, prompts, num_tokens=8, **options):
        settings = serving.engine_settings(model, adapter, budget, max_num_seqs=4, **options)
        settings["additional_config"]["mkv"]["kernels"] = kernels
        settings["max_num_batched_tokens"] = 64
        engine = start_engine(settings.pop("model"), **settings)
        parameters = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
        outputs = [output.outputs[0] for output in engine.generate(prompts, parameters, use_tqdm=False)]
        logprobs = [[entry[t].logprob for t, entry in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs]
        return [list(o.token_ids) for o in outputs], logprobs

    return run


@pytest.fixture
def calls(monkeypatch):
    """How often each compiled kernel ran."""
    from mkv_kernels.compiled.decode import LayerDecode
    from mkv_kernels.compiled.store import LayerStore

    counted: Counter[str] = Counter()
    for kernel in (LayerDecode, LayerStore):

        def counting(self, *args, _kernel=kernel, _run=kernel.__call__):
            counted[_kernel.__name__] += 1
            return _run(self, *args)

        monkeypatch.setattr(kernel, "__call__", counting)
    return counted


@pytest.mark.parametrize("group_heads", [1, 2])
def test_ranks_give_what_pytorch_gives(group_heads, tiny_model, make_adapter, uneven_path, generate, serving, calls):
    from vllm_mkv.adapter import Adapter

    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    shape = Adapter.load(make_adapter(model, group_heads=group_heads)).shape
    adapter = make_adapter(model, group_heads=group_heads, path=uneven_path(shape))
    # Chunks of 64 tokens, so that steps mix requests that decode with parts of prompts.
    prompts = serving.random_prompts((5, 90, 33, 1))
    tokens, logprobs = generate(model, adapter, 0.5, "torch", prompts)
    assert not calls
    compiled_tokens, compiled_logprobs = generate(model, adapter, 0.5, "auto", prompts)
    # The first steps have prompts in them; the last ones decode.
    assert calls["LayerDecode"] > calls["LayerStore"] > 0
    assert compiled_tokens == tokens
    np.testing.assert_allclose(np.concatenate(compiled_logprobs), np.concatenate(logprobs), atol=1e-3)


def test_tiers_give_what_pytorch_gives(tiny_model, make_searched, generate, serving, calls):
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    adapter = make_searched(model, 2)
    prompts = serving.random_prompts((70, 20))
    tokens, logprobs = generate(model, adapter, 0.125, "torch", prompts, num_tokens=2)
    compiled_tokens, compiled_logprobs = generate(model, adapter, 0.125, "numba", prompts, num_tokens=2)
    assert calls["LayerDecode"] and calls["LayerStore"]
    assert [t[0] for t in compiled_tokens] == [t[0] for t in tokens]
    # A coordinate at the border of two levels may fall to either side.
    differ = np.abs(np.concatenate(compiled_logprobs) - np.concatenate(logprobs))
    assert differ.max() < 0.1


def test_drafts_are_decoded_together(tiny_model, make_adapter, generate, calls):
    model = tiny_model("llama")
    adapter = make_adapter(model)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    repetitive = [{"prompt_token_ids": [7, 8, 9, 10] * 8}, {"prompt_token_ids": [20, 21] * 5}]
    tokens, _ = generate(model, adapter, 1.0, "torch", repetitive, num_tokens=12)
    drafted, _ = generate(model, adapter, 1.0, "numba", repetitive, num_tokens=12, speculative_config=drafts)
    assert calls["LayerDecode"]
    assert drafted == tokens


def test_where_they_cannot_run_pytorch_serves_and_says_so(
    tiny_model, make_adapter, start_engine, serving, monkeypatch, caplog, calls
):
    from vllm_mkv.serving import kernels, loader

    for module in (kernels, loader):
        monkeypatch.setattr(module, "without_numba", lambda dtype: "no threads")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    model = tiny_model("llama")
    adapter = make_adapter(model)
    with caplog.at_level(logging.WARNING, "vllm.mkv.loader"):
        engine = start_engine(model, adapter)
    assert "PyTorch serves, slower than the compiled kernels, which cannot run: no threads" in caplog.text
    assert len(serving.greedy(engine, serving.random_prompts((9,)), 4)[0]) == 4
    assert not calls
    mkv = {"adapter": str(adapter), "kernels": "numba"}
    with pytest.raises(NotImplementedError, match="numba kernels cannot run: no threads"):
        start_engine(model, attention_backend="mkv", additional_config={"mkv": mkv})
