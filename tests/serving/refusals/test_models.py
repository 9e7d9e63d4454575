# SPDX-License-Identifier: Apache-2.0
"""Models that MKV cannot serve are refused by name before weights are loaded, and no others."""

from __future__ import annotations

import logging

import pytest

OTHER = "serve this model with another backend"


@pytest.mark.parametrize(
    ("model", "feature"),
    [
        ("deepseek", "an MLA model"),
        ("bloom", "ALiBi"),
        ("falcon-alibi", "ALiBi"),
        ("gpt-oss", "attention sinks"),
        ("llama4", "a model with layers of kinds chunked_attention"),
        ("jamba", "a model with layers of kinds full_attention, linear_attention"),
        ("mamba", "a model with layers of kinds linear_attention"),
        ("whisper", "an encoder-decoder model"),
        ("k2-horizon", "a model whose keys vLLM permutes"),
    ],
)
def test_attention_of_another_kind(refused, model, feature):
    refused(feature, OTHER, model)


@pytest.mark.parametrize("model", ["mistral-window", "qwen2-window", "gemma3", "gemma2"])
def test_windows_and_soft_caps(passes, model, monkeypatch):
    records = []
    monkeypatch.setattr(logging.getLogger("vllm.mkv"), "handle", records.append)
    passes(model)
    assert not [record for record in records if record.levelname == "WARNING"]
    passes(model, max_model_len=65)
    warnings = [record.getMessage() for record in records if record.levelname == "WARNING"]
    if model == "gemma2":
        assert not warnings
    else:
        assert len(warnings) == 1 and "keep all tokens, not 64" in warnings[0]


@pytest.mark.parametrize("model", ["mistral-window", "qwen2-window", "gemma3"])
def test_windows_that_are_switched_off(passes, model):
    """vLLM ends contexts where the window does."""
    config = passes(model, disable_sliding_window=True, max_model_len=None)
    assert config.model_config.max_model_len == 64


@pytest.mark.parametrize("model", ["falcon", "qwen2-unused-window"])
def test_a_feature_that_the_model_does_not_use(passes, model):
    passes(model)


def test_encoders(refused):
    refused("--runner pooling", "MKV serves generating models", "bert")
    refused("--runner pooling", "MKV serves generating models", "llama", runner="pooling")


def test_models_that_vllm_itself_no_longer_serves(start):
    # MPT biases by distance; ModelConfig.uses_alibi knows it, should it come back.
    with pytest.raises(ValueError, match="MPTForCausalLM was supported in vLLM until"):
        start("mpt")


def test_attention_that_is_not_causal(refused, start, monkeypatch):
    from vllm.config import AttentionConfig, ModelConfig

    arguments = {"attention_backend": None, "attention_config": AttentionConfig(backend="mkv", use_non_causal=True)}
    refused("attention that is not causal", OTHER, **arguments)
    # Text diffusion, on CPU, is vLLM's to refuse first.
    with pytest.raises(ValueError, match="does not support: diffusion models"):
        start(hf_overrides={"canvas_length": 8})
    assert "is_mm_prefix_lm" in vars(ModelConfig)
    monkeypatch.setattr(ModelConfig, "is_mm_prefix_lm", True)
    refused("attention that is not causal", OTHER)
