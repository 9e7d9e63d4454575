# SPDX-License-Identifier: Apache-2.0
"""The adapter: the one contract between preparing a model and serving it.

A folder with `adapter_config.json`, `adapter_model.safetensors` and a model card `README.md`. Tensors, all float32 but
the path, with G latent groups of n = group_heads * head_size coordinates:

    layers.{i}.key.A, layers.{i}.key.B       [G, n, n], A B^T = I: the cache holds the first columns of (k - mean) A
    layers.{i}.value.C, layers.{i}.value.D   [G, n, n], C D = I:   the cache holds the first columns of (v - mean) C
    layers.{i}.key.mean, layers.{i}.value.mean  [G, n]
    allocation.path                          int32 [steps, 5]: layer, latent group, side, block, new width
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NotRequired

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, with_config
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from typing_extensions import TypedDict

from mkv_kernels.layout import BLOCK
from vllm_mkv.allocation import AllocationPath, CacheShape, check_budget, split_groups
from vllm_mkv.fingerprint import ModelFingerprint
from vllm_mkv.folder import check_replaceable, put_aside, replaced

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
FORMAT_VERSION = 1
MATRICES = (("key", "A"), ("key", "B"), ("value", "C"), ("value", "D"))
AGAIN = "copy or make the adapter again"
INVERSE_TOLERANCE = 1e-3
"""Largest entry of `A B^T - I` and `C D - I` that float32 rounding of a well-conditioned pair explains."""


@with_config(ConfigDict(extra="forbid", strict=True))
class NoAdapterError(ValueError):
    """A model has no adapter of its own."""


class QualityRow(TypedDict):
    """What was measured of a cache: "mkv" where it has no name, "stock" for the model's own."""

    name: NotRequired[str]
    budget: FiniteFloat
    bytes_per_token: int
    perplexity: FiniteFloat
    kl: FiniteFloat
    top1: FiniteFloat


class AdapterConfig(BaseModel):
    """`adapter_config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    peft_type: Literal["MATRYOSHKA_KV"] = "MATRYOSHKA_KV"
    format_version: int = FORMAT_VERSION
    base_model_name_or_path: str
    revision: str | None = None
    model: ModelFingerprint
    basis: str
    group_heads: int = Field(ge=1)
    rank_step: Literal[16] = BLOCK  # type: ignore[assignment]
    layers: list[int]
    default_budget: float = Field(gt=0, le=1)
    made: dict[str, Any] = {}
    quality: list[QualityRow] = []
    weights_sha256: str = Field(default="", pattern="^[0-9a-f]{64}$")
    """Empty until the adapter is saved; never in a file."""


@dataclass(frozen=True, eq=False)
class LayerBases:
    """Bases of one layer, float32; see the module's docstring for shapes and conventions."""

    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray
    key_mean: np.ndarray
    value_mean: np.ndarray


