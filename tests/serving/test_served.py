# SPDX-License-Identifier: Apache-2.0
"""Models and features that are served: every architecture, LoRA, and models through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def test_every_architecture_passes(architecture, tiny_model, make_adapter, inspected_here):
    from transformers import AutoConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_mkv.fingerprint import ModelFingerprint

    model = tiny_model(architecture)
    mkv = {"adapter": str(make_adapter(model)), "budget": 0.5}
    config = EngineArgs(
        model=str(model), attention_backend="mkv", max_model_len=256, additional_config={"mkv": mkv}
    ).create_engine_config()
    assert len(config.additional_config["mkv"]["digest"]) == 16
    fingerprint = ModelFingerprint.of(config.model_config.hf_config)
    assert fingerprint == ModelFingerprint.of(AutoConfig.from_pretrained(model))
    assert fingerprint.head_size == config.model_config.get_head_size() == 32
    assert fingerprint.num_key_value_heads == config.model_config.get_total_num_kv_heads() == 4


RANK = 8


def save_lora(folder: Path, *, num_layers: int = 3, hidden: int = 256, heads: int = 8, kv_heads: int = 4) -> Path:
    """A LoRA on all projections of a tiny Llama's attention, as PEFT writes one."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    outputs = {"q_proj": heads * 32, "k_proj": kv_heads * 32, "v_proj": kv_heads * 32, "o_proj": hidden}
    tensors = {}
    for layer in range(num_layers):
        for name, width in outputs.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = 0.05 * torch.randn(RANK, hidden, generator=generator)
            tensors[f"{place}.lora_B.weight"] = 0.05 * torch.randn(width, RANK, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": sorted(outputs), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.engine
@pytest.mark.parametrize("group_heads", [1, 2])
def test_lora_is_applied_at_run_time(group_heads, start_engine, serving, tiny_model, make_adapter, tmp_path):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model, adapter = tiny_model("llama"), None
    prompts = serving.random_prompts((5, 17, 64))
    lora = LoRARequest("a-lora", 1, str(save_lora(tmp_path / "lora")))
    parameters = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

    def tokens(engine: Any, request: Any) -> list[tuple[int, ...]]:
        outputs = engine.generate(prompts, parameters, lora_request=request, use_tqdm=False)
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    found = []
    for adapter in (None, make_adapter(model, group_heads=group_heads)):
        engine = start_engine(model, adapter, enable_lora=True, max_lora_rank=RANK)
        found.append((tokens(engine, lora), tokens(engine, None)))
    stock, mkv = found
    assert stock[0] != stock[1]
    assert mkv == stock


def test_a_lora_is_no_adapter(tiny_model, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    mkv = {"adapter": str(save_lora(tmp_path / "lora"))}
    arguments = EngineArgs(
        model=str(tiny_model("llama")), attention_backend="mkv", max_model_len=256, additional_config={"mkv": mkv}
    )
    with pytest.raises(ValueError, match="peft_type is 'LORA'"):
        arguments.create_engine_config()


@pytest.mark.engine
def test_models_through_transformers(start_engine, serving, tiny_model, make_adapter):
    model = tiny_model("llama")
    prompts = serving.random_prompts((5, 17, 64))
    adapter = make_adapter(model, group_heads=2)
    expected = serving.greedy(start_engine(model), prompts, 24)
    assert serving.greedy(start_engine(model, adapter, model_impl="transformers"), prompts, 24) == expected
