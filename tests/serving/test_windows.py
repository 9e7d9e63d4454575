# SPDX-License-Identifier: Apache-2.0
"""Models with sliding windows and capped scores, in some layers or in all: as stock vLLM, and as transformers."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.engine

LENGTHS = (1, 15, 23, 24, 25, 40, 63, 128, 200)


@pytest.fixture(scope="module")
def prompts(serving):
    return serving.random_prompts(LENGTHS)


@pytest.mark.parametrize("kernels", ["numba", "torch"])
def test_full_rank_is_stock_vllm(kernels, windowed, start_engine, tiny_model, make_adapter, prompts, serving):
    architecture, settings = windowed
    model = tiny_model(architecture, **settings)
    engine = start_engine(model)
    tokens, logprobs = serving.greedy(engine, prompts, 32), serving.prompt_logprobs(engine, prompts)
    for group_heads in (1, 2):
        adapter = make_adapter(model, group_heads=group_heads)
        mkv = {"adapter": str(adapter), "budget": 1.0, "kernels": kernels}
        engine = start_engine(model, adapter, additional_config={"mkv": mkv})
        assert serving.greedy(engine, prompts, 32) == tokens
        found = serving.prompt_logprobs(engine, prompts)
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(logprobs), atol=1e-3)


def test_prefixes_chunks_and_preemption_change_nothing(
    windowed, start_engine, tiny_model, make_adapter, prompts, serving
):
    architecture, settings = windowed
    model = tiny_model(architecture, **settings)
    adapter = make_adapter(model, group_heads=2)
    expected = serving.greedy(start_engine(model, adapter, budget=0.6), prompts, 32)
    engine = start_engine(
        model,
        adapter,
        budget=0.6,
        block_size=16,
        max_model_len=256,
        max_num_batched_tokens=32,
        enable_prefix_caching=True,
        num_gpu_blocks_override=24,
        disable_log_stats=False,
    )
    for _ in range(2):
        assert serving.greedy(engine, prompts, 32) == expected
        assert serving.greedy(engine, prompts[-1:], 32) == expected[-1:]
    assert serving.counter(engine, "vllm:num_preemptions") > 0
    assert serving.counter(engine, "vllm:prefix_cache_hits") > 128


def test_truncated_engine_is_transformers(windowed, start_engine, tiny_model, make_adapter, uneven_path, serving):
    import torch

    from vllm_mkv.adapter import Adapter
    from vllm_mkv.fit.model import Source
    from vllm_mkv.fit.truncation import truncated

    architecture, settings = windowed
    settings = settings | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = tiny_model(architecture, **settings)
    plain = Adapter.load(make_adapter(model, group_heads=2))
    adapter = make_adapter(model, group_heads=2, path=uneven_path(plain.shape))
    prompts = serving.random_prompts((40, 130, 257))
    found = serving.prompt_logprobs(start_engine(model, adapter, budget=0.5), prompts)

    loaded, reference = Adapter.load(adapter), Source(str(model)).load(device="cpu")

    def logprobs(prompt):
        ids = torch.tensor([prompt["prompt_token_ids"]])
        with torch.inference_mode():
            return reference(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]

    with truncated(reference, loaded, loaded.path.replay(0.5, itemsize=4)):
        wanted = [logprobs(prompt) for prompt in prompts]
    for prompt, got, want in zip(prompts, found, wanted, strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=1e-3)
        assert (logprobs(prompt) - want).abs().max() > 1e-2, "nothing was truncated"


def test_layers_of_all_kinds_share_one_cache_and_one_metadata(
    start_engine, tiny_model, make_adapter, serving, monkeypatch
):
    from vllm_mkv.serving import metadata

    made = []
    make_buckets = metadata.make_buckets

    def counting(*args, **kwargs):
        made.append(kwargs["window"])
        return make_buckets(*args, **kwargs)

    monkeypatch.setattr(metadata, "make_buckets", counting)
    windows = {"sliding_window": 24, "num_hidden_layers": 4, "tie_word_embeddings": True}
    model = tiny_model("gemma2", **windows)
    engine = start_engine(model, make_adapter(model), budget=0.5)
    config = serving.worker_of(engine).model_runner.kv_cache_config
    assert [len(group.layer_names) for group in config.kv_cache_groups] == [4]
    made.clear()
    serving.greedy(engine, serving.random_prompts((100,)), 3)
    assert sorted(made) == [0, 0, 0, 24, 24, 24], "once per step and window, not per layer"


def test_a_mean_of_keys_is_refused_where_scores_are_capped(tiny_model, make_adapter, tmp_path):
    from dataclasses import replace

    from vllm.engine.arg_utils import EngineArgs

    from vllm_mkv.adapter import Adapter

    model = tiny_model("gemma2", tie_word_embeddings=True)
    adapter = Adapter.load(make_adapter(model))
    bases = tuple(replace(bases, key_mean=bases.value_mean) for bases in adapter.bases)
    replace(adapter, bases=bases).save(tmp_path / "shifted", "")
    for folder, refused in ((make_adapter(model), False), (tmp_path / "shifted", True)):
        options = {"mkv": {"adapter": str(folder), "budget": 0.5}}
        arguments = EngineArgs(
            model=str(model), attention_backend="mkv", max_model_len=256, additional_config=options, dtype="float32"
        )
        if refused:
            with pytest.raises(ValueError, match=r"keys less their mean, and .* has a soft-cap .*vllm-mkv calibrate"):
                arguments.create_engine_config()
        else:
            arguments.create_engine_config()