@dataclass(frozen=True)
class Adapter:
    """A validated adapter. `bases[i]` belongs to the model's layer `config.layers[i]`."""

    config: AdapterConfig
    bases: tuple[LayerBases, ...]
    path: AllocationPath

    @property
    def shape(self) -> CacheShape:
        return self.path.shape

    @cached_property
    def uniform_path(self) -> AllocationPath:
        """All latent groups alike, down the same widths as the adapter's own path."""
        return AllocationPath.uniform(self.shape, self.path.widths if len(self.path.steps) else (16, 0))

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """Reads and validates an adapter.

        Raises:
            ValueError: names the file, the key and the mend.
        """
        folder = Path(folder)
        config = read_config(folder)
        return cls(config, *_read_tensors(folder / WEIGHTS_FILE, config))

    def check_model(self, fingerprint: ModelFingerprint) -> None:
        """Raises ValueError unless the adapter was made for a model of this fingerprint."""
        differences = self.config.model.differences(fingerprint)
        if differences:
            raise ValueError(
                f"the adapter was made for {self.config.base_model_name_or_path}, and this model differs: "
                f"{'; '.join(differences)}. Make an adapter for it: vllm-mkv calibrate MODEL --text FILE "
                "--output ADAPTER"
            )

    def check_soft_cap(self) -> None:
        """Raises ValueError unless all means of keys are 0, as a model that caps its attention scores needs.

        A mean that is not stored shifts all scores of a query alike, which softmax ignores and a cap does not.
        """
        if any(bases.key_mean.any() for bases in self.bases):
            raise ValueError(
                f"the adapter stores keys less their mean, and {self.config.base_model_name_or_path} has a soft-cap of "
                "attention scores, which have to be whole where they are capped. Make the adapter again: "
                "vllm-mkv calibrate MODEL --text FILE --output ADAPTER"
            )

    def check_shards(self, num_shards: int) -> None:
        """Raises ValueError unless each of so many tensor-parallel ranks has whole latent groups."""
        split_groups(range(self.shape.num_groups), num_shards)
        # vLLM gives every rank one KV head at least, and repeats heads where ranks outnumber them.
        per_shard, group_heads = max(1, self.config.model.num_key_value_heads // num_shards), self.config.group_heads
        if per_shard % group_heads:
            raise ValueError(
                f"the adapter's latent groups of {group_heads} KV heads do not fit the {per_shard} KV heads of a "
                f"tensor-parallel rank; use a smaller --tensor-parallel-size than {num_shards}, or make an adapter "
                "with fewer heads per group (vllm-mkv calibrate MODEL --text FILE --output ADAPTER --group-heads "
                f"{per_shard})"
            )

    def save(self, folder: str | Path, card: str) -> None:
        """Writes the whole folder at once: it is complete or as it was. Files of others in it stay.

        Raises:
            ValueError: the folder is not to be written to, or this is no adapter that could be loaded.
        """
        folder = check_output(folder)
        tensors = {"allocation.path": np.ascontiguousarray(self.path.steps, dtype=np.int32)}
        for layer, bases in zip(self.config.layers, self.bases, strict=True):
            for side, name in MATRICES:
                tensors[f"layers.{layer}.{side}.{name}"] = np.ascontiguousarray(getattr(bases, name), np.float32)
            tensors[f"layers.{layer}.key.mean"] = np.ascontiguousarray(bases.key_mean, np.float32)
            tensors[f"layers.{layer}.value.mean"] = np.ascontiguousarray(bases.value_mean, np.float32)
        with replaced(folder, (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)) as staging:
            save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "np"})
            (staging / WEIGHTS_FILE).chmod(0o644)
            config = self.config.model_copy(update={"weights_sha256": _sha256(staging / WEIGHTS_FILE)})
            (staging / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n", "utf-8")
            (staging / CARD_FILE).write_text(card, "utf-8")
            try:
                Adapter.load(staging)
            except ValueError as error:
                reason = str(error).replace(f"{staging}{os.sep}", "").removesuffix(f"; {AGAIN}")
                raise ValueError(f"what was made is no adapter, so {folder} is as it was: {reason}") from error


def check_output(folder: str | Path) -> Path:
    """The folder to write an adapter to, its links resolved.

    Raises:
        ValueError: it is a file, holds files and no adapter of vllm-mkv, or cannot be written; names the mend.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder that is new, empty, or an adapter")
    if folder.exists() and any(folder.iterdir()):
        try:
            _read_json(folder)
        except ValueError as error:
            raise ValueError(
                f"{folder} holds other files than an adapter of vllm-mkv; name a folder that is new, empty, or an "
                "adapter"
            ) from error
    check_replaceable(folder)
    return folder


def digest(folder: str | Path) -> str:
    """Hexadecimal digest of what an adapter computes: its configuration, which holds its tensors' checksum."""
    return _sha256(Path(folder) / CONFIG_FILE)[:16]


def _read_json(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` says. Raises ValueError where there is none, or it is of something else."""
    file = folder / CONFIG_FILE
    if not folder.is_dir():
        what = f"an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        raise ValueError(f"{folder} is not a folder, and {what}; {_how_to_get(folder)}")
    if not file.exists():
        raise ValueError(f"{folder} holds no {CONFIG_FILE}, so it is no adapter; {HOW_TO_MAKE_ONE}")
    try:
        raw = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}); {AGAIN}") from error
    if not isinstance(raw, dict) or raw.get("peft_type") != "MATRYOSHKA_KV":
        found = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f'{file}: peft_type is {found!r}, not "MATRYOSHKA_KV", so it is no adapter of vllm-mkv')
    return raw


def read_config(folder: Path) -> AdapterConfig:
    """Reads `adapter_config.json`. Raises ValueError naming file, key and mend."""
    file, raw = folder / CONFIG_FILE, _read_json(folder)
    version = raw.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise ValueError(
            f"{file}: format_version is {version!r} and this vllm-mkv reads versions up to {FORMAT_VERSION}; "
            + ("a newer vllm-mkv wrote it: git pull and pip install . in a clone of vllm-mkv" if newer else AGAIN)
        )
    try:
        config = AdapterConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{file}: key {key}: {first['msg']}; make the adapter again with vllm-mkv") from error
    contradiction = _contradiction(config)
    if contradiction:
        raise ValueError(f"{file}: {contradiction}; {AGAIN}")
    return config


def _contradiction(config: AdapterConfig) -> str | None:
    """What of a configuration, each key of which may be right, cannot be."""
    model, group_heads, layers = config.model, config.group_heads, config.layers
    heads, width = model.num_key_value_heads, group_heads * model.head_size
    if not layers or not all(a < b for a, b in pairwise([-1, *layers, model.num_hidden_layers])):
        return f"layers {layers} are not the model's layers 0 to {model.num_hidden_layers - 1}, in order and each once"
    if model.num_attention_heads % heads:
        return f"{heads} KV heads do not divide the model's {model.num_attention_heads} query heads"
    if heads % group_heads:
        return f"group_heads {group_heads} does not divide the model's {heads} KV heads"
    if width % BLOCK:
        return (
            f"group_heads {group_heads} and head_size {model.head_size} give latent groups of {width} coordinates, "
            f"no multiple of {BLOCK}"
        )
    return None


HOW_TO_MAKE_ONE = "make one with: vllm-mkv calibrate MODEL --text FILE --output ADAPTER"


def _how_to_get(folder: Path) -> str:
    """An adapter that is not in `folder`."""
    aside = put_aside(folder)
    return f"a write that was cut off put one aside: move {aside} to {folder}" if aside else HOW_TO_MAKE_ONE


def _read_tensors(file: Path, config: AdapterConfig) -> tuple[tuple[LayerBases, ...], AllocationPath]:
    try:
        tensors = load_file(file)
        checksum = _sha256(file)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{file} cannot be read ({error}); {AGAIN}") from error
    if checksum != config.weights_sha256:
        raise ValueError(f"{file} is not the file that {CONFIG_FILE} was written with (weights_sha256); {AGAIN}")
    width, groups = config.group_heads * config.model.head_size, config.model.num_key_value_heads // config.group_heads

    def get(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{file}: tensor {name} is missing; {AGAIN}")
        tensor = tensors.pop(name)
        if tensor.shape != shape or tensor.dtype != np.float32:
            raise ValueError(
                f"{file}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, not float32 {list(shape)}; {AGAIN}"
            )
        if not np.isfinite(tensor).all():
            raise ValueError(f"{file}: tensor {name} is not finite; {AGAIN}")
        return tensor

    bases = []
    for layer in config.layers:
        A, B, C, D = (get(f"layers.{layer}.{side}.{name}", (groups, width, width)) for side, name in MATRICES)
        means = [get(f"layers.{layer}.{side}.mean", (groups, width)) for side in ("key", "value")]
        for label, product in (("key.A and key.B", A @ B.swapaxes(-1, -2)), ("value.C and value.D", C @ D)):
            residual = float(np.abs(product - np.eye(width, dtype=np.float32)).max())
            if not residual <= INVERSE_TOLERANCE:
                raise ValueError(f"{file}: layers.{layer}.{label} are no inverse pair (off by {residual:.2g}); {AGAIN}")
        bases.append(LayerBases(A, B, C, D, *means))
    if "allocation.path" not in tensors:
        raise ValueError(f"{file}: tensor allocation.path is missing; {AGAIN}")
    path = AllocationPath(CacheShape(len(config.layers), groups, width), tensors.pop("allocation.path"))
    if tensors:
        raise ValueError(f"{file}: tensor {min(tensors)} is of nothing that {CONFIG_FILE} names; {AGAIN}")
    try:
        path.validate()
    except ValueError as error:
        raise ValueError(f"{file}: tensor allocation.path: {error}; {AGAIN}") from error
    return tuple(bases), path


def locate(
    adapter: str | None, model: str | None, revision: str | None = None, model_revision: str | None = None
) -> Path:
    """The local folder of an adapter.

    Args:
        adapter: a folder or a Hub repository; None for the folder `mkv` of the model.
        model: a folder or a Hub repository, looked into where `adapter` is None.
        revision, model_revision: of the Hub repositories.

    Raises:
        NoAdapterError: no adapter is named, and the model has none; names the command that makes one.
        ValueError: what is named is not there. A revision of what is no repository.
    """
    if adapter is not None:
        if not isinstance(adapter, str) or not adapter:
            raise ValueError(f"adapter is {adapter!r}; give a folder or a Hub repository")
        if Path(adapter).exists() or adapter.startswith((".", "/", "~")):
            folder = Path(adapter).expanduser()
            if not folder.exists():
                raise ValueError(f"there is no adapter at {folder}; {_how_to_get(folder)}")
            if revision is not None:
                raise ValueError(f"revision is of a Hub repository, and {folder} is a folder; leave it out")
            return folder
        return _download(adapter, revision, "")
    if revision is not None:
        raise ValueError(
            f"revision is of an adapter's Hub repository, and the adapter is the folder mkv of {model}; leave it out"
        )
    if model and Path(model).is_dir():
        folder = Path(model) / "mkv"
    elif model:
        folder = _download(model, model_revision, "mkv")
    else:
        folder = Path("mkv")
    if not folder.is_dir():
        if put_aside(folder):
            raise ValueError(f"there is no adapter at {folder}; {_how_to_get(folder)}")
        raise NoAdapterError(
            f"no adapter was named and {model} has no folder mkv; make one with: vllm-mkv calibrate {model} "
            '--text FILE --output ADAPTER, and name it: --additional-config \'{"mkv": {"adapter": "ADAPTER"}}\''
        )
    return folder


def _download(repository: str, revision: str | None, subfolder: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [prefix + name for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns)) / subfolder
    except (OSError, ValueError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"there is no folder {repository}, and the Hub gave no adapter of that name ({reason}); {HOW_TO_MAKE_ONE}"
        ) from error


def choose_budget(budget: object, config: AdapterConfig) -> float:
    """The budget to serve at: the one asked for, or the adapter's default."""
    if budget is None:
        return config.default_budget
    check_budget(budget)
    return float(budget)  # type: ignore[arg-type]


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
