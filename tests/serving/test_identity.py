# SPDX-License-Identifier: Apache-2.0
"""Full rank is the model itself; truncated, the engine is the transformers implementation of the same adapter."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.engine

LENGTHS = (1, 2, 3, 15, 16, 17, 31, 33, 47, 63, 64, 65, 100, 127, 128, 200)


@pytest.fixture(scope="module")
def prompts(serving):
    return serving.random_prompts(LENGTHS)


def test_full_rank_gives_stock_tokens(start_engine, tiny_model, make_adapter, prompts, serving):
    model = tiny_model("llama")
    expected = serving.greedy(start_engine(model), prompts)
    for basis in ("pca", "query"):
        for group_heads in (1, 2, 4):
            adapter = make_adapter(model, group_heads=group_heads, basis=basis)
            assert serving.greedy(start_engine(model, adapter), prompts) == expected, (basis, group_heads)


def test_full_rank_gives_stock_tokens_on_every_architecture(
    architecture, start_engine, tiny_model, make_adapter, prompts, serving
):
    model = tiny_model(architecture)
    expected = serving.greedy(start_engine(model), prompts)
    for group_heads in (1, 2):
        adapter = make_adapter(model, group_heads=group_heads)
        assert serving.greedy(start_engine(model, adapter), prompts) == expected, group_heads


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_full_rank_in_half_precision_errs_no_more_than_twice_as_much_as_stock(
    dtype, start_engine, tiny_model, make_adapter, serving
):
    model = tiny_model("llama")
    prompts = serving.random_prompts((200, 333))
    exact = np.concatenate(serving.prompt_logprobs(start_engine(model), prompts))
    stock = np.concatenate(serving.prompt_logprobs(start_engine(model, dtype=dtype), prompts))
    for group_heads in (1, 2):
        adapter = make_adapter(model, group_heads=group_heads)
        mkv = np.concatenate(serving.prompt_logprobs(start_engine(model, adapter, dtype=dtype), prompts))
        assert np.abs(mkv - exact).mean() <= 2 * np.abs(stock - exact).mean()


@pytest.mark.parametrize("group_heads", [1, 2])
def test_truncated_engine_equals_transformers(
    group_heads, architecture, start_engine, tiny_model, make_adapter, uneven_path, serving
):
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_mkv.adapter import Adapter
    from vllm_mkv.fit.truncation import truncated

    # Heads of 64, so that a head alone has ranks between the smallest and the full one.
    wide = {"head_dim": 64} if architecture in ("llama", "mistral", "qwen3") else {}
    model = tiny_model(architecture, num_attention_heads=4, num_key_value_heads=2, **wide)
    plain = Adapter.load(make_adapter(model, group_heads=group_heads))
    adapter = make_adapter(model, group_heads=group_heads, path=uneven_path(plain.shape))
    prompts = serving.random_prompts((40, 130, 257))
    found = serving.prompt_logprobs(start_engine(model, adapter, budget=0.5), prompts)

    loaded = Adapter.load(adapter)
    allocation = loaded.path.replay(0.5, itemsize=4)
    assert {16, 64 * group_heads} < set(allocation.ranks.flatten().tolist())
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode(), truncated(reference, loaded, allocation):
        for prompt, logprobs in zip(prompts, found, strict=True):
            ids = torch.tensor([prompt["prompt_token_ids"]])
            wanted = reference(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            np.testing.assert_allclose(logprobs, wanted.numpy(), atol=1e-3)
    with torch.inference_mode():
        full = reference(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert (full - wanted).abs().max() > 1e-2, "nothing was truncated"


class Stored:
    """What the engine's pages hold of each layer's tokens after a prefill: coordinates of keys and of values."""

    def __init__(self, monkeypatch) -> None:
        from vllm_mkv.serving import cpu_attention

        self.layers: list[tuple] = []
        store = cpu_attention.project_and_store

        def recording(query, key, value, pages, bases, slots, tokens):
            projected = store(query, key, value, pages, bases, slots, tokens)
            if tokens is None and len(slots) > 1:
                self.layers.append(tuple(self.read(pages, bases, slots, side) for side in ("key", "value")))
            return projected

        monkeypatch.setattr(cpu_attention, "project_and_store", recording)

    @staticmethod
    def read(pages, bases, slots, side):
        """[G, T, n] float32, 0 where nothing is stored."""
        import torch

        from mkv_kernels.codes import multipliers

        blocks = slots[:: bases.layout.block_size] // bases.layout.block_size
        n = 16 * len(bases.layout.widths[0][0])
        out = torch.zeros(len(bases.layout.widths), len(slots), n)
        for run, page in zip(bases.layout.runs, pages, strict=True):
            found = getattr(page, side)
            rank = found.layout.rank
            coordinates = found.read(blocks[None], len(slots), torch.float32)[:, 0]
            out[list(run.groups), :, :rank] = coordinates * multipliers(found.layout.widths)[:rank]
        return out


@pytest.mark.parametrize("group_heads", [1, 2])
def test_tiers_in_the_engine_equal_those_of_transformers(
    group_heads, start_engine, tiny_model, make_searched, serving, monkeypatch
):
    """A coordinate at the border of two levels may fall to either side in computations that differ by rounding, and
    then all that follows differs by more than rounding. So transformers attends on what the engine's pages hold: with
    that, log-probabilities are equal; and what the pages hold is what transformers would, but for such borders.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from mkv_kernels.bases import with_orthonormal_exact_tiers
    from vllm_mkv.adapter import Adapter
    from vllm_mkv.fit.attention import intercepted, layer_index
    from vllm_mkv.fit.truncation import Truncation, by_group, by_head

    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    folder = make_searched(model, group_heads)
    loaded = Adapter.load(folder)
    prompts = serving.random_prompts((40, 130, 257))
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    stored = Stored(monkeypatch)
    seen = set()

    def compare_and_replace(module, query, key, value):
        layer = layer_index(module)
        bases, sides = loaded.bases[layer], []
        pairs = ((bases.A, bases.B, bases.key_mean), (bases.C, bases.D.swapaxes(-1, -2), bases.value_mean))
        for side, (down, up, mean) in enumerate(pairs):
            heads, held = wanted(module, query, key, value)[side], stored.layers[layer][side]
            exact = [16 * group[side].count(16) for group in allocation.widths[layer]]
            _, up = with_orthonormal_exact_tiers(torch.from_numpy(down), torch.from_numpy(up.copy()), exact)
            groups = held @ up.mT + torch.from_numpy(mean)[:, None]
            differs = (by_group(heads, group_heads)[0] - groups).abs().amax(-1) > 1e-3
            assert differs.float().mean() < 0.06, f"layer {layer}: {differs.sum()} of {differs.numel()} vectors differ"
            sides.append(by_head(groups[None], group_heads))
        return tuple(sides)

    for budget in (0.5, 0.25, 0.125, 0.07):
        allocation = loaded.path.replay(budget, itemsize=4)
        wanted = Truncation(loaded, allocation)
        seen |= {width for layer in allocation.widths for group in layer for side in group for width in side}
        engine = start_engine(model, folder, budget=budget)
        for prompt in prompts:
            stored.layers.clear()
            found = serving.prompt_logprobs(engine, [prompt])[0]
            assert len(stored.layers) == len(loaded.bases)
            ids = torch.tensor([prompt["prompt_token_ids"]])
            with torch.inference_mode(), intercepted(reference, compare_and_replace):
                logprobs = reference(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            np.testing.assert_allclose(found, logprobs.numpy(), atol=1e-3, err_msg=f"budget {budget}")
    assert seen >= {8, 4, 2, 0}
    with torch.inference_mode():
        full = reference(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert (full - logprobs).abs().max() > 1e-2, "nothing was quantised"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tiers_in_half_precision(dtype, start_engine, tiny_model, make_searched, serving):
    """Rounding moves coordinates to other levels too; that does less than the levels themselves do."""
    from vllm_mkv.adapter import Adapter

    model = tiny_model("llama")
    adapter = make_searched(model, 2)
    prompts = serving.random_prompts((200, 333))
    path = Adapter.load(adapter).path
    allocation = path.replay(0.2, itemsize=2)
    same = allocation.budget(itemsize=4)
    assert path.replay(same, itemsize=4).widths == allocation.widths
    full, exact = (
        np.concatenate(serving.prompt_logprobs(start_engine(model, adapter, budget=budget, block_size=16), prompts))
        for budget in (1.0, same)
    )
    engine = start_engine(model, adapter, budget=0.2, block_size=16, dtype=dtype)
    half = np.concatenate(serving.prompt_logprobs(engine, prompts))
    assert np.abs(half - exact).mean() < 0.5 * np.abs(exact - full).mean()
