# SPDX-License-Identifier: Apache-2.0
"""Checks an engine's configuration in the user's own process, before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from mkv_kernels.layout import PAGE_STEP
from vllm_mkv.serving import compat
from vllm_mkv.serving.options import MKVOptions
from vllm_mkv.serving.plan import ServingPlan

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# vLLM configures the logger `vllm` alone.
logger = init_logger("vllm.mkv")


def configure(vllm_config: VllmConfig) -> None:
    """Refuses what MKV does not serve, reads the adapter, logs the plan, writes the adapter's digest into the options.

    Raises:
        NotImplementedError: names the feature that is not supported and the alternative.
        ValueError: names the cause and the mend.
    """
    compat.check_vllm_version()
    refuse_unsupported(vllm_config)
    plan = ServingPlan.make(vllm_config, MKVOptions.of(vllm_config))
    # New dictionaries: the user may start other engines with the ones that were given.
    given = vllm_config.additional_config
    vllm_config.additional_config = {**given, "mkv": {**given.get("mkv", {}), "digest": plan.digest}}
    logger.info("%s", plan.describe())
    model = vllm_config.model_config
    warn_of_another_model(plan.adapter.config.base_model_name_or_path, model.model)
    calibrated, longest = plan.adapter.config.made.get("context"), model.max_model_len
    warn_of_long_rope(model, calibrated)
    window = model.get_sliding_window()
    if window is not None and window < longest and "sliding_window" in kinds_of_layers(vllm_config):
        logger.warning(
            "MKV: layers with a sliding window keep all tokens, not %d as vLLM's own backends may, which then hold "
            "more tokens in the same memory where contexts are many windows long.",
            window,
        )
    if isinstance(calibrated, int) and calibrated < longest:
        logger.warning(
            "MKV: the adapter was made from windows of %d tokens, and requests may have %d: farther on, it is worse "
            "than was measured. Calibrate and search with --context %d, or lower --max-model-len.",
            calibrated,
            longest,
            longest,
        )


def warn_of_another_model(adapters: str, served: str) -> None:
    """Of the same shape, or `check_model` would have refused it. Names are compared without where they lie."""
    if Path(adapters).name.casefold() != Path(served).name.casefold():
        logger.warning(
            "MKV: the adapter was made for %s, and %s is served. Their shapes are equal; how good it is here was not "
            "measured: vllm-mkv eval tells.",
            adapters,
            served,
        )


def warn_of_long_rope(model: ModelConfig, calibrated: object) -> None:
    """vLLM rotates every token of a LongRoPE model by its long factors where requests may be long; transformers, which
    adapters are made with, only in windows that are."""
    rope = getattr(model.hf_text_config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(
        model.hf_text_config, "original_max_position_embeddings", None
    )
    if rope.get("rope_type") != "longrope" or not isinstance(original, int) or not isinstance(calibrated, int):
        return
    served_long = model.max_model_len > original
    if (calibrated > original) != served_long:
        logger.warning(
            "MKV: this model has a rotary embedding for up to %d tokens and one for more; the adapter was made with "
            "one and is served with the other: worse than was measured. Calibrate and search with --context %d, or "
            "set --max-model-len to %d.",
            original,
            original + served_long,
            original + (not served_long),
        )


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raises NotImplementedError for the first feature of a configuration that MKV does not serve."""
    for feature, alternative in unsupported_features(vllm_config):
        raise NotImplementedError(
            f"{feature} is not supported with --attention-backend mkv; {alternative or 'serve with another backend'}"
        )


