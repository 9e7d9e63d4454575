# SPDX-License-Identifier: Apache-2.0
"""What vLLM can do and MKV cannot is refused by name before weights are loaded, and nothing else is."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

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
