# SPDX-License-Identifier: Apache-2.0
"""An engine's start with what MKV does not serve, or does; models are configurations without weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

COMMON = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 300,
}
MLA = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FULL = {"sliding_window": None, "layer_types": ["full_attention"] * 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "deepseek": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        **MLA,
    },
    "bloom": {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_layer": 2, "n_head": 4},
    "falcon-alibi": {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "alibi": True},
    "falcon": {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "alibi": False},
    "mpt": {"architectures": ["MPTForCausalLM"], "model_type": "mpt", "attn_config": {"alibi": True}},
    "gpt-oss": {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "head_dim": 32, **EXPERTS, **FULL},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 32,
        "attn_logit_softcapping": 50.0,
        **FULL,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral-window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64},
    "qwen2-window": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 1,
    },
    "qwen2-unused-window": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 64,
    },
    "llama4": {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "head_dim": 32,
        "intermediate_size_mlp": 128,
        **EXPERTS,
    },
    "jamba": {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "num_experts": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "k2-horizon": {"architectures": ["K2HorizonForCausalLM"], "model_type": "llama"},
    "mamba": {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
    "bert": {"architectures": ["BertModel"], "model_type": "bert"},
    "whisper": {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "d_model": 128,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    },
}


@pytest.fixture(scope="module")
def configured_model(tmp_path_factory) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(COMMON | {"dtype": "float32"} | MODELS[name]), "utf-8")
        return folder

    return make


@pytest.fixture(autouse=True, scope="module")
def plugins_loaded() -> None:
    """As on the command line; vLLM reads an AttentionConfig that names a plugin's backend no earlier."""
    from vllm.engine.arg_utils import load_general_plugins

    load_general_plugins()


@pytest.fixture
def start(inspected_here, configured_model) -> Callable[..., Any]:
    """`start(model, **engine arguments)`: what every engine does before anything else, in the user's own process."""

    def create(model: str = "llama", **arguments: Any) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        settings = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 64, "attention_backend": "mkv"}
        return EngineArgs(model=str(configured_model(model)), **(settings | arguments)).create_engine_config()

    return create


@pytest.fixture
def refused(start) -> Callable[..., None]:
    """`refused(feature, alternative, model, **engine arguments)`: NotImplementedError that names both, in one line."""

    def check(feature: str, alternative: str, *args: Any, **arguments: Any) -> None:
        with pytest.raises(NotImplementedError) as caught:
            start(*args, **arguments)
        message = str(caught.value)
        assert message.startswith(f"{feature} is not supported with --attention-backend mkv; "), message
        assert alternative in message and "\n" not in message, message

    return check


@pytest.fixture
def passes(start, monkeypatch) -> Callable[..., Any]:
    """`passes(model, **engine arguments)`: nothing is refused. The model has no adapter, which comes after."""

    def check(*args: Any, **arguments: Any) -> Any:
        from vllm_mkv.serving import configure

        seen = []
        monkeypatch.setattr(
            configure.ServingPlan, "make", lambda config, options: seen.append(config) or no_plan(config)
        )
        start(*args, **arguments)
        assert len(seen) == 1
        return seen[0]

    return check


def no_plan(vllm_config: Any) -> SimpleNamespace:
    config = SimpleNamespace(made={}, base_model_name_or_path=vllm_config.model_config.model)
    return SimpleNamespace(digest="0123", adapter=SimpleNamespace(config=config), describe=lambda: "no plan")
