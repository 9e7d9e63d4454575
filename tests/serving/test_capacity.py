# SPDX-License-Identifier: Apache-2.0
"""Bytes that the specs declare are bytes that the pages take, and what vLLM's metrics report."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.engine

BUDGETS = (0.75, 0.5, 0.375, 0.25)
TIERS = (16, 8, 4, 2, 0)


@pytest.mark.parametrize(
    ("group_heads", "widths", "budgets"),
    [(1, (16, 0), BUDGETS), (2, (16, 0), BUDGETS), (1, TIERS, (0.5, 0.25, 0.125, 0.09)), (2, TIERS, (0.22, 0.07))],
)
def test_tokens_of_cache_grow_as_the_budget_shrinks(
    group_heads, widths, budgets, start_engine, tiny_model, make_adapter, uneven_path, serving
):
    from vllm_mkv.adapter import Adapter

    # Heads of 64, so that a quarter of them is a whole block of coordinates.
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    plain = Adapter.load(make_adapter(model, group_heads=group_heads))
    adapter = make_adapter(model, group_heads=group_heads, path=uneven_path(plain.shape, widths))
    stock = serving.cache_tokens(start_engine(model, block_size=32))
    for budget in budgets:
        engine = start_engine(model, adapter, budget=budget, block_size=32)
        allocation = Adapter.load(adapter).path.replay(budget, block_size=32, itemsize=4)
        reached = allocation.budget(block_size=32, itemsize=4)
        assert budget - 0.05 < reached <= budget
        assert serving.cache_tokens(engine) == pytest.approx(stock / reached, rel=0.01)
        runner = serving.worker_of(engine).model_runner
        page_bytes = sum(cache[0].numel() * cache.element_size() for cache in runner.kv_caches)
        assert page_bytes == 32 * allocation.bytes_per_token(block_size=32, itemsize=4)


def test_smaller_budget_never_takes_more_bytes_than_asked(tiny_model, make_adapter):
    from vllm_mkv.adapter import Adapter

    path = Adapter.load(make_adapter(tiny_model("llama"))).path
    for thousandth in range(500, 1001, 7):
        assert path.replay(thousandth / 1000, itemsize=4).budget(itemsize=4) <= thousandth / 1000
