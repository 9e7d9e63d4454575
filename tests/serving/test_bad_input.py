# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong with what a user gives ends at start-up, with one message that names the cause and the mend.

The models here have no weights at all: whoever loaded them before looking at the rest would say so instead.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vllm_mkv.adapter import CONFIG_FILE, WEIGHTS_FILE

AGAIN = "make the adapter again"
SECONDS = 10
"""Of this process alone, the first import of what reads configurations included."""


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    """A Llama's configuration and tokenizer."""
    folder = tmp_path_factory.mktemp("llama") / "no-weights"
    shutil.copytree(tiny_model("llama"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def adapter(tiny_model, make_adapter, tmp_path) -> Path:
    """The Llama's adapter of 3 layers with 2 latent groups of 64 coordinates, to be damaged."""
    return shutil.copytree(make_adapter(tiny_model("llama"), group_heads=2), tmp_path / "adapter")


@pytest.fixture
def inspected_here(monkeypatch) -> None:
    """vLLM looks at a model's class in a process of its own, which takes half a minute on a busy machine."""
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())


@pytest.fixture
def start(inspected_here, model) -> Callable[..., Any]:
    """`start(mkv=..., **engine arguments)`: what every engine does before anything else, in the user's own process."""

    def create(mkv: Any = None, **arguments: Any) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        settings = {"model": str(model), "dtype": "float32", "max_model_len": 256, "attention_backend": "mkv"}
        if mkv is not None:
            settings["additional_config"] = {"mkv": mkv}
        return EngineArgs(**(settings | arguments)).create_engine_config()

    return create


@pytest.fixture
def refused(start) -> Callable[..., None]:
    """`refused(cause, mend, **arguments of start)`: starting raises one ValueError of one line that says both."""

    def check(cause: str, mend: str, **arguments: Any) -> None:
        begun = time.process_time()
        with pytest.raises(ValueError) as caught:
            start(**arguments)
        assert time.process_time() - begun < SECONDS
        message = str(caught.value)
        assert type(caught.value) is ValueError, message
        assert cause in message and mend in message, message
        assert "\n" not in message

    return check


def change_config(folder: Path, **changes: Any) -> None:
    """Keys of adapter_config.json; those of the fingerprint as `model__key`."""
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text("utf-8"))
    for name, value in changes.items():
        *parents, key = name.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        if value is ...:
            del place[key]
        else:
            place[key] = value
    file.write_text(json.dumps(config), "utf-8")


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Leaves no checksum behind, so that what comes after it is reached."""
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    change_config(folder, weights_sha256="")


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
    refused("no adapter was named", f"vllm-mkv calibrate {model} --text FILE --output ADAPTER")
    refused(f"{model} has no folder mkv", "--additional-config", mkv={"budget": 0.5})


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


@pytest.mark.parametrize("version", [2, 99, 0, "1", None])
def test_a_format_version_that_is_not_known(refused, adapter, version):
    change_config(adapter, format_version=version)
    refused(f"format_version is {version!r}", "upgrade vllm-mkv", mkv={"adapter": str(adapter)})


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
def test_a_configuration_with_a_wrong_key(refused, adapter, changes, cause):
    if changes.get("layers") == [0, 1]:  # as an adapter of two layers would have it
        last = [[2, group, side, 3, 0] for group in range(2) for side in range(2)]
        change_tensors(
            adapter, lambda tensors: tensors.update({"allocation.path": np.array(last, np.int32) - [[2, 0, 0, 0, 0]]})
        )
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
def test_a_wrong_tensor(refused, adapter, change, cause):
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
def test_a_path_that_is_no_way_down(refused, adapter, steps, cause):
    change_tensors(adapter, lambda tensors: tensors.update({"allocation.path": np.array(steps, np.int32)}))
    refused(f"{adapter / WEIGHTS_FILE}: tensor allocation.path: ", AGAIN, mkv={"adapter": str(adapter)})
    refused(cause, AGAIN, mkv={"adapter": str(adapter)})


def test_a_path_of_fractions_of_blocks(refused, adapter):
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


# --- options


@pytest.mark.parametrize("budget", [0, 0.0, -0.5, 1.01, 7, math.inf, -math.inf, math.nan])
def test_a_budget_out_of_range(refused, adapter, budget):
    refused(f"budget {budget:g} is not in (0, 1]", "such as 0.5", mkv={"adapter": str(adapter), "budget": budget})


@pytest.mark.parametrize("budget", ["0.5", "half", True, [0.5], {"keys": 0.5}])
def test_a_budget_that_is_no_number(refused, adapter, budget):
    refused(f"budget {budget!r} is not a number", "such as 0.5", mkv={"adapter": str(adapter), "budget": budget})


@pytest.mark.parametrize("allocation", ["path", "uniform"])
def test_a_budget_below_the_smallest_ranks(refused, start, adapter, allocation):
    # Rank 16 of 64 on both sides, in float32 as in any other dtype.
    mkv = {"adapter": str(adapter), "allocation": allocation}
    refused("budget 0.2 is smaller than the smallest", "use at least 0.25", mkv=mkv | {"budget": 0.2})
    start(mkv | {"budget": 0.25})


@pytest.mark.parametrize(
    ("options", "cause", "mend"),
    [
        ({"budgett": 0.5}, "unknown mkv option 'budgett'", "known are: adapter, revision, budget, allocation"),
        ({"adapter": 5}, "option 'adapter' is 5", "it should be a valid string"),
        ({"adapter": ""}, "adapter is ''", "give a folder or a Hub repository"),
        ({"allocation": "searched"}, "option 'allocation' is 'searched'", "it should be 'path' or 'uniform'"),
        ({"revision": 1}, "option 'revision' is 1", "it should be a valid string"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_options_that_are_not_known(refused, adapter, options, cause, mend):
    refused(cause, mend, mkv={"adapter": str(adapter)} | options)


@pytest.mark.parametrize("options", ["adapter", ["adapter"], 0.5, False])
def test_options_that_are_no_object(refused, options):
    refused(f'"mkv" is {options!r}', "give an object with some of: adapter", mkv=options)


def test_null_options(refused):
    refused('"mkv" is None', "give an object", additional_config={"mkv": None})


def test_options_in_the_wrong_place(refused, adapter):
    options = {"mkv": {"adapter": str(adapter)}, "budget": 0.5}
    refused("'budget' is beside \"mkv\"", "put it inside", additional_config=options)


def test_options_without_the_backend_are_warned_of(start, adapter, monkeypatch):
    records = []
    monkeypatch.setattr(logging.getLogger("vllm.mkv"), "handle", records.append)
    start({"adapter": str(adapter)}, attention_backend=None)
    assert [record.getMessage() for record in records] == [
        "--additional-config has options under mkv, which are ignored: give --attention-backend mkv"
    ]


def test_the_users_own_options_are_left_alone(start, adapter):
    given = {"mkv": {"adapter": str(adapter)}, "another": "plugin's"}
    config = start(additional_config=given)
    assert given == {"mkv": {"adapter": str(adapter)}, "another": "plugin's"}
    assert config.additional_config["another"] == "plugin's"
    # So the same options serve a newer adapter in the same place.
    change_config(adapter, made={"on": "another day"})
    assert (
        start(additional_config=given).additional_config["mkv"]["digest"] != config.additional_config["mkv"]["digest"]
    )


def test_an_adapter_that_changes_while_the_engine_starts(refused, start, adapter):
    digest = start({"adapter": str(adapter)}).additional_config["mkv"]["digest"]
    change_config(adapter, made={"on": "another day"})
    refused("changed while vLLM was starting", "start again", mkv={"adapter": str(adapter), "digest": digest})


# --- what the user sees


def test_only_this_errors_traceback_is_held_back(capsys, monkeypatch):
    from vllm_mkv.serving import compat

    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *raised: seen.append(raised))
    error = ValueError("the cause\nand the mend")
    compat.print_without_traceback(error)
    sys.excepthook(ValueError, error, None)
    assert capsys.readouterr().err == "vllm-mkv: error: the cause and the mend\n"
    assert not seen
    own = KeyError("the user's own bug")
    own.__context__ = error
    sys.excepthook(KeyError, own, None)
    assert seen == [(KeyError, own, None)]
    assert capsys.readouterr().err == ""


def serve(model: Path, *arguments: str) -> list[str]:
    vllm = Path(sys.executable).with_name("vllm")
    return [
        str(vllm),
        "serve",
        str(model),
        "--port",
        "1",
        "--max-model-len",
        "256",
        "--attention-backend",
        "mkv",
        *arguments,
    ]


def script(model: Path, **options: Any) -> list[str]:
    code = f"from vllm import LLM\nLLM({str(model)!r}, max_model_len=256, attention_backend='mkv', **{options!r})"
    return [sys.executable, "-c", code]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (lambda model: serve(model), "no adapter was named and "),
        (
            lambda model: serve(model, "--kv-cache-dtype", "fp8"),
            "--kv-cache-dtype fp8 is not supported with --attention-backend mkv; leave --kv-cache-dtype at auto",
        ),
        (
            lambda model: script(model, additional_config={"mkv": {"budgett": 0.5}}),
            "--additional-config: unknown mkv option 'budgett'; known are: adapter, revision, budget, allocation",
        ),
    ],
    ids=["serve without an adapter", "serve with fp8 pages", "LLM with a misspelt option"],
)
def test_a_process_ends_with_the_message_alone(model, command, message):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    ran = subprocess.run(command(model), capture_output=True, text=True, timeout=600, env=environment)
    output = ran.stdout + ran.stderr
    assert ran.returncode == 1, output
    assert ran.stderr.count(f"vllm-mkv: error: {message}") == 1, output
    assert output.count(message) == 1, output
    assert "Traceback" not in output, output
    assert ran.stderr.splitlines()[-1].startswith("vllm-mkv: error: "), output


def test_requests_longer_than_the_windows_of_an_adapter_are_warned_of(start, adapter, monkeypatch):
    records = []
    monkeypatch.setattr(logging.getLogger("vllm.mkv"), "handle", records.append)

    def warnings():
        return [record.getMessage() for record in records if record.levelname == "WARNING" and "MKV" in record.msg]

    start({"adapter": str(adapter)}, max_model_len=128)
    assert warnings() == []
    start({"adapter": str(adapter)}, max_model_len=256)
    (message,) = warnings()
    assert "windows of 128 tokens" in message and "--context 256" in message
