# SPDX-License-Identifier: Apache-2.0
"""What is known of a model before its weights are read."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from vllm_mkv.fit.model import Source


@pytest.fixture
def model(tiny_model, tmp_path):
    """A folder of a model in float32 whose configuration names no dtype."""
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config.pop("dtype") == "float32"
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def test_a_dtype_that_the_configuration_names_is_taken(tiny_model):
    assert Source(str(tiny_model("llama"))).dtype == torch.float32


def test_an_adapters_revision_is_of_the_model_that_it_names():
    config = SimpleNamespace(base_model_name_or_path="own/model", revision="tag")
    assert Source.of_adapter(config, None, None, False) == Source("own/model", "tag")
    assert Source.of_adapter(config, None, "other", True) == Source("own/model", "other", True)
    assert Source.of_adapter(config, "another/model", None, False) == Source("another/model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_that_it_does_not_name_is_that_of_the_weights(model, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in load_file(model / SAFE_WEIGHTS_NAME).items()}
    save_file({"a": torch.zeros(1, dtype=torch.int32), **weights}, model / SAFE_WEIGHTS_NAME, {"format": "pt"})
    source = Source(str(model))
    assert source.dtype == dtype and source.itemsize == dtype.itemsize
    assert source.load(device="cpu").dtype == dtype


def test_weights_in_several_files_have_a_dtype_too(model):
    (model / SAFE_WEIGHTS_NAME).rename(model / "model-00001-of-00001.safetensors")
    names = load_file(model / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (model / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index), "utf-8")
    assert Source(str(model)).dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: save_file({"a": torch.arange(3)}, file),
    ],
    ids=["no weights", "damaged", "integers"],
)
def test_no_dtype_anywhere_is_refused(model, change):
    change(model / SAFE_WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r'model names no dtype.*add "dtype": .* to its config.json'):
        _ = Source(str(model)).dtype
