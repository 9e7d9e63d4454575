# SPDX-License-Identifier: Apache-2.0
"""No adapter, a damaged one, or another model's, ends at start-up with one message: cause and mend."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_mkv.adapter import CONFIG_FILE, WEIGHTS_FILE, NoAdapterError

AGAIN = "make the adapter again"


def changed_model(model: Path, folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    config = json.loads((model / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), "utf-8")
    return folder


# --- no adapter


def test_sound_input_is_accepted(start, adapter):
    config = start({"adapter": str(adapter), "budget": 0.5})
    assert config.additional_config["mkv"]["digest"]


def test_no_adapter_named_and_none_beside_the_model(refused, model):
    refused("no adapter was named", f"vllm-mkv calibrate {model} --text FILE --output ADAPTER", NoAdapterError)
    refused(f"{model} has no folder mkv", "--additional-config", NoAdapterError, mkv={"budget": 0.5})


def test_an_adapter_beside_the_model_is_found(start, model, adapter, tmp_path):
    own = changed_model(model, tmp_path / "model")
    shutil.copytree(adapter, own / "mkv")
    assert start(model=str(own)).additional_config["mkv"]["digest"]


@pytest.mark.parametrize("path", ["/nowhere/adapter", "./nowhere", "~/nowhere-at-all"])
def test_no_adapter_there(refused, path):
    refused(f"there is no adapter at {Path(path).expanduser()}", "vllm-mkv calibrate", mkv={"adapter": path})


def test_an_adapter_that_is_a_file(refused, adapter):
    file = adapter / WEIGHTS_FILE
    refused(f"{file} is not a folder", f"a folder with {CONFIG_FILE}", mkv={"adapter": str(file)})


def test_a_folder_without_an_adapter(refused, model, tmp_path):
    refused(f"{tmp_path} holds no {CONFIG_FILE}", "vllm-mkv calibrate", mkv={"adapter": str(tmp_path)})
    refused(f"{model} holds no {CONFIG_FILE}", "vllm-mkv calibrate", mkv={"adapter": str(model)})


@pytest.mark.parametrize("endpoint", ["offline", "http://127.0.0.1:9"])
def test_a_hub_repository_that_cannot_be_reached(refused, monkeypatch, tmp_path, endpoint):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    if endpoint == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    cause = "there is no folder somebody/an-adapter, and the Hub gave no adapter of that name"
    refused(cause, "vllm-mkv calibrate", mkv={"adapter": "somebody/an-adapter"})


def test_a_name_that_no_repository_can_have(refused):
    refused("there is no folder a b/c d/e", "vllm-mkv calibrate", mkv={"adapter": "a b/c d/e"})


# --- damaged configurations


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def make_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        make_directory,
        lambda file: file.write_text("peft_type: MATRYOSHKA_KV"),
        lambda file: file.write_text(""),
        lambda file: file.write_bytes(b"\xff\xfe\x00{"),
    ],
    ids=["truncated", "unreadable", "yaml", "empty", "not utf-8"],
)
def test_a_configuration_that_cannot_be_read(refused, adapter, damage):
    damage(adapter / CONFIG_FILE)
    refused(f"{adapter / CONFIG_FILE} cannot be read as JSON", AGAIN, mkv={"adapter": str(adapter)})


def test_a_file_that_may_not_be_read(refused, adapter, monkeypatch):
    real = Path.read_text

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == adapter / CONFIG_FILE:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    refused("Permission denied", AGAIN, mkv={"adapter": str(adapter)})


@pytest.mark.parametrize("content", ["[]", "3", '{"peft_type": "LORA", "r": 8}'])
def test_json_that_is_no_adapter(refused, adapter, content):
    (adapter / CONFIG_FILE).write_text(content)
    refused(f"{adapter / CONFIG_FILE}: peft_type is", "no adapter of vllm-mkv", mkv={"adapter": str(adapter)})


@pytest.mark.parametrize("version", [2, 99])
def test_a_format_version_to_come(refused, adapter, version, change_config):
    change_config(adapter, format_version=version)
    refused(f"format_version is {version!r}", "in a clone of vllm-mkv", mkv={"adapter": str(adapter)})


@pytest.mark.parametrize("version", [0, "1", None])
def test_a_format_version_that_never_was(refused, adapter, version, change_config):
    change_config(adapter, format_version=version)
    refused(f"format_version is {version!r}", AGAIN, mkv={"adapter": str(adapter)})


def without_the_last_layer(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if name.startswith("layers.2.")]:
        del tensors[name]
    tensors["allocation.path"] = np.array(
        [[0, group, side, 3, 0] for group in range(2) for side in range(2)], dtype=np.int32
    )


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"basis": ...}, "key basis: Field required"),
        ({"model__head_size": ...}, "key model.head_size: Field required"),
        ({"lora_alpha": 16}, "key lora_alpha: Extra inputs"),
        ({"layers": "all"}, "key layers: "),
        ({"default_budget": 2.0}, "key default_budget: "),
        ({"group_heads": 0}, "key group_heads: "),
        ({"rank_step": 8}, "key rank_step: Input should be 16"),
        ({"group_heads": 3}, "group_heads 3 does not divide the model's 4 KV heads"),
        ({"model__head_size": 20, "group_heads": 1}, "latent groups of 20 coordinates, no multiple of 16"),
        ({"layers": [0, 1]}, "layers [0, 1] are not the model's layers 0 to 2"),
        ({"layers": [0, 1, 1]}, "layers [0, 1, 1] are not the model's layers 0 to 2"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_configuration_with_a_wrong_key(refused, adapter, changes, cause, change_config, change_tensors):
    if changes.get("layers") == [0, 1]:  # as an adapter of two layers would have it
        change_tensors(adapter, without_the_last_layer)
    change_config(adapter, **changes)
    refused(cause, AGAIN, mkv={"adapter": str(adapter)})


# --- damaged tensors


def flip_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (truncate, "cannot be read"),
        (make_directory, "cannot be read"),
        (Path.unlink, "cannot be read"),
        (lambda file: file.write_bytes(b""), "cannot be read"),
        (lambda file: file.write_bytes(pickle.dumps({"layers.0.key.A": 1})), "cannot be read"),
        (flip_one_bit, f"is not the file that {CONFIG_FILE} was written with"),
    ],
    ids=["truncated", "unreadable", "missing", "empty", "pickle", "tampered"],
)
def test_tensors_that_cannot_be_read(refused, adapter, damage, cause):
    damage(adapter / WEIGHTS_FILE)
    refused(f"{adapter / WEIGHTS_FILE} {cause}", AGAIN, mkv={"adapter": str(adapter)})


def put(name: str, place: Any, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][place] = value

    return change


def become(name: str, convert: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = np.ascontiguousarray(convert(tensors[name]))

    return change


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda tensors: tensors.pop("layers.1.key.B"), "tensor layers.1.key.B is missing"),
        (lambda tensors: tensors.pop("layers.2.value.mean"), "tensor layers.2.value.mean is missing"),
        (lambda tensors: tensors.pop("allocation.path"), "tensor allocation.path is missing"),
        (lambda tensors: tensors.update(more=np.zeros(1)), "tensor more is of nothing that adapter_config.json names"),
        (become("layers.0.value.C", lambda t: t[:, :, :32]), "tensor layers.0.value.C is float32 [2, 64, 32], not"),
        (become("layers.0.key.mean", lambda t: t[0]), "tensor layers.0.key.mean is float32 [64], not"),
        (become("layers.0.key.A", lambda t: t.astype(np.float16)), "tensor layers.0.key.A is float16"),
        (put("layers.2.key.A", (1, 2, 3), np.nan), "tensor layers.2.key.A is not finite"),
        (put("layers.0.value.mean", (0, 0), np.inf), "tensor layers.0.value.mean is not finite"),
        (put("layers.1.key.A", (0, 5), 1.0), "layers.1.key.A and key.B are no inverse pair"),
        (become("layers.1.value.D", lambda t: t.swapaxes(1, 2)), "layers.1.value.C and value.D are no inverse pair"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_tensor(refused, adapter, change, cause, change_tensors):
    change_tensors(adapter, change)
    refused(f"{adapter / WEIGHTS_FILE}: {cause}", AGAIN, mkv={"adapter": str(adapter)})


@pytest.mark.parametrize(
    ("steps", "cause"),
    [
        (
            [[0, 0, 0, 2, 0]],
            "fewer bits than the less important one after it",
        ),  # ranks would be no multiple of the step
        ([[0, 0, 0, 4, 0]], "outside"),
        ([[3, 0, 0, 3, 0]], "outside"),
        ([[0, 0, 2, 3, 0]], "outside"),
        ([[0, -1, 0, 3, 0]], "outside"),
        ([[0, 0, 0, 3, 3]], "from 16 bits to 3"),
        ([[0, 0, 0, 3, 0], [0, 0, 0, 3, 8]], "from 0 bits to 8"),
        ([[0, 0, 3, 0]], "not [steps, 5]"),
    ],
)
def test_a_path_that_is_no_way_down(refused, adapter, steps, cause, change_tensors):
    change_tensors(adapter, lambda tensors: tensors.update({"allocation.path": np.array(steps, np.int32)}))
    refused(f"{adapter / WEIGHTS_FILE}: tensor allocation.path: ", AGAIN, mkv={"adapter": str(adapter)})
    refused(cause, AGAIN, mkv={"adapter": str(adapter)})


def test_a_path_of_fractions_of_blocks(refused, adapter, change_tensors):
    steps = np.array([[0, 0, 0, 3.5, 0]], np.float32)
    change_tensors(adapter, lambda tensors: tensors.update({"allocation.path": steps}))
    refused("of integers", AGAIN, mkv={"adapter": str(adapter)})


# --- an adapter of another model


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
            "architecture is 'MistralForCausalLM', not 'Llama",
        ),
        ({"head_dim": 64}, "head_size is 64, not 32"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, not 3"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2, not 4"),
        ({"num_attention_heads": 16}, "num_attention_heads is 16, not 8"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope is {"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope is {"),
    ],
    ids=["architecture", "head size", "layers", "KV heads", "query heads", "RoPE theta", "RoPE scaling"],
)
def test_an_adapter_of_another_model(refused, model, adapter, tmp_path, changes, cause):
    other = changed_model(model, tmp_path / "other", **changes)
    mkv = {"adapter": str(adapter)}
    refused(cause, "Make an adapter for it: vllm-mkv calibrate", model=str(other), mkv=mkv)
    refused("this model differs", "vllm-mkv calibrate", model=str(other), mkv=mkv)


def test_groups_that_do_not_fit_a_tensor_parallel_rank(refused, start, model, tiny_model, make_adapter):
    whole = str(make_adapter(tiny_model("llama"), group_heads=4))
    mend = "--tensor-parallel-size"
    refused("groups of 4 KV heads do not fit the 2 KV heads", mend, mkv={"adapter": whole}, tensor_parallel_size=2)
    halves = str(make_adapter(tiny_model("llama"), group_heads=2))
    start({"adapter": halves}, tensor_parallel_size=2)
    refused("groups of 2 KV heads do not fit the 1 KV heads", mend, mkv={"adapter": halves}, tensor_parallel_size=8)
    singles = str(make_adapter(tiny_model("llama"), group_heads=1))
    start({"adapter": singles}, tensor_parallel_size=8)
