# SPDX-License-Identifier: Apache-2.0
"""With the plugin installed and MKV not asked for, vLLM starts as it does without the plugin."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import re
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import pytest

MAX_MILLISECONDS = 50
LIGHT = {"vllm_mkv", "vllm_mkv.plugin", "vllm_mkv.serving", "vllm_mkv.serving.compat"}
"""All of the plugin that a stock start loads."""


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python, with the user's environment rather than the one of these tests."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    command = [sys.executable, "-c", code, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400, env=own | environment)
    assert ran.returncode == 0, ran.stderr
    return ran


# Forked children are fresh processes that have all of vLLM's front end and nothing of the plugin.
MEASURE = """
import json, os, statistics, sys, time
import vllm.engine.arg_utils

assert not any(name.startswith(("vllm_mkv", "mkv_kernels")) for name in sys.modules)
modules = set(sys.modules)

def measure():
    begun = time.process_time()  # what other processes do meanwhile is not registering's cost
    from vllm_mkv.plugin import register
    register()
    first = time.process_time() - begun
    register()
    return {
        "milliseconds": 1e3 * first,
        "modules": sorted(set(sys.modules) - modules),
        "registered": "MKV" in vllm.engine.arg_utils.AttentionBackendEnum.__members__,
    }

def in_a_child():
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.write(writer, json.dumps(measure()).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as stream:
        found = json.load(stream)
    os.waitpid(child, 0)
    return found

print("FOUND", json.dumps([in_a_child() for _ in range(9)]))
"""


@pytest.fixture(scope="module")
def measured() -> tuple[list[dict[str, Any]], str]:
    """What registering does in fresh processes, and all that they print at vLLM's own log level."""
    ran = run(MEASURE)
    found = next(line for line in ran.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(found.removeprefix("FOUND ")), (ran.stdout + ran.stderr).replace(found, "")


def test_registering_costs_next_to_nothing(measured):
    times = sorted(child["milliseconds"] for child in measured[0])
    assert times[len(times) // 2] < MAX_MILLISECONDS, times


def test_registering_loads_the_plugin_and_its_seam_alone(measured):
    for child in measured[0]:
        assert child["registered"]
        assert set(child["modules"]) == LIGHT


def test_registering_says_nothing(measured):
    assert "mkv" not in measured[1].lower(), measured[1]


def test_registering_twice_changes_nothing_more():
    import vllm.engine.arg_utils as arg_utils
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_mkv.plugin import register

    register()
    before = (list(AttentionBackendEnum), arg_utils.EngineArgs.create_engine_config)
    register()
    assert (list(AttentionBackendEnum), arg_utils.EngineArgs.create_engine_config) == before
    assert not hasattr(before[1].mkv_original, "mkv_original")
    assert [member.name for member in AttentionBackendEnum].count("MKV") == 1


@pytest.mark.parametrize(
    ("arguments", "level"),
    [
        (["vllm", "serve", "a-model"], logging.DEBUG),
        (["vllm", "serve", "a-model", "--attention-backend", "MKV"], logging.ERROR),
        (["vllm", "serve", "a-model", "--attention-backend=mkv"], logging.ERROR),
    ],
)
@pytest.mark.parametrize("broken", ["registry", "members", "front end"])
def test_registering_never_raises(monkeypatch, caplog, arguments, level, broken):
    import vllm.engine.arg_utils as arg_utils
    from vllm.v1.attention.backends import registry

    from vllm_mkv.plugin import register

    if broken == "registry":
        monkeypatch.setitem(sys.modules, registry.__name__, None)
        monkeypatch.delattr(sys.modules["vllm.v1.attention.backends"], "registry")
    elif broken == "members":
        monkeypatch.delattr(registry, "AttentionBackendEnum")
    else:
        monkeypatch.delattr(arg_utils.EngineArgs, "create_engine_config")
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.DEBUG, "vllm.mkv"):
        register()
    (record,) = {(record.levelno, record.getMessage()) for record in caplog.records if record.name == "vllm.mkv"}
    assert record[0] == level
    assert "vllm-mkv cannot run in this vLLM" in record[1] and "it supports vLLM 0.32 and 0.33" in record[1]


CONFIGURE = """
import json, logging, sys

records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append((record.name, record.levelname, record.getMessage()))

from vllm.engine.arg_utils import EngineArgs
logging.getLogger("vllm").addHandler(Keep())
config = EngineArgs(model=sys.argv[1], max_model_len=256).create_engine_config()
print("FOUND", json.dumps({
    "config": {name: repr(getattr(config, name)) for name in vars(config)},
    "hash": config.compute_hash(),
    "records": records,
    "modules": sorted(sys.modules),
    "backend": getattr(EngineArgs.create_engine_config, "mkv_original", None) is not None,
}))
"""


@pytest.mark.slow
def test_a_stock_engine_is_configured_alike(tiny_model):
    model = str(tiny_model("llama"))
    others = {plugin.name for plugin in entry_points(group="vllm.general_plugins")} - {"mkv"}
    with_plugin, without = (
        json.loads(re.search("^FOUND (.*)$", run(CONFIGURE, model, **environment).stdout, re.MULTILINE)[1])
        for environment in ({}, {"VLLM_PLUGINS": ",".join(others)})
    )
    assert with_plugin["backend"] and not without["backend"]
    assert not [name for name in without["modules"] if name.startswith("vllm_mkv")]
    for found in (with_plugin, without):
        assert found["config"].pop("instance_id")
    assert with_plugin["config"] == without["config"]
    assert with_plugin["hash"] == without["hash"]
    assert with_plugin["records"] == without["records"]
    assert set(with_plugin["modules"]) - set(without["modules"]) == LIGHT


def test_the_member_is_copied_as_itself():
    from vllm.config import AttentionConfig
    from vllm.engine.arg_utils import EngineArgs  # noqa: F401

    from vllm_mkv.plugin import register

    register()
    config = AttentionConfig(backend="mkv", backend_per_kind={"full_attention": "MKV"})
    for copied in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied.backend is config.backend
        assert copied.backend_per_kind["full_attention"] is config.backend
    assert config.backend.name == "MKV"
    assert config.backend.get_path() == "vllm_mkv.serving.backend.MKVAttentionBackend"


UNPICKLE = """
import pickle, sys
member = pickle.loads(bytes.fromhex(sys.argv[1]))
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.platforms.cpu import CpuPlatform
from vllm.model_executor import model_loader
assert member is AttentionBackendEnum["MKV"]
assert hasattr(CpuPlatform.get_attn_backend_cls, "mkv_original")
assert hasattr(model_loader.get_model_loader, "mkv_original")
"""


@pytest.mark.slow
def test_the_member_is_unpickled_in_a_fresh_process_which_is_then_ready():
    from vllm.engine.arg_utils import EngineArgs  # noqa: F401

    from vllm_mkv.plugin import register
    from vllm_mkv.serving import compat

    register()
    run(UNPICKLE, pickle.dumps(compat.mkv_member()).hex())


EARLY = """
import sys
from vllm.plugins import load_general_plugins

load_general_plugins()
assert "vllm.engine.arg_utils" not in sys.modules, "this test needs the front end to be loaded later"
from vllm import LLM

try:
    LLM(sys.argv[1], attention_backend="mkv", enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=1 << 24)
except ValueError as error:
    print("REFUSED", error)
"""


@pytest.mark.engine
def test_plugins_that_are_loaded_before_the_front_end_never_serve_stock_in_place_of_mkv(tiny_model):
    ran = run(EARLY, str(tiny_model("llama")), VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind")
    assert "REFUSED no adapter was named" in ran.stdout
