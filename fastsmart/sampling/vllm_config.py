"""Facts about a vLLM engine before it exists: its memory, its requests, whether its version will do.

No torch and no vLLM here, so that reading a config and `--dry-run` stay instant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsmart.errors import UserError
from fastsmart.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from fastsmart.policy.transformer import PolicySize

OLDEST, TOO_NEW = "0.32", "0.34"  # the releases fastsmart is written for: 0.32 and 0.33
WANTED = f"vllm>={OLDEST},<{TOO_NEW}"
PROMPT_ROOM = 64  # prompt tokens the KV cache is sized for; longer prompts fit too, with fewer sequences side by side
MAX_TRANSFER_BYTES = 2**30  # vLLM's own default for a packed buffer


@dataclass(frozen=True)
class VllmMemory:
    """Memory that an engine in this process will hold.

    rows           : completions decoded side by side
    longest        : tokens of prompt and completion the cache is sized for
    block_tokens   : tokens of a KV-cache block
    kv_cache_bytes, weight_bytes : of memory
    """

    rows: int
    longest: int
    block_tokens: int
    kv_cache_bytes: int
    weight_bytes: int

    def __str__(self) -> str:
        return (
            f"vLLM will hold {self.weight_bytes / 2**20:,.1f} MiB of weights and a KV cache of "
            f"{self.kv_cache_bytes / 2**20:,.1f} MiB ({self.rows} completions of {self.longest} tokens, in blocks of "
            f"{self.block_tokens})"
        )


def memory_needed(size: PolicySize, settings: SamplingSettings, dtype_bytes: int, on_gpu: bool) -> VllmMemory:
    """The plan for a policy of this size.

    A block holds keys and values of `block_tokens` tokens in every layer: 2 x layers x K x E numbers a token. The
    cache is what `max_rows` completions need and never less than one sequence of `max_positions`, which vLLM insists
    on; one block more, because vLLM keeps one for itself.

    Raises UserError when `vllm.kv_cache_bytes` is less than that one sequence.
    """
    block_tokens = 16 if on_gpu else 128  # vLLM's own defaults
    longest = min(size.max_positions, PROMPT_ROOM + settings.max_tokens)
    block_bytes = 2 * size.num_layers * size.num_kv_heads * size.head_size * dtype_bytes * block_tokens
    blocks = settings.max_rows * -(-longest // block_tokens)
    least = (-(-size.max_positions // block_tokens) + 1) * block_bytes
    cache = settings.vllm.kv_cache_bytes or max((blocks + 1) * block_bytes, least)
    if cache < least:
        raise UserError(
            f"sampling.vllm.kv_cache_bytes is {cache}; one sequence of the policy's {size.max_positions} tokens needs "
            f"{least}; raise it, or set it to 0"
        )
    return VllmMemory(settings.max_rows, longest, block_tokens, cache, weight_count(size) * dtype_bytes)


def weight_count(size: PolicySize) -> int:
    """Parameters vLLM holds: embedding, head (tied or not), last norm; each layer's four matrices and two norms."""
    hidden, heads = size.hidden_size, size.num_heads + 2 * size.num_kv_heads
    layer = hidden * heads * size.head_size + hidden * hidden + 3 * hidden * size.intermediate_size + 2 * hidden
    return size.num_layers * layer + hidden + 2 * size.vocab_size * hidden


def request_fields(settings: SamplingSettings, seed: tuple[int, ...], eos: int) -> dict[str, Any]:
    """vLLM's sampling parameters of one completion, which has a random stream of its own."""
    return {
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "seed": int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0]),
        "ignore_eos": True,  # vLLM knows no tokenizer; the end is a stop token like any other
        "stop_token_ids": [] if settings.ignore_eos else [eos],
        "logprobs": 0,  # of the token drawn, no others
        "detokenize": False,
    }


def transfer_buffer_bytes(tensor_bytes: list[int]) -> int:
    """Size of a packed transfer buffer for tensors of these sizes: all of them at once, up to vLLM's default of 1 GiB,
    and never less than the largest. Two buffers are held on each side."""
    return max(min(sum(tensor_bytes), MAX_TRANSFER_BYTES), max(tensor_bytes))


def check_version(found: str | None) -> None:
    """Raises UserError when there is no vLLM, or one fastsmart was not written for."""
    if found is None:
        raise UserError(f"--engine vllm needs vLLM: pip install '{WANTED}', or use --engine native")
    from packaging.version import Version

    if not Version(OLDEST) <= Version(Version(found).base_version) < Version(TOO_NEW):
        raise UserError(f"vLLM {found} is not one fastsmart works with: pip install '{WANTED}', or use --engine native")


def check_api(missing: list[str], found: str) -> None:
    """Raises UserError when the installed vLLM lacks what fastsmart calls, whatever its version says."""
    if missing:
        raise UserError(f"vLLM {found} lacks {', '.join(missing)}: pip install '{WANTED}', or use --engine native")
