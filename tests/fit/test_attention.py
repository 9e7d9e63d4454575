# SPDX-License-Identifier: Apache-2.0
"""Identities of the reference attention, on tiny random models of every architecture."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_mkv.adapter import Adapter
from vllm_mkv.allocation import Allocation, CacheShape
from vllm_mkv.fit.attention import Scores, attention_layers, intercepted, layer_index, scores_of
from vllm_mkv.fit.model import Source
from vllm_mkv.fit.truncation import by_group, by_head, truncated

FULL_RANK_TOLERANCE = 2e-5
"""Of the largest logit: float32 rounding through three layers."""


def load(folder):
    return Source(str(folder)).load(device="cpu")


def logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def random_ids(tokens, batch=1):
    return torch.randint(0, 300, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def assert_full_rank_is_exact(folder, adapter_folder, tokens=63):
    model, adapter = load(folder), Adapter.load(adapter_folder)
    ids = random_ids(tokens, batch=2)
    stock = logits(model, ids)
    with truncated(model, adapter, adapter.path.replay(1.0)):
        mkv = logits(model, ids)
    torch.testing.assert_close(mkv, stock, rtol=0, atol=FULL_RANK_TOLERANCE * float(stock.abs().max()))
    assert torch.equal(mkv.argmax(-1), stock.argmax(-1))
    torch.testing.assert_close(logits(model, ids), stock, rtol=0, atol=0)


@pytest.mark.parametrize("basis", ["pca", "query"])
@pytest.mark.parametrize("group_heads", [1, 2, 4])
def test_full_rank_is_exact(tiny_model, make_adapter, basis, group_heads):
    folder = tiny_model("llama")
    assert_full_rank_is_exact(folder, make_adapter(folder, group_heads, basis))


@pytest.mark.parametrize("group_heads, basis", [(2, "query")])
def test_full_rank_is_exact_in_every_architecture(tiny_model, make_adapter, architecture, group_heads, basis):
    folder = tiny_model(architecture)
    assert_full_rank_is_exact(folder, make_adapter(folder, group_heads, basis))


@pytest.mark.parametrize("group_heads", [1, 4])
def test_full_rank_is_exact_with_windows_and_soft_caps(tiny_model, make_adapter, windowed, group_heads):
    architecture, settings = windowed
    folder = tiny_model(architecture, **settings)
    assert_full_rank_is_exact(folder, make_adapter(folder, group_heads))
    # What is tested is there.
    plain = tiny_model(architecture, **settings | {"sliding_window": 1024})
    ids = random_ids(63)
    changed = (logits(load(plain), ids) - logits(load(folder), ids)).abs().amax((0, 2))
    assert changed[:24].max() < 1e-3 < 0.1 < changed[24:].max()
    if "attn_logit_softcapping" in settings:
        plain = tiny_model(architecture, **settings | {"attn_logit_softcapping": None})
        assert (logits(load(plain), ids) - logits(load(folder), ids)).abs().max() > 0.1


def test_weights_are_those_of_the_models_own_attention(tiny_model, windowed):
    """The search weighs errors of values by them."""
    architecture, settings = windowed
    folder = tiny_model(architecture, **settings)
    model, ids, found = load(folder), random_ids(63), {}

    def compare(module, query, key, value):
        scores, repeats = scores_of(module), query.shape[1] // key.shape[1]
        sees = scores.sees(63, 63, query.device)
        found[layer_index(module)] = scores.weights(query, key.repeat_interleave(repeats, 1), sees)
        return key, value

    with intercepted(model, compare):
        logits(model, ids)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        wanted = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    for layer, weights in enumerate(wanted):
        torch.testing.assert_close(found[layer], weights, rtol=0, atol=1e-5)


def test_full_rank_is_exact_without_rotary_embedding(tiny_model, make_adapter):
    # GPT-2, which also has fused transposed projections and an output projection of another name.
    folder = tiny_model("gpt2", num_key_value_heads=8, n_positions=256)
    assert_full_rank_is_exact(folder, make_adapter(folder, 2, "query"))


def test_generation_through_the_cache_equals_one_forward_pass(tiny_model, make_adapter, uneven_path):
    folder = tiny_model("llama")
    model, adapter = load(folder), Adapter.load(make_adapter(folder, 2))
    allocation = uneven_path(adapter.shape).replay(0.5)
    ids = random_ids(17)
    with truncated(model, adapter, allocation), torch.inference_mode():
        new = model.generate(ids, max_new_tokens=15, do_sample=False, eos_token_id=None)
        whole = model(input_ids=new, use_cache=False).logits
    assert torch.equal(whole[:, 16:-1].argmax(-1), new[:, 17:])


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_padding_on_the_left_changes_nothing(architecture, tiny_model, make_adapter):
    folder = tiny_model(architecture)
    model, adapter = load(folder), Adapter.load(make_adapter(folder, 2))
    ids = random_ids(15)
    padded = torch.cat([torch.ones(1, 6, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 6, dtype=torch.long), torch.ones_like(ids)], 1)
    with truncated(model, adapter, adapter.path.replay(0.5)), torch.inference_mode():
        alone = model(input_ids=ids).logits
        beside = model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(beside[:, 6:], alone, rtol=0, atol=1e-4)


@pytest.fixture
def plain(monkeypatch):
    """Modules that have never attended count as plain attention."""
    from vllm_mkv.fit import truncation

    monkeypatch.setattr(truncation, "scores_of", lambda module: Scores(1.0, None, None))


def by_hand(adapter, layer, side, heads, ranks):
    """Head by head and token by token, straight from the formula."""
    bases = adapter.bases[layer]
    down, up, mean = (
        (bases.A, bases.B.swapaxes(-1, -2), bases.key_mean) if side == 0 else (bases.C, bases.D, bases.value_mean)
    )
    J = adapter.config.group_heads
    out = np.empty_like(heads)
    for b in range(heads.shape[0]):
        for t in range(heads.shape[2]):
            for g, rank in enumerate(ranks):
                x = np.concatenate([heads[b, g * J + j, t] for j in range(J)]).astype(np.float64)
                coordinates = (x - mean[g]) @ down[g].astype(np.float64)
                coordinates[rank:] = 0
                x = coordinates @ up[g].astype(np.float64) + mean[g]
                for j, part in enumerate(np.split(x, J)):
                    out[b, g * J + j, t] = part
    return out


@pytest.mark.parametrize("group_heads", [1, 2, 4])
def test_truncated_keys_and_values_follow_the_formula(plain, tiny_model, make_adapter, uneven_path, group_heads):
    from vllm_mkv.fit.truncation import Truncation

    folder = tiny_model("llama")
    adapter = Adapter.load(make_adapter(folder, group_heads))
    allocation = uneven_path(adapter.shape, seed=3).replay(0.6)
    ranks = allocation.ranks
    assert group_heads == 4 or len(set(ranks.flatten())) > 1
    handler = Truncation(adapter, allocation)
    key, value = (torch.randn(2, 4, 5, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    for layer in range(3):
        module = torch.nn.Module()
        module.layer_idx = layer
        got = handler(module, None, key, value)
        for side, heads in ((0, key), (1, value)):
            want = by_hand(adapter, layer, side, heads.numpy(), ranks[layer, :, side])
            np.testing.assert_allclose(got[side].numpy(), want, atol=2e-4)


def test_groups_are_consecutive_heads():
    heads = torch.arange(2 * 6 * 3 * 4).reshape(2, 6, 3, 4)
    groups = by_group(heads, 3)
    assert groups.shape == (2, 2, 3, 12)
    assert torch.equal(groups[1, 1, 2], torch.cat([heads[1, 3, 2], heads[1, 4, 2], heads[1, 5, 2]]))
    assert torch.equal(by_head(groups, 3), heads)


def test_larger_budgets_are_closer(tiny_model, make_adapter):
    folder = tiny_model("llama")
    model, adapter = load(folder), Adapter.load(make_adapter(folder, 4))
    ids = random_ids(63)
    stock = logits(model, ids).log_softmax(-1)
    divergences = []
    for budget in (0.25, 0.5, 0.75, 1.0):
        with truncated(model, adapter, adapter.path.replay(budget)):
            found = logits(model, ids).log_softmax(-1)
        divergences.append(float((stock.exp() * (stock - found)).sum(-1).mean()))
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[0] > 1e-3 > divergences[-1]


def test_implementation_and_handlers_are_restored_after_an_error(tiny_model, make_adapter):
    folder = tiny_model("llama")
    model, adapter = load(folder), Adapter.load(make_adapter(folder, 1))
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="inside"), truncated(model, adapter, adapter.path.replay(1.0)):
        assert model.config._attn_implementation == "mkv"
        raise RuntimeError("inside")
    assert model.config._attn_implementation == before


def test_handlers_nest(tiny_model):
    model = load(tiny_model("llama"))
    seen = []

    def handler(name):
        def handle(module, query, key, value):
            seen.append(name)
            return key, value

        return handle

    with intercepted(model, handler("outer")):
        with intercepted(model, handler("inner")):
            logits(model, random_ids(1))
        logits(model, random_ids(1))
    assert seen == ["inner"] * 3 + ["outer"] * 3


def test_capture_sees_every_layer_once_after_rope(tiny_model):
    model = load(tiny_model("llama"))
    assert list(attention_layers(model)) == [0, 1, 2]
    shapes, keys = [], []

    def record(module, query, key, value):
        shapes.append((tuple(query.shape), tuple(key.shape), tuple(value.shape)))
        keys.append(key)
        return key, value

    with intercepted(model, record):
        logits(model, torch.zeros(1, 15, dtype=torch.long))
    assert shapes == [((1, 8, 15, 32), (1, 4, 15, 32), (1, 4, 15, 32))] * 3
    # Equal tokens have equal keys before RoPE, so they differ after it, and in direction only.
    assert not torch.allclose(keys[0][:, :, 0], keys[0][:, :, 1])
    torch.testing.assert_close(keys[0][:, :, 0].norm(dim=-1), keys[0][:, :, 1].norm(dim=-1))


def quantised_by_hand(x, widths):
    """One vector, coordinate by coordinate."""
    steps = {8: 0.034, 4: 0.37, 2: 1.15}
    coded = [i for i in range(len(x)) if 0 < widths[i // 16] < 16]
    # Of the root mean square as float16, 3 bits of mantissa are kept.
    scale = float(np.float16(np.sqrt(np.mean(x[coded] ** 2)))) if coded else 1.0
    eighth = 2.0 ** (np.floor(np.log2(scale)) - 3)
    scale = np.floor(scale / eighth + 0.5) * eighth
    out = np.zeros_like(x)
    for i, width in enumerate(np.repeat(widths, 16)):
        if width == 16:
            out[i] = x[i]
        elif width:
            level = np.clip(np.floor(x[i] / scale / steps[width]), -(2 ** (width - 1)), 2 ** (width - 1) - 1)
            out[i] = (level + 0.5) * steps[width] * scale
    return out


@pytest.mark.parametrize("group_heads", [1, 2])
def test_tiers_follow_the_formula(plain, tiny_model, make_adapter, uneven_path, group_heads):
    from vllm_mkv.fit.truncation import Truncation

    folder = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    adapter = Adapter.load(make_adapter(folder, group_heads))
    allocation = uneven_path(adapter.shape, (16, 8, 4, 2, 0)).replay(0.3)
    assert {0, 2, 4, 8} <= set(np.array(allocation.widths).flatten())
    heads = torch.randn(1, 2, 7, 64, generator=torch.Generator().manual_seed(0))
    for layer, bases in enumerate(adapter.bases):
        module = torch.nn.Module()
        module.layer_idx = layer
        keys, values = Truncation(adapter, allocation)(module, None, heads, heads)
        pairs = ((bases.A, bases.B.swapaxes(-1, -2), bases.key_mean), (bases.C, bases.D, bases.value_mean))
        for side, (found, (down, up, mean)) in enumerate(zip((keys, values), pairs, strict=True)):
            x = by_group(heads, group_heads).numpy().astype(np.float64)
            for group in range(adapter.shape.num_groups):
                coordinates = (x[0, group] - mean[group]) @ down[group]
                widths = allocation.widths[layer][group][side]
                want = np.stack([quantised_by_hand(token, widths) for token in coordinates]) @ up[group] + mean[group]
                got = by_group(found, group_heads)[0, group].numpy()
                # A coordinate at the border of two levels may fall to either side of it.
                assert np.abs(got - want).mean() < 1e-3 * np.abs(want).mean()


def test_an_allocation_or_a_model_of_another_shape_is_refused(tiny_model, make_adapter):
    adapter = Adapter.load(make_adapter(tiny_model("llama"), 1))
    with pytest.raises(ValueError, match="the allocation is for"):
        truncated(load(tiny_model("llama")), adapter, Allocation(CacheShape(1, 1, 32), ()))
    narrow = load(tiny_model("llama", num_key_value_heads=2))
    with truncated(narrow, adapter, adapter.path.replay(1.0)), pytest.raises(ValueError, match="layer 0 has 2 of 32"):
        logits(narrow, random_ids(2))
    deep = load(tiny_model("llama", num_hidden_layers=4))
    with truncated(deep, adapter, adapter.path.replay(1.0)), pytest.raises(ValueError, match="no bases for layer 3"):
        logits(deep, random_ids(2))


REFUSED_LAYERS = {
    "attention sinks": (
        "gpt_oss",
        {"head_dim": 32, "num_local_experts": 2, "layer_types": ("full_attention",) * 3, "sliding_window": 2048},
    ),
    "BloomForCausalLM: layers": ("bloom", {"n_head": 8, "n_layer": 3}),
    "encoder's attention": ("bert", {}),
}


@pytest.mark.parametrize("feature", REFUSED_LAYERS)
def test_attention_of_another_kind_is_refused_by_name(tiny_model, feature):
    architecture, settings = REFUSED_LAYERS[feature]
    model = load(tiny_model(architecture, **settings))
    with pytest.raises(NotImplementedError, match=feature):
        attention_layers(model)


def test_a_mean_of_keys_is_refused_where_scores_are_capped(tiny_model, make_adapter):
    folder = tiny_model("gemma2", attn_logit_softcapping=1.0)
    adapter = Adapter.load(make_adapter(folder))
    assert not any(bases.key_mean.any() for bases in adapter.bases)
    assert all(bases.value_mean.any() for bases in adapter.bases)
    bases = tuple(replace(bases, key_mean=bases.value_mean) for bases in adapter.bases)
    shifted = replace(adapter, bases=bases)
    model = load(folder)
    refusal = pytest.raises(ValueError, match=r"keys less their mean, and .* has a soft-cap .*vllm-mkv calibrate")
    with truncated(model, shifted, adapter.path.replay(1.0)), refusal:
        logits(model, random_ids(2))