def unsupported_features(vllm_config: VllmConfig) -> list[tuple[str, str]]:
    """Features that the configuration asks for and MKV does not serve, each with the alternative."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    text = model.hf_text_config
    other = "serve this model with another backend"
    quantised = "leave --kv-cache-dtype at auto: MKV's budget is what makes the cache smaller"
    checkpoints = f"pass --kv-cache-dtype {own_dtype(model)}: MKV's budget is what makes the cache smaller"
    speculative = vllm_config.speculative_config
    attention = vllm_config.attention_config
    mkv = compat.mkv_member()
    own_dtypes = ("auto", own_dtype(model))
    layer_types = set(getattr(text, "layer_types", None) or ["full_attention"])
    # vLLM looks a layer's kind up first; MKV for kinds that no layer here is of would serve nothing.
    mkv_serves_layers = all(
        attention.backend_per_kind.get(kind, attention.backend) is mkv for kind in kinds_of_layers(vllm_config)
    )
    found = [
        (model.use_mla, "an MLA model", "MLA's cache is a latent one already; " + other),
        (model.is_encoder_decoder, "an encoder-decoder model", other),
        (model.runner_type != "generate", f"--runner {model.runner_type}", "MKV serves generating models"),
        (model.uses_alibi or model.architecture in ALIBI_ARCHITECTURES, "ALiBi", other),
        (
            bool(layer_types - SERVED_LAYERS) or model.is_hybrid or model.is_attention_free,
            f"a model with layers of kinds {', '.join(sorted(layer_types))}",
            other,
        ),
        (model.architecture in SINK_ARCHITECTURES, "attention sinks", other),
        (
            model.is_diffusion or model.is_mm_prefix_lm or attention.use_non_causal,
            "attention that is not causal",
            other,
        ),
        (
            cache.cache_dtype != own_dtype(model) and declares_a_cache(model),
            "the quantised cache that this checkpoint asks for",
            checkpoints,
        ),
        (cache.cache_dtype not in own_dtypes, f"--kv-cache-dtype {cache.cache_dtype}", quantised),
        (
            bool((cache.block_size or 0) % PAGE_STEP),
            f"--block-size {cache.block_size}",
            f"pass a multiple of {PAGE_STEP}",
        ),
        # It brings a KV connector of its own, so it is named first.
        (cache.kv_offloading_size is not None, "KV offloading", "remove --kv-offloading-size"),
        (vllm_config.kv_transfer_config is not None, "a KV connector", "remove --kv-transfer-config"),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism",
            "use --tensor-parallel-size",
        ),
        (
            speculative is not None and speculative.method not in MODEL_FREE_SPECULATION,
            f"speculative decoding with {getattr(speculative, 'method', None)}",
            "use the method ngram, which needs no draft model",
        ),
        (
            not mkv_serves_layers or bool(set(attention.backend_per_kind.values()) - {mkv}),
            f"MKV beside other attention backends ({backends_by_kind(vllm_config)})",
            "give --attention-backend mkv alone",
        ),
        (parallel.use_ubatching, "dual batch overlap", "remove --enable-dbo and --ubatch-size"),
        (compat.is_batch_invariant(), "VLLM_BATCH_INVARIANT=1", "unset it"),
        (
            vllm_config.weight_transfer_config is not None and MKVOptions.of(vllm_config).fold,
            "--weight-transfer-config with value bases folded into the weights",
            'add "fold": false to the mkv options',
        ),
        (vllm_config.load_config.load_format == "ipc_cache", "--load-format ipc_cache", "use another --load-format"),
        (model.architecture in PERMUTED_ARCHITECTURES, "a model whose keys vLLM permutes", other),
    ]
    return [(feature, alternative) for present, feature, alternative in found if present]


def own_dtype(model: ModelConfig) -> str:
    return str(model.dtype).removeprefix("torch.")


def declares_a_cache(model: ModelConfig) -> bool:
    """Whether a checkpoint says how the keys and values of its cache are to be quantised, as compressed-tensors and
    ModelOpt write it."""
    declared = getattr(model.hf_config, "quantization_config", None)
    if not isinstance(declared, dict):
        return False
    places = (declared, declared.get("quantization") or {})
    return any(place.get(key) for place in places for key in ("kv_cache_scheme", "kv_cache_quant_algo"))


def kinds_of_layers(vllm_config: VllmConfig) -> set[str]:
    """Of a model's attention, as `backend_per_kind` names them."""
    model = vllm_config.model_config
    types = set(getattr(model.hf_text_config, "layer_types", None) or ["sliding_attention"])
    if model.get_sliding_window() is None or "sliding_attention" not in types:
        return {"full_attention"}
    return {"sliding_window", "full_attention"} if len(types) > 1 else {"sliding_window"}


def backends_by_kind(vllm_config: VllmConfig) -> str:
    attention = vllm_config.attention_config
    named = {kind: backend.name for kind, backend in attention.backend_per_kind.items()}
    return f"backend {attention.backend.name if attention.backend else 'auto'}, backend_per_kind {named}"


ALIBI_ARCHITECTURES = frozenset({"Step1ForCausalLM"})
"""Beside those that vLLM's ModelConfig.uses_alibi knows. The impl's constructor refuses the rest."""
SINK_ARCHITECTURES = frozenset({"GptOssForCausalLM"})
"""The impl's constructor refuses the rest."""
PERMUTED_ARCHITECTURES = frozenset({"K2HorizonForCausalLM"})
"""Keys have their channels in another order than in transformers, with which adapters are made."""
SERVED_LAYERS = frozenset({"full_attention", "attention", "sliding_attention"})
MODEL_FREE_SPECULATION = frozenset({"ngram", "ngram_gpu", "suffix"})
