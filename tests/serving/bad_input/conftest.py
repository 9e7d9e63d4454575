# SPDX-License-Identifier: Apache-2.0
"""An engine's start with whatever is wrong.

The models here have no weights at all: whoever loaded them before looking at the rest would say so instead.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vllm_mkv.adapter import CONFIG_FILE, WEIGHTS_FILE

SECONDS = 10
"""Of this process alone, the first import of what reads configurations included."""


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    """A Llama's configuration and tokenizer."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    shutil.copytree(tiny_model("llama"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def adapter(tiny_model, make_adapter, tmp_path) -> Path:
    """The Llama's adapter of 3 layers with 2 latent groups of 64 coordinates, to be damaged."""
    return shutil.copytree(make_adapter(tiny_model("llama"), group_heads=2), tmp_path / "adapter")


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
    """`refused(cause, mend, **arguments of start)`: starting raises one ValueError of one line that says both; where
    that is of a kind, `error` names it."""

    def check(cause: str, mend: str, error: type[ValueError] = ValueError, **arguments: Any) -> None:
        begun = time.process_time()
        with pytest.raises(ValueError) as caught:
            start(**arguments)
        assert time.process_time() - begun < SECONDS
        message = str(caught.value)
        assert type(caught.value) is error, message
        assert cause in message and mend in message, message
        assert "\n" not in message

    return check


@pytest.fixture
def change_config() -> Callable[..., None]:
    """`change_config(folder, **changes)`: keys of adapter_config.json; those of the fingerprint as `model__key`."""

    def change(folder: Path, **changes: Any) -> None:
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

    return change


@pytest.fixture
def change_tensors(change_config) -> Callable[..., None]:
    """`change_tensors(folder, change)`: writes the right checksum, so that what comes after it is reached."""

    def apply(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_FILE)
        change_config(folder, weights_sha256=hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest())

    return apply
