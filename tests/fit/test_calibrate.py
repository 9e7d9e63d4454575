# SPDX-License-Identifier: Apache-2.0
"""Calibration from end to end on tiny models: what is written, what is refused, what is measured."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_mkv.adapter import CARD_FILE, Adapter
from vllm_mkv.fingerprint import ModelFingerprint
from vllm_mkv.fit.calibrate import calibrate, fit_bases
from vllm_mkv.fit.check import full_rank_exactness, inverse_error
from vllm_mkv.fit.model import Source, choose_group_heads, refuse_config
from vllm_mkv.fit.quality import measure, projected_caches
from vllm_mkv.fit.truncation import truncated


@pytest.fixture(scope="module")
def made(tiny_model, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "adapter"
    model = tiny_model("llama")
    adapter = calibrate(str(model), [str(text_file)], tokens=1000, context=64, output=folder, eval_windows=3)
    return model, folder, adapter


def test_the_adapter_says_how_it_was_made(made):
    model, folder, adapter = made
    config = Adapter.load(folder).config
    assert config.base_model_name_or_path == str(model)
    assert config.basis == "query"
    assert config.group_heads == 4, "8 query heads on 4 KV heads fit one product of 16"
    assert config.default_budget == 0.5
    assert config.layers == [0, 1, 2]
    assert config.made["tokens"] == 16 * 64
    assert config.model == Source(str(model)).fingerprint
    assert adapter.path.widths == (16, 0)


def test_quality_is_measured_on_every_reachable_budget(made):
    _, folder, adapter = made
    stock, *rows = adapter.config.quality
    assert stock["name"] == "stock"
    assert stock["bytes_per_token"] == 2 * 3 * 4 * 32 * 4
    assert [row["budget"] for row in rows] == [1.0, 0.75, 0.5, 0.375, 0.25]
    assert rows[0]["perplexity"] == pytest.approx(stock["perplexity"], rel=1e-4)
    assert rows[0]["kl"] < 1e-6
    assert rows[0]["top1"] == 1
    assert rows[1]["kl"] < rows[-1]["kl"]
    card = (folder / CARD_FILE).read_text()
    assert "| stock | 1.000 | 3072 |" in card
    assert "`query`, 4 KV heads per latent group" in card
    assert "Without a GPU, add `--kv-cache-memory-bytes 268435456`" in card


def test_bytes_in_the_card_are_of_the_dtype_that_the_model_is_stored_in(tiny_model, text_file, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(tiny_model("llama"), half)
    config = json.loads((half / "config.json").read_text("utf-8"))
    (half / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}), "utf-8")
    settings = {"tokens": 256, "context": 64, "eval_windows": 1}
    for dtype in ("auto", "float32"):
        adapter = calibrate(str(half), [str(text_file)], output=tmp_path / dtype, dtype=dtype, **settings)
        stock, full, *_ = adapter.config.quality
        assert stock["bytes_per_token"] == full["bytes_per_token"] == 2 * 3 * 4 * 32 * 2


def test_measure_equals_the_definitions(made):
    model_folder, _, adapter = made
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    windows = np.random.default_rng(0).integers(0, 300, (2, 17))
    allocation = adapter.path.replay(0.5, itemsize=4)
    stock_bytes = adapter.shape.stock_bytes_per_token(4)
    stock_row, row = measure(model, windows, projected_caches(adapter, [allocation], 4), stock_bytes=stock_bytes)
    ids = torch.from_numpy(windows)
    with torch.inference_mode():
        p = model(ids).logits[:, :-1].double().log_softmax(-1)
        with truncated(model, adapter, allocation):
            q = model(ids).logits[:, :-1].double().log_softmax(-1)
    for found, log in ((stock_row, p), (row, q)):
        loss = -log.gather(-1, ids[:, 1:, None]).mean()
        assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert found["kl"] == pytest.approx(float((p.exp() * (p - log)).sum(-1).mean()), abs=1e-6)
        assert found["top1"] == pytest.approx(float((p.argmax(-1) == log.argmax(-1)).double().mean()))


def test_the_same_seed_gives_the_same_adapter(made, text_file, tmp_path):
    model, _, first = made
    again = calibrate(str(model), [str(text_file)], tokens=1000, context=64, output=tmp_path / "a", eval_windows=0)
    for one, other in zip(first.bases, again.bases, strict=True):
        # Singular vectors may differ in sign; what they project on does not.
        np.testing.assert_allclose(
            one.A[..., :16] @ one.B[..., :16].swapaxes(-1, -2),
            other.A[..., :16] @ other.B[..., :16].swapaxes(-1, -2),
            atol=1e-3,
        )


def test_statistics_do_not_depend_on_the_batches(tiny_model, monkeypatch):
    folder = tiny_model("qwen3")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    windows = np.random.default_rng(1).integers(0, 300, (5, 33))
    fingerprint = Source(str(folder)).fingerprint
    found = []
    for tokens in (33, 10_000):
        monkeypatch.setattr("vllm_mkv.fit.calibrate.TOKENS_PER_BATCH", tokens)
        found.append(fit_bases(model, fingerprint, windows, basis="pca", group_heads=2))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one.key_mean, other.key_mean, atol=1e-4)
        np.testing.assert_allclose(np.abs(one.A[..., 0]), np.abs(other.A[..., 0]), atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_calibration_in_half_precision_is_close_to_float32(tiny_model, make_adapter, text_file, tmp_path, dtype):
    model = tiny_model("qwen2")
    half = calibrate(
        str(model), [str(text_file)], tokens=2048, context=128, group_heads=1, basis="pca", dtype=dtype,
        output=tmp_path / "half", eval_windows=0,
    )  # fmt: skip
    full = Adapter.load(make_adapter(model, 1, "pca"))
    assert half.config.made["dtype"] == dtype
    for one, other in zip(half.bases, full.bases, strict=True):
        spread = np.abs(other.key_mean).max()
        np.testing.assert_allclose(one.key_mean, other.key_mean, atol=0.05 * spread)


def test_check_finds_full_rank_exact_and_a_damaged_pair_not(made):
    model_folder, _, adapter = made
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    found = full_rank_exactness(model, adapter, tokens=24)
    assert found.exact
    assert found.agreement == 1
    assert inverse_error(adapter) < 1e-4
    adapter.bases[1].B[0, 3, 3] += 1
    try:
        assert inverse_error(adapter) > 0.01
        assert not full_rank_exactness(model, adapter, tokens=24).exact
    finally:
        adapter.bases[1].B[0, 3, 3] -= 1


def test_group_heads_by_default_are_the_most_whose_query_heads_fit_16():
    def J(heads, kv_heads, asked=None, head_size=64):
        fingerprint = ModelFingerprint(
            architecture="X", num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads,
            head_size=head_size, rope={},
        )  # fmt: skip
        return choose_group_heads(fingerprint, asked)

    assert [J(32, 8), J(32, 32), J(6, 3), J(64, 8), J(71, 1), J(28, 4), J(10, 5)] == [4, 16, 3, 2, 1, 2, 5]
    assert [J(16, 16, head_size=256), J(32, 32, head_size=128)] == [8, 16], "2048 coordinates at most"
    assert J(32, 8, 1) == 1
    with pytest.raises(ValueError, match=r"3 heads per group do not divide 8 KV heads; use one of \[1, 2, 4, 8\]"):
        J(32, 8, 3)
    with pytest.raises(ValueError, match=r"no multiple of 16.*--group-heads"):
        J(32, 8, 1, head_size=40)
    assert J(32, 8, 2, head_size=40) == 2


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"basis": "best"}, "basis 'best' is not one of pca, query"),
        ({"group_heads": 3}, "3 heads per group do not divide 4"),
        ({"tokens": 10}, "10 tokens are no window of 64"),
        ({"tokens": -5}, "-5 tokens are no window"),
        ({"context": 0}, "a context of 0 tokens has nothing to predict"),
        ({"context": 4096}, "4096 tokens is more than the model's 2048"),
        ({"eval_windows": -1}, "-1 windows to measure on"),
        ({"dtype": "float8"}, "dtype 'float8' is not one of"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"tokens": 10**9}, "are needed; add text"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(tiny_model, text_file, tmp_path, change, reason):
    settings = {"tokens": 640, "context": 64, "output": tmp_path / "out"} | change
    with pytest.raises(ValueError, match=reason):
        calibrate(str(tiny_model("llama")), [str(text_file)], **settings)
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(tiny_model, text_file, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_mkv.fit.calibrate.output_metric", interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(str(tiny_model("llama")), [str(text_file)], tokens=640, context=64, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "architecture, settings, reason",
    [
        ("t5", {}, "encoder-decoder"),
        ("deepseek_v3", {}, "MLA"),
        ("llama4_text", {}, "layers of kind chunked_attention"),
        ("qwen3_next", {}, "layers of kind linear_attention"),
    ],
)
def test_models_of_another_kind_are_refused_from_their_configuration(architecture, settings, reason):
    from transformers import AutoConfig

    with pytest.raises(NotImplementedError, match=reason):
        refuse_config(AutoConfig.for_model(architecture, **settings))
