# SPDX-License-Identifier: Apache-2.0
"""Loading the model that an adapter is made for, and what of it is refused before its weights are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from mkv_kernels.layout import BLOCK
from vllm_mkv.adapter import AdapterConfig
from vllm_mkv.arguments import check_model
from vllm_mkv.fingerprint import ModelFingerprint

MAX_QUERY_HEADS = 16
"""Query heads per latent group that one tensor-core product holds: a tile of its rows."""
MAX_WIDTH = 2048
"""Coordinates of a latent group that the Triton kernels take in any tier."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""As safetensors names them."""


def dtype_name(dtype: torch.dtype) -> str:
    """As `DTYPES` and vLLM have it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Source:
    """A model on disk or on the Hub.

    Args:
        name: a folder or a Hub repository.
        revision: of the Hub repository.
        trust_remote_code: whether to run code that the repository brings.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of_adapter(
        cls, config: AdapterConfig, model: str | None, revision: str | None, trust_remote_code: bool
    ) -> Source:
        """The model that is named, or else the one that an adapter was made for, at the revision that it names."""
        if model is not None:
            return cls(model, revision, trust_remote_code)
        return cls(config.base_model_name_or_path, revision or config.revision, trust_remote_code)

    @property
    def path(self) -> str:
        """What transformers knows the model by."""
        return str(Path(self.name).expanduser()) if self.name.startswith("~") else self.name

    @property
    def _where(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @cached_property
    def config(self) -> Any:
        """
        Raises:
            ValueError: there is no model of that name.
            NotImplementedError: attention is of a kind that a projected cache does not serve.
        """
        check_model(self.name)
        try:
            config = AutoConfig.from_pretrained(self.path, **self._where)
        except OSError as error:
            if Path(self.path).exists():
                raise
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"there is no folder {self.name}, and the Hub gave no model of that name ({reason}); name a folder "
                "or a Hub repository"
            ) from error
        refuse_config(config)
        return config

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        return ModelFingerprint.of(self.config)

    @property
    def dtype(self) -> torch.dtype:
        """What its weights are stored in: as the configuration names it, or else as their file does."""
        named = getattr(self.config.get_text_config(decoder=True), "dtype", None) or self.config.dtype
        return named or stored_dtype(self.path, self.revision)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the model's own cache: of the dtype that its weights are stored in."""
        return self.dtype.itemsize

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path, **self._where)

    def load(self, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
        """The model, ready to evaluate.

        Args:
            dtype: one of `DTYPES`; auto is what the weights are stored in.
            device: auto is cuda where there is one; else a torch device.

        Raises:
            ValueError: no such dtype or device.
            NotImplementedError: the model is no decoder.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        device = choose_device(device)
        settings = dict(self._where)
        if getattr(self.config.get_text_config(decoder=True), "attn_logit_softcapping", None):
            # transformers' default, torch's fused operator, leaves the soft-cap of attention scores out.
            settings["attn_implementation"] = "eager"
        try:
            model = AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype, device_map=device, **settings)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise NotImplementedError(
                f"{self.name} is no decoder that transformers knows as a language model"
            ) from error
        return model.eval()


def stored_dtype(name: str, revision: str | None) -> torch.dtype:
    """Of a model's first weights that are no integers, from the header of a safetensors file."""
    try:
        try:
            index = Path(cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision))
            file = min(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except OSError:  # a single file has no index
            file = SAFE_WEIGHTS_NAME
        with safe_open(cached_file(name, file, revision=revision), "pt") as weights:
            found = [weights.get_slice(key).get_dtype() for key in sorted(weights.keys())]
    except (OSError, SafetensorError):
        found = []
    for dtype in found:
        if dtype in STORED_DTYPES:
            return STORED_DTYPES[dtype]
    raise ValueError(
        f"the configuration of {name} names no dtype, and it has no safetensors file to read it from; add "
        '"dtype": "bfloat16", or whatever its weights have, to its config.json'
    )


def choose_device(name: str) -> str:
    """A torch device. Raises ValueError where the machine has none of that name."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); use auto, cpu, cuda or cuda:N") from error
    return name


def refuse_config(config: Any) -> None:
    """Raises NotImplementedError, naming the feature, for a configuration whose attention is not supported."""
    text = config.get_text_config(decoder=True)
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{name} is an encoder-decoder model; a projected cache is for decoders")
    if getattr(text, "kv_lora_rank", None):
        raise NotImplementedError(f"{name} has multi-head latent attention (MLA), whose cache is already projected")
    if getattr(text, "num_kv_shared_layers", None):
        raise NotImplementedError(f"{name} shares keys and values between layers, which is not supported yet")
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise NotImplementedError(
            f"{name} has layers of kind {', '.join(sorted(kinds))}; only models whose every layer has full attention, "
            "or a sliding window, are supported yet"
        )


def choose_group_heads(fingerprint: ModelFingerprint, group_heads: int | None) -> int:
    """J, the KV heads per latent group: as asked for, or the largest whose query heads fit one tensor-core product, and
    whose coordinates any tier of the Triton kernels.

    Raises:
        ValueError: J does not divide the KV heads, or its groups are no multiple of 16 coordinates wide.
    """
    heads = fingerprint.num_key_value_heads
    divisors = [J for J in range(1, heads + 1) if heads % J == 0]
    if group_heads is None:
        queries = fingerprint.num_attention_heads // heads
        fitting = (J for J in divisors if J * queries <= MAX_QUERY_HEADS and J * fingerprint.head_size <= MAX_WIDTH)
        group_heads = max(fitting, default=1)
    if group_heads not in divisors:
        raise ValueError(f"{group_heads} heads per group do not divide {heads} KV heads; use one of {divisors}")
    width = group_heads * fingerprint.head_size
    if width % BLOCK:
        raise ValueError(
            f"{group_heads} heads of {fingerprint.head_size} make latent groups of {width} coordinates, no multiple of "
            f"{BLOCK}; use another number of heads per group (--group-heads)"
        )
    return group_heads
