# SPDX-License-Identifier: Apache-2.0
"""Full rank is the model itself; truncated, the engine is the transformers implementation of the same adapter."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.engine

LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 47, 63, 64, 65, 100, 127, 128, 200)


@pytest.fixture(scope="module")
def prompts(serving):
    return serving.random_prompts(LENGTHS)


def test_full_rank_gives_stock_tokens(start_engine, tiny_model, make_adapter, prompts, serving):
    model = tiny_model("llama")
    expected = serving.greedy(start_engine(model), prompts)
    for basis in ("pca", "query"):
        for group_heads in (1, 2, 4):
            adapter = make_adapter(model, group_heads=group_heads, basis=basis)
            assert serving.greedy(start_engine(model, adapter), prompts) == expected, (basis, group_heads)


def test_full_rank_gives_stock_tokens_on_every_architecture(
    architecture, start_engine, tiny_model, make_adapter, prompts, serving
):
    model = tiny_model(architecture)
    expected = serving.greedy(start_engine(model), prompts)
    for group_heads in (1, 2):
        adapter = make_adapter(model, group_heads=group_heads)
        assert serving.greedy(start_engine(model, adapter), prompts) == expected, group_heads


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_full_rank_in_half_precision_errs_no_more_than_twice_as_much_as_stock(
    dtype, start_engine, tiny_model, make_adapter, serving
):
    model = tiny_model("llama")
    prompts = serving.random_prompts((200, 333))
    exact = np.concatenate(serving.prompt_logprobs(start_engine(model), prompts))
    stock = np.concatenate(serving.prompt_logprobs(start_engine(model, dtype=dtype), prompts))
    for group_heads in (1, 2):
        adapter = make_adapter(model, group_heads=group_heads)
        mkv = np.concatenate(serving.prompt_logprobs(start_engine(model, adapter, dtype=dtype), prompts))
        assert np.abs(mkv - exact).mean() <= 2 * np.abs(stock - exact).mean()


@pytest.mark.parametrize("group_heads", [1, 2])
def test_truncated_engine_equals_transformers(
    group_heads, architecture, start_engine, tiny_model, make_adapter, uneven_path, serving
):
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_mkv.adapter import Adapter
    from vllm_mkv.fit.truncation import truncated

    # Heads of 64, so that a head alone has ranks between the smallest and the full one.
    wide = {"head_dim": 64} if architecture in ("llama", "mistral", "qwen3") else {}
    model = tiny_model(architecture, num_attention_heads=4, num_key_value_heads=2, **wide)
    plain = Adapter.load(make_adapter(model, group_heads=group_heads))
    adapter = make_adapter(model, group_heads=group_heads, path=uneven_path(plain.shape))
    prompts = serving.random_prompts((40, 130, 257))
    found = serving.prompt_logprobs(start_engine(model, adapter, budget=0.5), prompts)

    loaded = Adapter.load(adapter)
    allocation = loaded.path.replay(0.5, itemsize=4)
    assert {16, 64 * group_heads} < set(allocation.ranks.flatten().tolist())
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode(), truncated(reference, loaded, allocation):
        for prompt, logprobs in zip(prompts, found, strict=True):
            ids = torch.tensor([prompt["prompt_token_ids"]])
            wanted = reference(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            np.testing.assert_allclose(logprobs, wanted.numpy(), atol=1e-3)
    with torch.inference_mode():
        full = reference(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert (full - wanted).abs().max() > 1e-2, "nothing was truncated"
