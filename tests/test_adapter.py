# SPDX-License-Identifier: Apache-2.0
"""The adapter's files: what is written is read, and what is wrong is refused with file, key and mend."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vllm_mkv.adapter import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    LayerBases,
    NoAdapterError,
    check_output,
    choose_budget,
    digest,
    locate,
)
from vllm_mkv.allocation import AllocationPath, CacheShape
from vllm_mkv.fingerprint import ModelFingerprint

FINGERPRINT = ModelFingerprint(
    architecture="LlamaForCausalLM",
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_size=16,
    rope={"rope_theta": 10000.0, "rope_type": "default"},
)
GROUPS, WIDTH = 2, 32
STOCK = {"name": "stock", "budget": 1.0, "bytes_per_token": 512, "perplexity": 3.5, "kl": 0.0, "top1": 1.0}


def random_adapter(seed=0):
    rng = np.random.default_rng(seed)

    def pair():
        A = rng.normal(size=(GROUPS, WIDTH, WIDTH)) + 4 * np.eye(WIDTH)
        return A.astype(np.float32), np.linalg.inv(A).swapaxes(-1, -2).astype(np.float32)

    bases = []
    for _ in range(2):
        (A, B), (C, Dt) = pair(), pair()
        means = rng.normal(size=(2, GROUPS, WIDTH)).astype(np.float32)
        bases.append(LayerBases(A, B, C, Dt.swapaxes(-1, -2), *means))
    config = AdapterConfig(
        base_model_name_or_path="some/model",
        model=FINGERPRINT,
        basis="query",
        group_heads=2,
        layers=[0, 1],
        default_budget=0.5,
        made={"seed": seed},
        quality=[STOCK, {**STOCK, "name": "mkv", "budget": 0.5}],
    )
    return Adapter(config, tuple(bases), AllocationPath.uniform(CacheShape(2, GROUPS, WIDTH)))


@pytest.fixture
def folder(tmp_path):
    random_adapter().save(tmp_path / "adapter", "a card")
    return tmp_path / "adapter"


def change_config(folder, **changes):
    """Keys of adapter_config.json, ... for none; those of the model as `model__key`."""
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text())
    for name, value in changes.items():
        *parents, key = name.split("__")
        place = config[parents[0]] if parents else config
        if value is ...:
            del place[key]
        else:
            place[key] = value
    file.write_text(json.dumps(config))


def change_tensors(folder, change):
    """Rewrites the tensors as someone would who also knows the checksum, so that the later checks are reached."""
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    change_config(folder, weights_sha256=hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest())


def test_what_is_written_is_read(folder):
    written, read = random_adapter(), Adapter.load(folder)
    assert read.config.model_copy(update={"weights_sha256": ""}) == written.config
    for a, b in zip(read.bases, written.bases, strict=True):
        for name in ("A", "B", "C", "D", "key_mean", "value_mean"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_array_equal(read.path.steps, written.path.steps)
    assert read.shape == CacheShape(2, GROUPS, WIDTH)
    assert (folder / CARD_FILE).read_text() == "a card"
    assert sorted(file.name for file in folder.parent.iterdir()) == ["adapter"]


def test_the_digest_follows_the_content(folder, tmp_path):
    random_adapter().save(tmp_path / "same", "another card")
    random_adapter(1).save(tmp_path / "other", "a card")
    assert digest(folder) == digest(tmp_path / "same") != digest(tmp_path / "other")


def test_saving_replaces_an_adapter_and_nothing_else(folder, tmp_path):
    random_adapter(1).save(folder, "newer")
    assert Adapter.load(folder).config.made == {"seed": 1}
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        random_adapter().save(tmp_path / "work", "")
    with pytest.raises(ValueError, match="is a file"):
        random_adapter().save(tmp_path / "work" / "thesis.tex", "")
    assert (tmp_path / "work" / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("config", ['{"peft_type": "LORA", "r": 16}', '{"peft_type": ', "[]"])
def test_an_adapter_of_another_kind_is_not_replaced(tmp_path, config):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / CONFIG_FILE).write_text(config)
    with pytest.raises(ValueError, match=r"lora holds other files than an adapter of vllm-mkv; name a folder that"):
        random_adapter().save(tmp_path / "lora", "")
    assert [file.name for file in (tmp_path / "lora").iterdir()] == [CONFIG_FILE]
    assert (tmp_path / "lora" / CONFIG_FILE).read_text() == config


def test_an_output_that_cannot_be_written_is_refused_before_any_work(folder, monkeypatch):
    with pytest.raises(ValueError, match="cannot write into /proc"):
        check_output("/proc/adapter")
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=f"{folder} is where this command runs"):
        check_output(".")


def test_a_damaged_adapter_and_an_empty_folder_can_be_replaced(folder, tmp_path):
    change_config(folder, basis=...)
    (tmp_path / "empty").mkdir()
    for place in (folder, tmp_path / "empty"):
        random_adapter(1).save(place, "")
        assert Adapter.load(place).config.made == {"seed": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [(float("nan"), "tensor layers.0.key.A is not finite"), (0.5, "layers.0.key.A and key.B are no inverse pair")],
)
def test_what_could_not_be_loaded_is_not_written(folder, change, reason):
    before, adapter = digest(folder), random_adapter(seed=1)
    adapter.bases[0].A[0, 0, 0] += change
    with pytest.raises(ValueError, match=rf"^what was made is no adapter, so {folder} is as it was: .*{reason}"):
        adapter.save(folder, "card")
    assert digest(folder) == before and [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_others_put_into_an_adapter_stays(folder):
    (folder / "widths.png").write_bytes(b"a drawing")
    (folder / "notes").mkdir()
    (folder / "notes" / CARD_FILE).write_text("mine")
    (folder / "latest").symlink_to("notes")
    random_adapter(1).save(folder, "newer")
    assert Adapter.load(folder).config.made == {"seed": 1}
    assert (folder / CARD_FILE).read_text() == "newer"
    assert (folder / "widths.png").read_bytes() == b"a drawing"
    assert (folder / "latest").is_symlink() and (folder / "latest" / CARD_FILE).read_text() == "mine"
    assert [file.name for file in folder.parent.iterdir()] == ["adapter"]


def test_a_link_stays_and_what_it_leads_to_is_written(folder, tmp_path):
    for name, target in (("link", "adapter"), ("dangling", "new")):
        (tmp_path / name).symlink_to(target)
        random_adapter(1).save(tmp_path / name, "")
        assert (tmp_path / name).is_symlink() and Adapter.load(tmp_path / target).config.made == {"seed": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "dangling", "link", "new"]


CONFIG_MISTAKES = {
    "no adapter of vllm-mkv": {"peft_type": "LORA"},
    "format_version is 2 .*a newer vllm-mkv wrote it: git pull and pip install": {"format_version": 2},
    "format_version is None .*copy or make the adapter again": {"format_version": ...},
    "format_version is 0 .*copy or make the adapter again": {"format_version": 0},
    "format_version is '1' .*copy or make the adapter again": {"format_version": "1"},
    "key surprise: Extra inputs": {"surprise": 1},
    "key r: Extra inputs": {"r": 16},
    "key basis: Field required": {"basis": ...},
    "key group_heads: ": {"group_heads": 0},
    "group_heads 3 does not divide": {"group_heads": 3},
    "key rank_step: ": {"rank_step": 8},
    "key default_budget: ": {"default_budget": 1.5},
    "key layers: ": {"layers": "all"},
    "key model.architecture: Field required": {"model": {}},
    r"layers \[0, 1, 1\] are not the model's layers 0 to 1": {"layers": [0, 1, 1]},
    r"layers \[1, 0\] are not": {"layers": [1, 0]},
    r"layers \[0, 2\] are not": {"layers": [0, 2]},
    r"layers \[-1, 0\] are not": {"layers": [-1, 0]},
    r"layers \[\] are not": {"layers": []},
    "key model.num_hidden_layers: .*greater than 0": {"model__num_hidden_layers": 0},
    "key model.num_key_value_heads: .*greater than 0": {"model__num_key_value_heads": 0},
    "key model.head_size: .*greater than 0": {"model__head_size": -16},
    "4 KV heads do not divide the model's 6 query heads": {"model__num_attention_heads": 6},
    "latent groups of 34 coordinates": {"model__head_size": 17},
    "key quality.0.budget: Field required": {"quality": [{"x": 1}]},
    "key quality.0.x: Extra inputs": {"quality": [STOCK | {"x": 1}]},
    "key quality.1.kl: Input should be a finite number": {"quality": [STOCK, STOCK | {"kl": math.nan}]},
    "key quality.0.top1: Input should be a valid number": {"quality": [STOCK | {"top1": "most"}]},
    "key weights_sha256: String should match": {"weights_sha256": ""},
}


@pytest.mark.parametrize("reason", CONFIG_MISTAKES)
def test_a_wrong_configuration_is_refused(folder, reason):
    change_config(folder, **CONFIG_MISTAKES[reason])
    with pytest.raises(ValueError, match=f"{CONFIG_FILE}.*{reason}"):
        Adapter.load(folder)


def test_rows_of_quality_may_have_no_name_and_whole_numbers(folder):
    rows = [{name: value for name, value in STOCK.items() if name != "name"} | {"budget": 1}]
    change_config(folder, quality=rows)
    assert Adapter.load(folder).config.quality == rows


def test_the_bundled_adapter_is_read():
    Adapter.load(Path(__file__).parents[1] / "examples" / "books-4m" / "mkv")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b'"x"'])
def test_a_configuration_that_is_no_json_object_is_refused(folder, content):
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=CONFIG_FILE):
        Adapter.load(folder)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no adapter_config.json.*vllm-mkv calibrate"):
        Adapter.load(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        Adapter.load(tmp_path / "nowhere")


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name].copy())

    return apply


def with_value(place, value):
    def apply(tensor):
        tensor[place] = value
        return tensor

    return apply


TENSOR_MISTAKES = {
    "tensor layers.1.key.B is missing": remove("layers.1.key.B"),
    "tensor layers.0.value.mean is missing": remove("layers.0.value.mean"),
    "tensor allocation.path is missing": remove("allocation.path"),
    r"tensor layers.0.key.A is float32 \[1, 32, 32\], not float32 \[2, 32, 32\]": put(
        "layers.0.key.A", lambda x: x[:1]
    ),
    "tensor layers.0.value.D is float16": put("layers.0.value.D", lambda x: x.astype(np.float16)),
    "tensor layers.1.value.C is not finite": put("layers.1.value.C", with_value((1, 3, 4), np.nan)),
    "tensor layers.1.key.mean is not finite": put("layers.1.key.mean", with_value((0, 0), np.inf)),
    "layers.0.key.A and key.B are no inverse pair": put("layers.0.key.A", with_value((0, 5, 5), 9.0)),
    "layers.1.value.C and value.D are no inverse pair": put("layers.1.value.D", lambda x: x.swapaxes(-1, -2).copy()),
    "allocation.path: step 0 names block": put("allocation.path", with_value((0, 0), 2)),
    "allocation.path: its shape is": put("allocation.path", lambda x: x[:, :4].copy()),
    "tensor layers.2.key.A is of nothing that adapter_config.json names": lambda tensors: tensors.update(
        {"layers.2.key.A": tensors["layers.1.key.A"].copy()}
    ),
    # By 0.01: little, and far above rounding.
    "layers.1.key.A and key.B are no inverse pair": put("layers.1.key.A", lambda x: 1.01 * x),
}


@pytest.mark.parametrize("reason", TENSOR_MISTAKES)
def test_wrong_tensors_are_refused(folder, reason):
    change_tensors(folder, TENSOR_MISTAKES[reason])
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE}.*{reason}.*copy or make the adapter again"):
        Adapter.load(folder)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(folder, size):
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[:size])
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE} cannot be read.*copy or make the adapter again"):
        Adapter.load(folder)


def test_a_missing_weights_file_is_refused(folder):
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE} cannot be read"):
        Adapter.load(folder)


def test_a_changed_file_is_refused(folder):
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[-100] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="weights_sha256"):
        Adapter.load(folder)


def test_tensors_that_no_checksum_binds_are_refused(folder):
    change_config(folder, weights_sha256=...)
    with pytest.raises(ValueError, match=r"weights_sha256.*copy or make the adapter again"):
        Adapter.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "MistralForCausalLM"},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 16},
        {"num_key_value_heads": 2},
        {"head_size": 32},
        {"rope": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
    ],
)
def test_a_model_that_differs_is_refused_by_property(change):
    adapter = random_adapter()
    adapter.check_model(FINGERPRINT)
    (key,) = change
    with pytest.raises(ValueError, match=f"made for some/model.*{key} is .*vllm-mkv calibrate"):
        adapter.check_model(FINGERPRINT.model_copy(update=change))


@pytest.mark.parametrize("layers", [(0, 1), (0,), (1,), ()])
def test_a_mean_of_keys_in_any_layer_does_not_suit_a_soft_cap(layers):
    adapter = random_adapter()
    for layer in {0, 1} - set(layers):
        adapter.bases[layer].key_mean[:] = 0
    if not layers:
        adapter.check_soft_cap()
        return
    with pytest.raises(ValueError, match="keys less their mean, and some/model has a soft-cap"):
        adapter.check_soft_cap()


def test_ranks_without_whole_groups_are_refused():
    adapter = random_adapter()
    adapter.check_shards(1)
    adapter.check_shards(2)
    for num_shards, reason in (
        (0, "0 tensor-parallel ranks hold no cache; use 1 at least"),
        (3, "2 latent groups per layer do not divide into 3"),
        (4, "groups of 2 KV heads do not fit the 1 KV heads of .* --group-heads 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            adapter.check_shards(num_shards)


def test_locate_finds_folders_and_names_what_is_missing(folder, tmp_path):
    assert locate(str(folder), None) == folder
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(NoAdapterError, match=r"no adapter was named and .*model has no folder mkv.*calibrate"):
        locate(None, str(model))
    random_adapter().save(model / "mkv", "")
    assert locate(None, str(model)) == model / "mkv"
    with pytest.raises(ValueError, match="there is no adapter at"):
        locate(str(tmp_path / "nowhere"), None)
    with pytest.raises(ValueError, match="give a folder or a Hub repository"):
        locate("", None)


def test_what_a_killed_write_put_aside_is_named(folder):
    aside = folder.rename(folder.with_name(".adapter.1a2b.old"))
    mend = f"put one aside: move {aside} to {folder}"
    for find in (Adapter.load, lambda place: locate(str(place), None)):
        with pytest.raises(ValueError, match=mend):
            find(folder)
    own = aside.rename(folder.with_name(".mkv.1a2b.old"))
    with pytest.raises(ValueError, match=f"put one aside: move {own}") as raised:
        locate(None, str(folder.parent))
    # Or `eval` and `bench` would measure without it.
    assert not isinstance(raised.value, NoAdapterError)


@pytest.fixture
def hub(folder, monkeypatch):
    """Downloads of the Hub: what was asked for, and a snapshot with the adapter, and with a model's own in `mkv`."""
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    random_adapter().save(folder / "mkv", "")
    return asked


