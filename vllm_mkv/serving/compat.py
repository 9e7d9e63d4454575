# SPDX-License-Identifier: Apache-2.0
"""Every private or temporary piece of vLLM that the plugin leans on, each with the condition for its removal.

Imports of vLLM are inside functions: this module is imported in every vLLM process, whether MKV is used or not.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import nn
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention

SUPPORTED_VLLM = ("0.32", "0.33")
NAME = "MKV"
BACKEND = "vllm_mkv.serving.backend.MKVAttentionBackend"
INTERPRETED_PROCESSORS = 8
"""What work is cut up for where Triton is interpreted."""


def vllm_version() -> str:
    import vllm

    return vllm.__version__


def check_vllm_version() -> None:
    """Raises NotImplementedError where vLLM is of a version that was not tested."""
    version = vllm_version()
    if not version.startswith(tuple(f"{supported}." for supported in SUPPORTED_VLLM)):
        raise NotImplementedError(
            f"vLLM {version} is not supported by this vllm-mkv; install vLLM {' or '.join(SUPPORTED_VLLM)}, "
            "or a vllm-mkv made for it"
        )


def register_backend() -> None:
    """Adds the enum member that `--attention-backend mkv` names, and the check of the configuration behind it.

    Private: AttentionBackendEnum.register, with its log line held back (a stock start logs nothing of the plugin).
    Removable when vLLM's enum takes members from entry points.
    """
    from vllm.v1.attention.backends import registry

    members = registry.AttentionBackendEnum.__members__
    if NAME not in members:
        level = registry.logger.level
        registry.logger.setLevel(logging.WARNING)
        try:
            registry.register_backend(NAME, BACKEND)
        finally:
            registry.logger.setLevel(level)
        # Pickled by name, a member made at run time is unknown to a process that has not loaded its plugins yet.
        # Removable when vLLM's processes load plugins before they unpickle their configuration.
        members[NAME].__reduce_ex__ = lambda protocol: (restore_member, ())
        _prepare_when_looked_up(type(registry.AttentionBackendEnum))
    _check_engine_configs()


def _prepare_when_looked_up(enum_meta: Any) -> None:
    """Whoever asks for the member by name wants MKV; what was not loaded when the plugin registered is there by then.

    Private: wraps the enum's look-up by name. Removable together with `_check_engine_configs`.
    """
    original = enum_meta.__getitem__

    def look_up(cls: Any, name: str) -> Any:
        member = original(cls, name)
        if name == NAME:
            _check_engine_configs()
            activate()
        return member

    enum_meta.__getitem__ = look_up


def restore_member() -> Any:
    """The enum member, in a process that unpickles a configuration that names it. MKV is wanted here: activate it."""
    register_backend()
    activate()
    return mkv_member()


def mkv_member() -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum.__members__[NAME]


def uses_mkv(vllm_config: VllmConfig) -> bool:
    """Whether any layer of the model may be given the MKV backend."""
    attention = vllm_config.attention_config
    # Every engine's start comes by here, in whatever vLLM: one without the option has no such backends.
    return mkv_member() in (attention.backend, *getattr(attention, "backend_per_kind", {}).values())


def _check_engine_configs() -> None:
    """Lets `configure` see every engine configuration as soon as it is made, in the user's own process.

    Private: wraps EngineArgs.create_engine_config. Removable when attention backends get a hook that sees the
    configuration before the engine starts.
    """
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    # Only a process that makes engine configurations has the module; none is loaded here for its own sake.
    if arg_utils is None or not hasattr(arg_utils, "EngineArgs"):
        return
    original = arg_utils.EngineArgs.create_engine_config
    if hasattr(original, "mkv_original"):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        vllm_config = original(self, *args, **kwargs)
        if uses_mkv(vllm_config):
            from vllm_mkv.serving.configure import configure

            try:
                configure(vllm_config)
            except (ValueError, NotImplementedError) as error:
                print_without_traceback(error)
                raise
            activate()
        elif isinstance(vllm_config.additional_config, dict) and "mkv" in vllm_config.additional_config:
            logging.getLogger("vllm.mkv").warning(
                "--additional-config has options under mkv, which are ignored: give --attention-backend mkv"
            )
        return vllm_config

    create_engine_config.mkv_original = original  # type: ignore[attr-defined]
    arg_utils.EngineArgs.create_engine_config = create_engine_config


def print_without_traceback(error: Exception) -> None:
    """If this very error ends the process, the user sees its message alone: it names the cause and the mend."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], raised: BaseException, traceback: Any) -> None:
        # Not what was raised while this one was handled: that is the user's own, and needs its traceback.
        if raised is error:
            print(f"vllm-mkv: error: {' '.join(str(error).split())}", file=sys.stderr)
        else:
            previous(kind, raised, traceback)

    sys.excepthook = hook


def activate() -> None:
    """Prepares this process for running MKV. Called only where the backend has been chosen; idempotent."""
    _honour_backend_on_cpu()
    _load_adapters_after_weights()


