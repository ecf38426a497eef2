"""Settings of the sampler. No torch here, so that reading a config stays instant."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastsmart.errors import UserError
from fastsmart.limits import MOST_AT_ONCE, require, require_finite

ENGINES = ("native", "vllm")


@dataclass(frozen=True)
class VllmSettings:
    """Settings of vLLM; the rest is in `SamplingSettings`."""

    kv_cache_bytes: int = 0
    """Size of its KV cache; 0 = what `sampling.max_rows` completions of full length need, no more."""
    sleep: bool = False
    """Whether, on a GPU, to move its weights to the host and drop its KV cache between two rollouts, so that the
    trainer has the memory."""
    server: str = ""
    """Address of a vLLM server on GPUs of its own, such as http://127.0.0.1:8000; "" = in this process."""
    transfer_host: str = "127.0.0.1"
    transfer_port: int = 29600
    """Host and port at which this process and the server's workers meet for the weights (NCCL)."""

    def __post_init__(self) -> None:
        if self.kv_cache_bytes < 0:
            raise UserError(f"vllm.kv_cache_bytes is {self.kv_cache_bytes}; it must be 0 (computed) or above")
        if self.kv_cache_bytes > 2**50:
            raise UserError(f"vllm.kv_cache_bytes is {self.kv_cache_bytes}; it must be at most {2**50:,}, a pebibyte")
        if not 0 < self.transfer_port < 2**16:
            raise UserError(f"vllm.transfer_port is {self.transfer_port}; it must be from 1 to 65535")
        if self.server and not self.server.startswith(("http://", "https://")):
            raise UserError(f"vllm.server is {self.server!r}; write it as http://HOST:PORT")
        if self.server and self.sleep:
            raise UserError("vllm.sleep frees memory this process shares with vLLM; with vllm.server it shares none")


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of sampling."""

    engine: str = "native"
    """Sampling engine: "native" (fastsmart's own) or "vllm"."""
    group: int = 8
    """Completions of each prompt, the group its advantages are relative to."""
    max_tokens: int = 256
    """Tokens of a completion at most, EOS included."""
    temperature: float = 1.0
    """Temperature of the softmax; the log-probs that come back are those of the tempered distribution."""
    top_k: int = 0
    top_p: float = 1.0
    """Truncation of the distribution, off at 0 and 1.0; training, whose loss is over all of it, refuses both."""
    guidance: float = 1.0
    """How much more a prompt's style counts than in the policy itself (1): logits without the style, plus so many times
    what it changes. Of the native engine; training, whose loss is that of the policy, refuses it."""
    max_rows: int = 256
    """Sequences decoded side by side (memory: one KV cache row each)."""
    ignore_eos: bool = False
    """Whether only max_tokens ends a completion: of a benchmark whose pieces are to have one length."""
    cuda_graph: bool = True
    """Whether the native engine records a decode step on a GPU and replays it."""
    vllm: VllmSettings = field(default_factory=VllmSettings)
    """Settings that only the engine "vllm" reads."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError(f"sampling.engine is {self.engine!r}; choose one of {', '.join(ENGINES)}")
        require(self, "sampling.", dict.fromkeys(("group", "max_tokens", "max_rows"), (1, MOST_AT_ONCE)))
        require_finite(self, "sampling.", "temperature")
        require_finite(self, "sampling.", "guidance")
        if self.guidance < 0:
            raise UserError(f"sampling.guidance is {self.guidance}; it must be 0 or above")
        if self.guidance != 1 and self.engine != "native":
            raise UserError(f"sampling.guidance is {self.guidance}; only the engine 'native' has it, leave it at 1")
        if not self.temperature > 0:
            raise UserError(f"sampling.temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.top_k < 2**31 or not 0 < self.top_p <= 1:
            raise UserError(
                f"sampling.top_k {self.top_k} and top_p {self.top_p}: use 0 and 1.0 for off, top_p in (0, 1]"
            )
