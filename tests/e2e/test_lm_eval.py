# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness drives this backend by its own command, on local tasks, as the README shows."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

ROLLING = """\
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""

CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tasks(tmp_path: Path, text_file: Path) -> Path:
    """A folder of two tasks and their data."""
    rng, words = random.Random(0), text_file.read_text("utf-8").split()
    vocabulary = sorted(set(words))
    file, folder = tmp_path / "documents.jsonl", tmp_path / "tasks"
    folder.mkdir()
    documents = [
        {"text": " ".join(words[i : i + 60]), "choices": rng.sample(vocabulary, 3), "answer": rng.randrange(3)}
        for i in range(0, 720, 60)
    ]
    file.write_text("".join(json.dumps(document) + "\n" for document in documents), "utf-8")
    for name, task in (("text", ROLLING), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(task.format(file=file), "utf-8")
    return folder


def test_lm_eval_scores_mkv_at_full_rank_as_stock(tiny_model, make_adapter, tasks, start_command, tmp_path):
    model = tiny_model("llama")
    settings = {
        "pretrained": str(model),
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 26,
    }
    mkv = {
        "attention_backend": "mkv",
        "additional_config": {"mkv": {"adapter": str(make_adapter(model, 2)), "budget": 1.0}},
    }
    commands = {
        name: start_command(
            *("lm_eval", "--model", "vllm", "--model_args", json.dumps(settings | options)),
            *("--tasks", "local_text,local_choice", "--include_path", str(tasks)),
            *("--batch_size", "auto", "--output_path", str(tmp_path / name)),
        )
        for name, options in (("stock", {}), ("mkv", mkv))
    }
    said = {name: command.finish() for name, command in commands.items()}
    assert re.search(r"MKV: adapter .* budget 1 asked and 1\.0000 reached", said["mkv"])
    assert "MKV: " not in said["stock"]
    bits, accuracy = scores(tmp_path / "mkv")
    assert bits > 0 and 0 <= accuracy <= 1
    assert [bits, accuracy] == pytest.approx(scores(tmp_path / "stock"), abs=1e-3)


def scores(output: Path) -> list[float]:
    """Bits per byte of the one task and accuracy in the other, in the results that lm_eval wrote."""
    (file,) = output.rglob("results_*.json")
    found = json.loads(file.read_text("utf-8"))["results"]
    return [found["local_text"]["bits_per_byte,none"], found["local_choice"]["acc,none"]]
