# SPDX-License-Identifier: Apache-2.0
"""What of a model an adapter depends on, so that an adapter is never used with another model."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt


class ModelFingerprint(BaseModel):
    """Shape and rotary embedding of a model's attention; a basis of rotated keys is valid for these alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    architecture: str
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_size: PositiveInt
    rope: dict[str, Any]

    @classmethod
    def of(cls, config: Any) -> ModelFingerprint:
        """From a transformers configuration, of which the text part counts.

        Raises:
            ValueError: the configuration describes no decoder with KV heads.
        """
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        heads = getattr(text, "num_attention_heads", None)
        if not heads or not getattr(text, "num_hidden_layers", None):
            raise ValueError(f"{type(config).__name__} describes no model with attention heads")
        names = getattr(config, "architectures", None) or getattr(text, "architectures", None)
        return cls(
            architecture=names[0] if names else type(text).__name__.removesuffix("Config"),
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
            rope=_rope(text),
        )

    def differences(self, other: ModelFingerprint) -> list[str]:
        """One phrase for every property in which `other` is not what this fingerprint says."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [f"{key} is {theirs[key]!r}, not {mine[key]!r}" for key in mine if mine[key] != theirs[key]]


def _rope(text: Any) -> dict[str, Any]:
    """The rotary parameters as JSON would give them back, so that they compare equal after a round trip."""
    rope = getattr(text, "rope_parameters", None) or {}
    if not rope and getattr(text, "rope_theta", None) is not None:
        # Configurations that come with a repository may name them one by one. vLLM gathers them in this way.
        partial = getattr(text, "partial_rotary_factor", None)
        rope = {"rope_type": "default", "rope_theta": text.rope_theta, "partial_rotary_factor": partial}
    return json.loads(json.dumps(_plain(rope), sort_keys=True))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
