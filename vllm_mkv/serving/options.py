# SPDX-License-Identifier: Apache-2.0
"""What a user may put under `--additional-config '{"mkv": {...}}'`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class MKVOptions(BaseModel):
    """Options of the backend.

    adapter: folder or Hub repository; without it, the folder `mkv` of the model.
    revision: of the adapter's Hub repository.
    budget: bytes per token as a share of the model's own cache, in (0, 1]; without it, the adapter's default.
    kernels: "triton", "numba" or "torch"; "auto" takes Triton on GPUs, and numba on CPUs, or PyTorch where it cannot.
    allocation: "path" replays the adapter's allocation path, "uniform" treats all latent groups alike.
    digest: of the adapter. Set by the plugin, so that vLLM's compile cache and other processes see the same adapter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    adapter: str | None = None
    revision: str | None = None
    budget: Any = None
    allocation: Literal["path", "uniform"] = "path"
    kernels: Literal["auto", "triton", "numba", "torch"] = "auto"
    digest: str | None = None

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> MKVOptions:
        """Raises ValueError naming the option and the mend."""
        additional = vllm_config.additional_config
        if not isinstance(additional, dict):
            raise ValueError(f"--additional-config is a {type(additional).__name__}; give an object with the key mkv")
        raw = additional.get("mkv", {})
        known = ", ".join(name for name in cls.model_fields if name != "digest")
        if not isinstance(raw, dict):
            raise ValueError(f'--additional-config: "mkv" is {raw!r}; give an object with some of: {known}')
        for name in ("adapter", "budget", "allocation", "kernels"):
            if name in additional:
                raise ValueError(
                    f'--additional-config: {name!r} is beside "mkv"; put it inside: {{"mkv": {{"{name}": ...}}}}'
                )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise ValueError(f"--additional-config: unknown mkv option {name!r}; known are: {known}") from error
            raise ValueError(
                f"--additional-config: mkv option {name!r} is {first['input']!r}; "
                f"{first['msg'].replace('Input should be', 'it should be')}"
            ) from error
