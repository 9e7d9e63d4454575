# SPDX-License-Identifier: Apache-2.0
"""What vLLM can do and MKV cannot is refused by name before weights are loaded, and nothing else is refused.

The models of the refusals are configurations without weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from importlib.metadata import version
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


OTHER = "serve this model with another backend"

# --- models


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


# --- engine arguments


refused_by_vllm = pytest.mark.skipif(version("vllm") >= "0.33", reason="this vLLM refuses it before us")


@pytest.mark.parametrize(
    "dtype",
    [
        "fp8",
        "fp8_e5m2",
        "int8_per_token_head",
        "int4_per_token_head",
        "turboquant_4bit_nc",
        pytest.param("float16", marks=refused_by_vllm),
    ],
)
def test_other_cache_dtypes(refused, dtype):
    refused(f"--kv-cache-dtype {dtype}", "leave --kv-cache-dtype at auto", kv_cache_dtype=dtype)


@pytest.mark.parametrize("block_size", [8, 24])
def test_block_sizes_that_are_no_multiple_of_16(refused, passes, block_size):
    refused(f"--block-size {block_size}", "pass a multiple of 16", block_size=block_size)
    passes("llama", block_size=48)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_models_own_cache_dtype(passes, dtype):
    passes(kv_cache_dtype=dtype, dtype=dtype)


@pytest.mark.parametrize(
    "declared",
    [
        {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        {"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}},
    ],
    ids=["compressed-tensors", "modelopt"],
)
def test_a_quantised_cache_that_a_checkpoint_asks_for(declared, tmp_path, configured_model):
    from vllm.config import ModelConfig

    from vllm_mkv.serving.configure import declares_a_cache

    folder = configured_model("llama")
    model = ModelConfig(str(folder), skip_tokenizer_init=True)
    assert not declares_a_cache(model)
    model.hf_config.quantization_config = declared
    assert declares_a_cache(model)
    del declared["quant_method"]
    assert declares_a_cache(model)
    declared.clear()
    assert not declares_a_cache(model)


def test_the_checkpoints_own_cache_dtype_names_the_mend(refused, passes, monkeypatch):
    from vllm_mkv.serving import configure

    monkeypatch.setattr(configure, "declares_a_cache", lambda model: True)
    refused("the quantised cache that this checkpoint asks for", "pass --kv-cache-dtype bfloat16", dtype="bfloat16")
    passes(dtype="bfloat16", kv_cache_dtype="bfloat16")


def test_kv_connectors(refused, start):
    from vllm.config import KVTransferConfig

    connector = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    refused("a KV connector", "remove --kv-transfer-config", kv_transfer_config=connector)
    # One that vLLM does not know is its own to refuse.
    unknown = KVTransferConfig(kv_connector="NoSuchConnector", kv_role="kv_both")
    with pytest.raises(ValueError, match="Unsupported connector type: NoSuchConnector"):
        start(kv_transfer_config=unknown)


def test_kv_offloading(refused):
    refused("KV offloading", "remove --kv-offloading-size", kv_offloading_size=1.0)


def test_weights_from_another_process(refused, passes):
    from vllm.config import WeightTransferConfig

    transfer = WeightTransferConfig(backend="nccl")
    refused(
        "--weight-transfer-config with value bases folded into the weights",
        'add "fold": false',
        weight_transfer_config=transfer,
    )
    passes(weight_transfer_config=transfer, additional_config={"mkv": {"fold": False}})
    refused("--load-format ipc_cache", "use another --load-format", load_format="ipc_cache")


def test_steps_in_parts(refused):
    # On CPU, vLLM switches --enable-dbo off.
    mend = "remove --enable-dbo and --ubatch-size"
    refused("dual batch overlap", mend, ubatch_size=2, all2all_backend="deepep_low_latency")


def test_batch_invariance(refused, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    refused("VLLM_BATCH_INVARIANT=1", "unset it")


def test_context_parallelism(refused, start):
    ranks = {"decode_context_parallel_size": 2}
    refused("context parallelism", "use --tensor-parallel-size", tensor_parallel_size=4, **ranks)
    # Where ranks do not outnumber KV heads, vLLM refuses it first; and on CPU that of prefill, always.
    with pytest.raises(ValueError, match="to be greater than the model's total number of KV heads"):
        start(tensor_parallel_size=2, **ranks)
    with pytest.raises(ValueError, match="does not support: prefill context parallel"):
        start(prefill_context_parallel_size=2)


def test_speculation_with_a_draft_model(refused, configured_model):
    draft = {"method": "draft_model", "model": str(configured_model("llama")), "num_speculative_tokens": 2}
    refused("speculative decoding with draft_model", "the method ngram", speculative_config=draft)


def test_speculation_without_one(passes):
    config = passes(speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3})
    assert config.speculative_config.method == "ngram"


def kinds(backend: str | None = None, **by_kind: str) -> dict[str, Any]:
    from vllm.config import AttentionConfig

    return {"attention_backend": backend, "attention_config": AttentionConfig(backend_per_kind=by_kind)}


@pytest.mark.parametrize(
    "backends",
    [
        ("mkv", {"full_attention": "CPU_ATTN"}),
        ("mkv", {"sliding_window": "TRITON_ATTN"}),
        (None, {"full_attention": "mkv", "sliding_window": "TRITON_ATTN"}),
        (None, {"sliding_window": "mkv"}),
    ],
    ids=["shadowed", "beside", "one of two", "for layers that the model has not"],
)
def test_mkv_for_some_layers(start, backends):
    backend, by_kind = backends
    with pytest.raises(
        NotImplementedError, match=r"MKV beside other attention backends .*--attention-backend mkv alone"
    ):
        start(**kinds(backend, **by_kind))


def test_mkv_by_kind_for_all_layers(passes, start):
    passes(**kinds(full_attention="mkv"))
    passes(**kinds("CPU_ATTN", full_attention="mkv"))
    passes("mistral-window", **kinds(sliding_window="mkv"))
    passes("gemma3", **kinds(sliding_window="mkv", full_attention="mkv"))
    for kind in ("full_attention", "sliding_window"):
        with pytest.raises(NotImplementedError, match="MKV beside other attention backends"):
            start("gemma3", **kinds(**{kind: "mkv"}))


@pytest.mark.parametrize(
    "arguments", [{"tensor_parallel_size": 2}, {"enable_lora": True}, {"model_impl": "transformers"}]
)
def test_arguments_that_are_served(passes, arguments):
    passes(**arguments)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.3.0", "1.0", "0.320.0", "dev"])
def test_other_versions_of_vllm(start, monkeypatch, version):
    from vllm_mkv.serving import compat

    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    with pytest.raises(NotImplementedError, match=f"vLLM {version} is not supported .*install vLLM 0.32 or 0.33"):
        start()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.1.dev3+gabc", "0.33.0"])
def test_supported_versions_of_vllm(passes, monkeypatch, version):
    from vllm_mkv.serving import compat

    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    passes()