def _honour_backend_on_cpu() -> None:
    """Private: wraps CpuPlatform.get_attn_backend_cls, which ignores the chosen backend. Removable when it does not."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.get_attn_backend_cls
    if hasattr(original, "mkv_original"):
        return

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is not mkv_member():
            return original(selected_backend, attn_selector_config, num_heads)
        from vllm_mkv.serving.backend import MKVAttentionBackend

        reasons = MKVAttentionBackend.validate_configuration(
            **attn_selector_config._asdict(),
            device_capability=None,  # type: ignore[arg-type]
        )
        if reasons:
            raise NotImplementedError(f"the MKV attention backend does not serve this model: {', '.join(reasons)}")
        return BACKEND

    get_attn_backend_cls.mkv_original = original  # type: ignore[attr-defined]
    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)  # type: ignore[assignment,method-assign]


def _load_adapters_after_weights() -> None:
    """Lets MKVModelLoader follow whichever loader the user chose.

    Private: wraps get_model_loader in its module and in the runners that imported it by name. Removable when attention
    backends get a hook between loading and processing a model's weights.
    """
    from vllm.model_executor import model_loader

    original = model_loader.get_model_loader
    if hasattr(original, "mkv_original"):
        return

    @functools.wraps(original)
    def get_model_loader(load_config: Any) -> Any:
        from vllm_mkv.serving.loader import MKVModelLoader

        return MKVModelLoader(original(load_config))

    get_model_loader.mkv_original = original  # type: ignore[attr-defined]
    model_loader.get_model_loader = get_model_loader
    for name in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner", "vllm.v1.worker.gpu_worker"):
        module = sys.modules.get(name)
        if getattr(module, "get_model_loader", None) is original:
            module.get_model_loader = get_model_loader  # type: ignore[union-attr]


def attention_layers(vllm_config: VllmConfig) -> dict[str, Attention]:
    """All of the model's layers with a cache, of whatever class, by name. Private:
    CompilationConfig.static_forward_context."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    context = vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if isinstance(layer, AttentionLayerBase)}


def is_plain_attention(layer: Any) -> bool:
    """Whether a layer is vLLM's own, not of a class that changes which tokens are seen, or what is kept."""
    from vllm.model_executor.layers.attention import Attention

    return type(layer) is Attention


def is_batch_invariant() -> bool:
    from vllm import envs

    return envs.VLLM_BATCH_INVARIANT


def keep_weights(model: nn.Module) -> None:
    """Has the worker refuse, before it does anything, what would lose, overwrite or hand out this model's weights:
    bases are folded into them. To sleep is refused by the engine, before it pauses, where that is in this process.

    Private: wraps methods of the worker that `collective_rpc` and the engine call. Removable when vLLM asks the model
    or its loader first.
    """

    def refuse(what: str, more: str = "") -> NotImplementedError:
        what = {"sleep": "sleep of level 2", "discard": "discarding weights"}.get(what, what)
        return NotImplementedError(
            f"{what} is not supported while MKV's value bases are folded into the weights; start the engine with "
            f'"fold": false in the mkv options{more}'
        )

    def load_weights(*args: Any, **kwargs: Any) -> Any:
        raise refuse("loading weights into a model that is served")

    model.load_weights = load_weights  # type: ignore[assignment]
    model.mkv_folded = True  # type: ignore[assignment]

    def guard(owner: Any, name: str, model_of: Callable[[Any], Any], more: str = "") -> None:
        original = getattr(owner, name, None)
        if original is None or hasattr(original, "mkv_original"):
            return

        @functools.wraps(original)
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(model_of(self), "mkv_folded", False) and _takes_weights(name, *args, **kwargs):
                raise refuse(name, more)
            return original(self, *args, **kwargs)

        checked.mkv_original = original  # type: ignore[attr-defined]
        setattr(owner, name, checked)

    def model_of_worker(worker: Any) -> Any:
        return worker.model_runner.get_model()

    def model_of_engine(core: Any) -> Any:
        driver = getattr(core.model_executor, "driver_worker", None)
        return None if driver is None else model_of_worker(driver.worker)

    worker = getattr(sys.modules.get("vllm.v1.worker.gpu_worker"), "Worker", None)
    for name in ("reload_weights", "save_sharded_state", "save_tensorized_model", "discard"):
        guard(worker, name, model_of_worker)
    guard(worker, "sleep", model_of_worker, ". The engine is paused by now; wake_up resumes it")
    guard(getattr(sys.modules.get("vllm.v1.engine.core"), "EngineCore", None), "sleep", model_of_engine)


def _takes_weights(method: str, *args: Any, **kwargs: Any) -> bool:
    """Whether a call of such a method loses weights, replaces them or hands them out."""
    if method == "sleep":  # on level 1, they wait in the CPU's memory
        return (args[0] if args else kwargs.get("level", 1)) == 2
    return method != "discard" or "weights" in (args[0] if args else kwargs.get("tags", ("weights",)))


def layer_index(layer_name: str) -> int:
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(layer_name)


def set_cache_spec(layer: Attention, make_spec: Callable[[VllmConfig], Any]) -> None:
    """Private: replaces the layer's get_kv_cache_spec; AttentionBackend.customize_spec is told no layer's name.

    Removable when backends build specs per layer (vLLM issue 42449).
    """
    layer.get_kv_cache_spec = make_spec  # type: ignore[method-assign]


