# SPDX-License-Identifier: Apache-2.0
"""What is measured: a model, and its adapter where it has one, from the one name that the user gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_mkv.adapter import CONFIG_FILE, HOW_TO_MAKE_ONE, Adapter, NoAdapterError, digest, locate
from vllm_mkv.allocation import Allocation, AllocationPath
from vllm_mkv.fit.calibrate import cache_shape
from vllm_mkv.fit.model import Source

ALLOCATIONS = ("path", "uniform")
"""What `Subject.path` knows."""


@dataclass(frozen=True)
class Subject:
    source: Source
    folder: Path | None
    """Of the adapter."""
    adapter: Adapter | None

    @classmethod
    def find(
        cls, name: str, *, adapter: str | None, model: str | None, revision: str | None, trust_remote_code: bool
    ) -> Subject:
        """Reads the model's configuration and the adapter, no weights.

        Args:
            name: the folder of an adapter, or a model: a folder or a Hub repository.
            adapter: of the model that `name` is; None for its folder `mkv`, if there is one.
            model: of the adapter that `name` is; None for the one that the adapter was made for.
            revision, trust_remote_code: of the model's Hub repository.

        Raises:
            ValueError: two adapters or two models are named; the adapter is damaged or of another model; the model
                that an adapter names cannot be read.
        """
        if (Path(name).expanduser() / CONFIG_FILE).exists():
            if adapter is not None:
                raise ValueError(f"{name} is an adapter, and --adapter names {adapter}; leave one of them out")
            folder: Path | None = Path(name).expanduser()
        elif model is not None:
            raise ValueError(f"{name} is no adapter but a model, and --model names {model}; leave one of them out")
        else:
            folder = _adapter_of(name, adapter, revision)
            model = name
        loaded = None if folder is None else Adapter.load(folder)
        if model is None and loaded is not None:
            source = _named_by(loaded, folder, revision, trust_remote_code)
        else:
            source = Source(model or name, revision, trust_remote_code)
        if loaded is not None:
            loaded.check_model(source.fingerprint)
        return cls(source, folder, loaded)

    @property
    def stock_bytes(self) -> int:
        """Bytes per token of the model's own cache in its own dtype."""
        return cache_shape(self.source.fingerprint, 1).stock_bytes_per_token(self.source.itemsize)

    @property
    def digest(self) -> str | None:
        """Of the adapter."""
        return None if self.folder is None else digest(self.folder)

    def path(self, allocation: str) -> AllocationPath:
        """The adapter's own path, or the uniform one. Raises ValueError where there is no adapter."""
        if self.adapter is None:
            raise ValueError(
                f"budgets are an adapter's, and {self.source.name} has none in its folder mkv; name one: "
                f"--adapter ADAPTER, or {HOW_TO_MAKE_ONE}"
            )
        return self.adapter.path if allocation == "path" else self.adapter.uniform_path

    def allocations(self, budgets: Sequence[float], allocation: str) -> list[Allocation]:
        """At these budgets, of bytes in the model's own dtype. Raises ValueError where one is out of reach."""
        return [self.path(allocation).replay(budget, itemsize=self.source.itemsize) for budget in budgets]


def _adapter_of(model: str, adapter: str | None, revision: str | None) -> Path | None:
    if adapter is not None:
        return locate(adapter, None)
    try:
        return locate(None, model, model_revision=revision)
    except NoAdapterError:  # and none was asked for
        return None


def _named_by(adapter: Adapter, folder: Path | None, revision: str | None, trust_remote_code: bool) -> Source:
    """The model that an adapter was made for."""
    config = adapter.config
    source = Source.of_adapter(config, None, revision, trust_remote_code)
    try:
        _ = source.config
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} was made for {source.name}, which cannot be read here ({str(error).splitlines()[0]}); name the "
            "model: --model MODEL"
        ) from error
    return source
