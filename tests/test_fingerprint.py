# SPDX-License-Identifier: Apache-2.0
"""What of a model an adapter is made for."""

import pytest

from vllm_mkv.fingerprint import ModelFingerprint


def test_the_fingerprint_of_a_saved_model_equals_itself_as_json(tiny_model, architecture):
    from transformers import AutoConfig

    fingerprint = ModelFingerprint.of(AutoConfig.from_pretrained(tiny_model(architecture)))
    assert ModelFingerprint.model_validate_json(fingerprint.model_dump_json()) == fingerprint
    assert (fingerprint.num_hidden_layers, fingerprint.num_key_value_heads, fingerprint.head_size) == (3, 4, 32)
    assert fingerprint.rope["rope_theta"] == 10000.0


@pytest.mark.parametrize("partial", [None, 0.5])
def test_rotary_parameters_that_are_attributes_are_those_that_vllm_gathers(partial):
    from transformers import PretrainedConfig

    config = PretrainedConfig(num_attention_heads=4, num_hidden_layers=2, hidden_size=64)
    config.rope_theta, config.partial_rotary_factor = 5e5, partial
    ours = ModelFingerprint.of(config)
    assert ours.rope["rope_theta"] == 5e5 and ours.rope.get("partial_rotary_factor") == partial
    config.standardize_rope_params()
    assert config.rope_parameters and ModelFingerprint.of(config) == ours