def plain_linear_children(parent: nn.Module) -> tuple[Any, Any]:
    """The fused q/k/v projection and the output projection of an attention module, where each is the only one of its
    kind and has plain, unquantised weights. Private: UnquantizedLinearMethod says that weights are plain.
    """
    from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear, UnquantizedLinearMethod

    def only(kind: type) -> Any:
        found = [child for child in parent.children() if isinstance(child, kind)]
        plain = len(found) == 1 and type(found[0].quant_method) is UnquantizedLinearMethod
        return found[0] if plain else None

    return only(QKVParallelLinear), only(RowParallelLinear)


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU. Private: vllm.utils.platform_utils.num_compute_units."""
    from vllm.platforms import current_platform
    from vllm.utils.platform_utils import num_compute_units

    return num_compute_units(device.index or 0) if current_platform.is_cuda_alike() else INTERPRETED_PROCESSORS


def warm_up_threads(vllm_config: VllmConfig) -> int:
    """Threads that may compile Triton kernels at the start; 0 where none should be compiled then.

    As vLLM does with its own: not with --enforce-eager, which turns enable_jit_warmup off. Private: that, and
    VLLM_TRITON_JIT_WARMUP_NUM_THREADS. vLLM's registry of kernels to warm up would run after its estimate of CUDA
    graphs' memory, which launches them one by one. Removable when it runs before.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    enabled = getattr(vllm_config.kernel_config, "enable_jit_warmup", not vllm_config.model_config.enforce_eager)
    if not enabled or os.environ.get("TRITON_INTERPRET") == "1":
        return 0
    # AMD's compiler can abort where several threads use it.
    return max(1, getattr(envs, "VLLM_TRITON_JIT_WARMUP_NUM_THREADS", 4)) if current_platform.is_cuda() else 1


def max_decode_queries(vllm_config: VllmConfig) -> int:
    """Queries of a request that decodes, drafts included. Private: max_decode_query_len of attention backends."""
    try:
        from vllm.v1.attention.backend import max_decode_query_len
    except ImportError:
        speculative = vllm_config.speculative_config
        return 1 + (speculative.num_speculative_tokens or 0 if speculative is not None else 0)
    return max_decode_query_len(vllm_config)


def _workspace_manager() -> Any:
    """vLLM's, or None: the CPU's runner makes none. Private: vllm.v1.worker.workspace."""
    from vllm.v1.worker import workspace

    return workspace.current_workspace_manager() if workspace.is_workspace_manager_initialized() else None


def shared_workspace(device: torch.device, *sizes: tuple[int, torch.dtype]) -> list[torch.Tensor]:
    """Flat tensors of so many numbers each, out of the memory that vLLM's backends share."""
    import torch

    if (manager := _workspace_manager()) is not None:
        return manager.get_simultaneous(*(((size,), dtype) for size, dtype in sizes))
    return [torch.empty(size, dtype=dtype, device=device) for size, dtype in sizes]


def zeroed_workspace(device: torch.device, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor that nobody else writes, zero when it is made."""
    import torch

    if (manager := _workspace_manager()) is not None:
        return manager.get_persistent(name, (size,), dtype, zero_init=True)
    return torch.zeros(size, dtype=dtype, device=device)


def workspace_is_final() -> bool:
    """Whether what `shared_workspace` gave stays where it is."""
    manager = _workspace_manager()
    return manager is None or manager.is_locked()


def memo_on_step(step: Any, build: Callable[[], Any]) -> Any:
    """`build()` once per step: vLLM hands every metadata builder of a cache group the same object.

    Private: an attribute on CommonAttentionMetadata. Removable when layers whose specs differ in page size alone share
    one metadata builder.
    """
    memo = getattr(step, "_mkv_memo", None)
    # A shallow copy of the object carries the attribute along, and is another step.
    if memo is None or memo[0] != id(step):
        memo = (id(step), build())
        step._mkv_memo = memo
    return memo[1]


@contextmanager
def prompt_logprobs_as_arrays() -> Iterator[None]:
    """Inside it, `RequestOutput.prompt_logprobs` is a pair of arrays: token ids and log-probabilities, [rows, K] each.

    Private: replaces LogprobsProcessor._update_prompt_logprobs, which makes several Python objects of every number:
    some 10 GB for 1024 tokens of a vocabulary of 100,000. Removable when prompt_logprob_token_ids, whose
    log-probabilities vLLM hands out as an array, works on the CPU too.
    """
    from vllm.v1.engine.logprobs import LogprobsProcessor

    original = LogprobsProcessor._update_prompt_logprobs

    def keep(self: Any, tensors: Any) -> None:
        self.prompt_logprobs = (tensors.logprob_token_ids.numpy(), tensors.logprobs.numpy())

    LogprobsProcessor._update_prompt_logprobs = keep  # type: ignore[method-assign]
    try:
        yield
    finally:
        LogprobsProcessor._update_prompt_logprobs = original  # type: ignore[method-assign]
