# SPDX-License-Identifier: Apache-2.0
"""Options that are wrong end at start-up with one message that names the cause and the mend; odd ones are warned of."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest


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
        (
            {"budgett": 0.5},
            "unknown mkv option 'budgett'",
            "known are: adapter, revision, budget, allocation, kernels, fold",
        ),
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


@pytest.mark.parametrize(
    "name", ["adapter", "revision", "budget", "allocation", "kernels", "fold", "Budget", "budgets"]
)
def test_options_in_the_wrong_place(refused, adapter, name):
    options = {"mkv": {"adapter": str(adapter)}, name: 0.5}
    refused(f"'{name}' is beside \"mkv\"", "put it inside", additional_config=options)


@pytest.mark.parametrize("name", ["MKV", "mvk", "Mkv"])
def test_a_misspelt_key(refused, adapter, name):
    options = {name: {"adapter": str(adapter), "budget": 0.5}}
    refused(f"{name!r} is not known", 'under "mkv"', additional_config=options)


def test_a_default_is_not_called_asked(start, adapter):
    from vllm_mkv.serving.options import MKVOptions
    from vllm_mkv.serving.plan import ServingPlan

    for mkv, words in (({}, "budget 0.5 by default and 0.5000 reached"), ({"budget": 0.5}, "budget 0.5 asked and 0.5")):
        config = start({"adapter": str(adapter), **mkv})
        assert words in ServingPlan.make(config, MKVOptions.of(config)).describe()


def test_options_without_the_backend_are_warned_of(start, adapter, monkeypatch):
    records = []
    monkeypatch.setattr(logging.getLogger("vllm.mkv"), "handle", records.append)
    start({"adapter": str(adapter)}, attention_backend=None)
    assert [record.getMessage() for record in records] == [
        "--additional-config has options under mkv, which are ignored: give --attention-backend mkv"
    ]


def test_the_users_own_options_are_left_alone(start, adapter, change_config):
    given = {"mkv": {"adapter": str(adapter)}, "another": "plugin's"}
    config = start(additional_config=given)
    assert given == {"mkv": {"adapter": str(adapter)}, "another": "plugin's"}
    assert config.additional_config["another"] == "plugin's"
    # So the same options serve a newer adapter in the same place.
    change_config(adapter, made={"on": "another day"})
    assert (
        start(additional_config=given).additional_config["mkv"]["digest"] != config.additional_config["mkv"]["digest"]
    )


def test_an_adapter_that_changes_while_the_engine_starts(refused, start, adapter, change_config):
    digest = start({"adapter": str(adapter)}).additional_config["mkv"]["digest"]
    change_config(adapter, made={"on": "another day"})
    refused(
        "changed while vLLM was starting", "without the option digest", mkv={"adapter": str(adapter), "digest": digest}
    )


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


def test_another_model_of_the_same_shape_is_warned_of(start, model, adapter, change_config, monkeypatch):
    records = []
    monkeypatch.setattr(logging.getLogger("vllm.mkv"), "handle", records.append)
    for base, warned in ((f"elsewhere/{model.name}", 0), ("somebody/another-model", 1)):
        records.clear()
        change_config(adapter, base_model_name_or_path=base)
        start({"adapter": str(adapter)}, max_model_len=128)
        assert [r.levelname for r in records].count("WARNING") == warned
    assert "was made for somebody/another-model" in records[-1].getMessage()


@pytest.mark.parametrize(
    ("max_model_len", "calibrated", "mend"), [(128, 64, "--context 65"), (64, 100, "--context 64")]
)
def test_the_other_rotary_embedding_is_warned_of(max_model_len, calibrated, mend, monkeypatch):
    from vllm_mkv.serving import configure

    records = []
    monkeypatch.setattr(configure.logger, "handle", records.append)
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    model = SimpleNamespace(hf_text_config=SimpleNamespace(rope_parameters=rope), max_model_len=max_model_len)
    configure.warn_of_long_rope(model, max_model_len)
    assert not records
    configure.warn_of_long_rope(model, calibrated)
    assert len(records) == 1 and mend in records[0].getMessage()
    rope["rope_type"] = "default"
    configure.warn_of_long_rope(model, calibrated)
    assert len(records) == 1
