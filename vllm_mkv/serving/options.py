# SPDX-License-Identifier: Apache-2.0
"""What a user may put under `--additional-config '{"mkv": {...}}'`."""

from __future__ import annotations

from difflib import get_close_matches
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
    fold: whether value bases are folded into the model's weights, where these allow it. Weights can then neither be
        reloaded nor saved.
    digest: of the adapter. Set by the plugin, so that vLLM's compile cache and other processes see the same adapter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    adapter: str | None = None
    revision: str | None = None
    budget: Any = None
    allocation: Literal["path", "uniform"] = "path"
    kernels: Literal["auto", "triton", "numba", "torch"] = "auto"
    fold: bool = True
    digest: str | None = None

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> MKVOptions:
        """Raises ValueError naming the option and the mend."""
        additional = vllm_config.additional_config
        if not isinstance(additional, dict):
            raise ValueError(f"--additional-config is a {type(additional).__name__}; give an object with the key mkv")
        raw = additional.get("mkv", {})
        names = [name for name in cls.model_fields if name != "digest"]
        known = ", ".join(names)
        if not isinstance(raw, dict):
            raise ValueError(f'--additional-config: "mkv" is {raw!r}; give an object with some of: {known}')
        # Other keys are other plugins', but for those that are these misspelt, which would change nothing.
        for key in additional:
            if key != "mkv" and sorted(key.casefold()) == sorted("mkv"):
                raise ValueError(f'--additional-config: {key!r} is not known; MKV\'s options are under "mkv"')
            if meant := get_close_matches(key.casefold(), names, 1, 0.85):
                raise ValueError(
                    f'--additional-config: {key!r} is beside "mkv"; put it inside: {{"mkv": {{"{meant[0]}": ...}}}}'
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
