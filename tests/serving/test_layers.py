# SPDX-License-Identifier: Apache-2.0
"""A model whose layers, all or one, are not MKV's does not start: its cache would not be what was asked for."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture
def start(start_engine, tiny_model, make_adapter, monkeypatch):
    """`start(change)`: with `change(layer's name, arguments)` in place of the layers of a Llama."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.models import llama

    def run(change):
        plain = llama.Attention

        def attention(num_heads, head_size, scale, **others):
            arguments = {"num_heads": num_heads, "head_size": head_size, "scale": scale, **others}
            return change(plain, others["prefix"], arguments)

        monkeypatch.setattr(llama, "Attention", attention)
        # What is refused is refused before this may take minutes.
        monkeypatch.setattr(DefaultModelLoader, "load_weights", lambda *_: pytest.fail("weights are loaded"))
        model = tiny_model("llama")
        return start_engine(model, make_adapter(model), block_size=32)

    return run


@pytest.mark.parametrize("which", [".", ".1."])
def test_a_backend_that_the_model_chose(start, which):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    def change(plain, name, arguments):
        return plain(**arguments, **({"attn_backend": CPUAttentionBackend} if which in name else {}))

    with pytest.raises(NotImplementedError, match="attn is Attention with CPUAttentionBackendImpl, which is not MKV's"):
        start(change)


def test_a_class_that_hides_tokens(start):
    from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention

    def change(plain, name, arguments):
        del arguments["per_layer_sliding_window"], arguments["attn_type"]
        return ChunkedLocalAttention(**arguments, attention_chunk_size=32)

    with pytest.raises(NotImplementedError, match=r"layers\.0\.self_attn\.attn is ChunkedLocalAttention with "):
        start(change)


def test_a_layer_of_another_shape(start):
    def change(plain, name, arguments):
        return plain(**arguments | ({"num_kv_heads": 2} if ".1." in name else {}))

    message = r"layers\.1\.self_attn\.attn has 2 KV heads of 32 and 32 coordinates, where .* have 4 of 32"
    with pytest.raises(NotImplementedError, match=message):
        start(change)


def test_nothing_is_folded_into_projections_that_are_clipped(
    start_engine, tiny_model, make_adapter, monkeypatch, serving
):
    from vllm.model_executor.models import llama

    def forward(self, positions, hidden_states):
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.clamp(-8, 8).split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        attended = self.attn(*self.rotary_emb(positions, q, k), v)
        return self.o_proj(attended)[0]

    monkeypatch.setattr(llama.LlamaAttention, "forward", forward)
    model = tiny_model("llama")
    engine = start_engine(model, make_adapter(model))
    for layer in serving.worker_of(engine).model_runner.get_model().model.layers:
        for run in layer.self_attn.attn.impl.attention.bases.runs:
            assert run.value_down is not None and run.value_up is None
