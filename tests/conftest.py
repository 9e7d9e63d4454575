# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, a tokenizer and adapters for them, made once per session."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2")
WINDOW = 24
WINDOWED: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": WINDOW},
    # A window in every other layer, and a cap that scores reach.
    "gemma2": {
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 1.0,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
    },
}
TEXT = "the river ran past an old mill where nobody had ground any flour for years and years , so they said ."
MAX_POSITIONS = 2048


def random_text(num_words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(TEXT.split(), k=num_words))


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Every architecture in turn that `tiny_model` makes."""
    return request.param


@pytest.fixture(params=WINDOWED)
def windowed(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    """Arguments of `tiny_model` for architectures whose layers, some or all, have a window of 24 tokens."""
    return request.param, WINDOWED[request.param]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 9,000 tokens of the tiny tokenizer."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(random_text(6000), "utf-8")
    return file


@pytest.fixture(scope="session")
def tiny_tokenizer() -> object:
    """A byte-level BPE tokenizer of 300 tokens, with `<|endoftext|>` as BOS and EOS, 0, and `<|pad|>`, 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([random_text(500)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: object) -> Callable[..., Path]:
    """`tiny_model(architecture, **overrides)`: the folder of a random model in float32 with its tokenizer.

    3 layers, 8 query heads and 4 KV heads of 32, 256 wide, a vocabulary of about 300, 2048 positions. Keyword arguments
    override its configuration (tuples for lists). Equal calls give the same folder: do not write to it.
    """

    @cache
    def make(architecture: str = "llama", **overrides: object) -> Path:
        folder = tmp_path_factory.mktemp(architecture) / "model"
        save_tiny_model(folder, architecture, tiny_tokenizer, **overrides)
        return folder

    return make


def save_tiny_model(folder: Path, architecture: str, tokenizer: object, **overrides: object) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # Not every implementation lets heads * head_dim differ from the hidden size, so it does not.
    settings: dict[str, object] = {
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "vocab_size": len(tokenizer),  # type: ignore[arg-type]
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "dtype": "float32",
    }
    if architecture in ("mistral", "phi3"):
        settings["sliding_window"] = None
    if architecture in ("llama", "mistral", "qwen3", "gemma2", "gemma3_text"):
        settings["head_dim"] = 32
    settings |= {key: list(value) if isinstance(value, tuple) else value for key, value in overrides.items()}
    config = AutoConfig.for_model(architecture, **settings)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # Larger than the usual initialisation, so that attention is uneven and logits are far apart; biases and
        # norms differ from 0 and 1, so that forgetting one shows.
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.06)
            else:
                parameter.copy_(("norm" in name) + 0.2 * torch.randn_like(parameter))
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[..., Path]:
    """`make_adapter(model_folder, group_heads=1, basis="query", path=None)`: the folder of a calibrated adapter.

    `path` is an AllocationPath to use instead of the uniform one, of shape (3 layers, 4 / group_heads latent groups,
    32 * group_heads coordinates). Equal calls give the same folder: do not write to it.
    """

    @cache
    def calibrated(model: Path, group_heads: int, basis: str) -> Path:
        from vllm_mkv.fit.calibrate import calibrate

        folder = tmp_path_factory.mktemp("adapter") / f"{basis}-{group_heads}"
        calibrate(
            str(model),
            [str(text_file)],
            tokens=2048,
            context=128,
            basis=basis,
            group_heads=group_heads,
            output=folder,
            eval_windows=0,
        )
        return folder

    def make(model: Path, group_heads: int = 1, basis: str = "query", path: object = None) -> Path:
        from vllm_mkv.adapter import Adapter

        folder = calibrated(model, group_heads, basis)
        if path is None:
            return folder
        adapter = Adapter.load(folder)
        changed = tmp_path_factory.mktemp("adapter") / f"{basis}-{group_heads}-path"
        Adapter(adapter.config, adapter.bases, path).save(changed, "")  # type: ignore[arg-type]
        return changed

    return make


@pytest.fixture(scope="session")
def make_searched(
    make_adapter: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`make_searched(model, group_heads=1)`: the folder of an adapter with tiers, its path found by a search.

    A coordinate at the border of two levels may fall to either side in two computations that differ by rounding. Where
    the search gave few bits, that changes little; on a path drawn at random it can change much.
    """

    @cache
    def make(model: Path, group_heads: int = 1) -> Path:
        from vllm_mkv.adapter import Adapter
        from vllm_mkv.fit.search import search

        folder = tmp_path_factory.mktemp("adapter") / f"searched-{group_heads}"
        loaded = Adapter.load(make_adapter(model, group_heads))
        search(loaded, [str(text_file)], output=folder, tokens=1024, context=128, eval_windows=0)
        return folder

    return make


@pytest.fixture(scope="session")
def uneven_path() -> Callable[..., object]:
    """`uneven_path(shape, widths=(16, 0), seed=0)`: a path down to one block a side, at its own pace for each side.

    So every layer, latent group and side has a rank, and with more widths tiers, of its own at the budgets between.
    """
    return make_uneven_path


def make_uneven_path(shape: object, widths: tuple[int, ...] = (16, 0), seed: int = 0) -> object:
    from vllm_mkv.allocation import AllocationPath

    rng = np.random.default_rng(seed)
    num_blocks: int = shape.num_blocks  # type: ignore[attr-defined]
    state = {
        (layer, group, side): [16] * num_blocks
        for layer in range(shape.num_layers)  # type: ignore[attr-defined]
        for group in range(shape.num_groups)  # type: ignore[attr-defined]
        for side in (0, 1)
    }
    paces = dict(zip(state, rng.uniform(0.05, 1, len(state)), strict=True))

    def moves(blocks: list[int]) -> list[tuple[int, int]]:
        lower = dict(pairwise(widths))
        steps = [(block, lower[width]) for block, width in enumerate(blocks) if width in lower]
        return [(b, w) for b, w in steps if w >= (*blocks, 0)[b + 1] and (w or b)]

    steps = []
    while candidates := [place for place, blocks in state.items() if moves(blocks)]:
        chances = np.array([paces[place] for place in candidates])
        place = candidates[rng.choice(len(candidates), p=chances / chances.sum())]
        block, width = moves(state[place])[rng.integers(len(moves(state[place])))]
        state[place][block] = width
        steps.append((*place, block, width))
    return AllocationPath(shape, np.array(steps, dtype=np.int32).reshape(-1, 5))  # type: ignore[arg-type]