def test_a_repository_is_downloaded_at_its_own_revision(folder, hub):
    files = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
    assert locate("some/adapter", "some/model", "v2", "v7") == folder
    assert locate(None, "some/model", None, "v7") == folder / "mkv"
    assert hub == [("some/adapter", "v2", files), ("some/model", "v7", [f"mkv/{name}" for name in files])]


def test_a_revision_of_no_repository_is_refused(folder, hub):
    with pytest.raises(ValueError, match=f"revision is of a Hub repository, and {folder} is a folder; leave it out"):
        locate(str(folder), None, "v2")
    for model in (str(folder), "some/model"):
        with pytest.raises(ValueError, match=f"the adapter is the folder mkv of {model}; leave it out"):
            locate(None, model, "v2")
    assert locate(None, str(folder), None, "v7") == folder / "mkv"
    assert not hub


def test_the_default_budget_is_the_adapters():
    config = random_adapter().config
    assert choose_budget(None, config) == 0.5
    assert choose_budget(1, config) == 1.0
    with pytest.raises(ValueError, match="is not in"):
        choose_budget(0, config)


def test_a_uniform_path_goes_down_the_adapters_own_widths():
    adapter = random_adapter()
    assert adapter.uniform_path.widths == (16, 0)
    (adapter.uniform_path.replay(0.5).ranks == WIDTH // 2).all()
