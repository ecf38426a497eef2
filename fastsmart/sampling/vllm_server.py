"""A vLLM server on GPUs of its own as the sampler: completions over HTTP, weights over NCCL.

The server is the user's to start (README); vLLM's own weight transfer does the sending, in the order
init_weight_transfer_engine, then for every sync: pause (requests under way are kept), start_weight_update,
update_weights beside the broadcast, finish_weight_update with the version, resume.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastsmart.errors import UserError
from fastsmart.policy.transformer import Policy
from fastsmart.sampling.rollout import Completion, check_prompts, not_finite
from fastsmart.sampling.settings import SamplingSettings
from fastsmart.sampling.vllm_config import request_fields
from fastsmart.tokens.token_batch import TokenBatch

TIMEOUT_S = 300.0
VOCABULARY_BLOCK = 64  # vLLM rounds embedding and head up to this many rows, with zeros


class Server:
    """The HTTP side of a vLLM server."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str) -> dict[str, Any]:
        return self._ask(urllib.request.Request(f"{self.address}/{path}"))

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a POST; raises UserError with the server's own reason when it refuses or is not there."""
        content = json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        return self._ask(urllib.request.Request(f"{self.address}/{path}", content, headers))

    def _ask(self, request: urllib.request.Request) -> dict[str, Any]:
        path = request.full_url.removeprefix(f"{self.address}/")
        try:
            with self.opener.open(request, timeout=TIMEOUT_S) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace").strip() or error.reason
            hint = "; start it with VLLM_SERVER_DEV_MODE=1" if error.code == 404 else ""
            raise UserError(f"the vLLM server at {self.address} refuses {path}: {reason[:500]}{hint}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"the vLLM server at {self.address} does not answer {path}: {error}") from error


class WeightSync:
    """Client that vLLM's trainer side calls on the server (its `VLLMWeightSyncClient`); `version` is stamped on the
    next sync."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.version = ""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.server.post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.server.post("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.server.post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.server.post("finish_weight_update", {"weight_version": weight_version or self.version})


class RemoteEngine:
    """Samples on the server `settings.vllm.server` and sends it `policy`'s weights, in place as they are trained.

    dtype : the server computes in, to compare tensors

    Under torchrun rank 0 sends, and no rank goes on before the server has the weights. Raises UserError when the server
    is not there, refuses, or reports other weights than were sent.
    """

    def __init__(self, policy: Policy, version: int, dtype: torch.dtype, settings: SamplingSettings) -> None:
        from fastsmart.sampling.vllm import open_transfer

        self.policy, self.dtype = policy, dtype
        self.size, self.eos = policy.size, policy.vocab.eos_id
        self.server = Server(settings.vllm.server)
        self.client = WeightSync(self.server)
        self.shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if self.shared else 0
        self.sends = rank == 0
        workers = int(self.server.get("get_world_size")["world_size"])
        where = settings.vllm.transfer_host, settings.vllm.transfer_port
        self.transfer = open_transfer(self.client, policy, *where, world_size=1 + workers, rank=rank)
        self.load(policy, version)

    def load(self, policy: Policy, version: int) -> None:
        """Send the weights; a server whose sync failed stays paused, for its weights are of no version."""
        if policy is not self.policy:
            raise ValueError("a remote engine sends the weights of the policy it was made for")
        if self.sends:
            self.server.post("pause?mode=keep")
        self.client.version = str(version)
        self.transfer.send_weights()
        if self.sends:
            held = self.server.get("weight_info")["weight_version"]
            if held != str(version):
                raise UserError(f"the vLLM server at {self.server.address} holds version {held}, not {version}")
            self.server.post("resume")
        if self.shared:
            torch.distributed.barrier()
        self.version = version

    def stream(
        self, prompts: TokenBatch, settings: SamplingSettings, seed: tuple[int, ...], first: int = 0
    ) -> Iterator[Completion]:
        check_prompts(prompts, settings, self.size.max_positions)
        total = len(prompts) * settings.group
        with ThreadPoolExecutor(min(max(total, 1), settings.max_rows), "vllm-request") as senders:
            waiting = [
                senders.submit(
                    self._complete,
                    first + i,
                    prompts.row(i // settings.group).tolist(),
                    request_fields(settings, (*seed, first + i), self.eos),
                )
                for i in range(total)
            ]
            try:
                for done in as_completed(waiting):
                    yield done.result()
            finally:
                for request in waiting:
                    request.cancel()

    def _complete(self, index: int, prompt: list[int], parameters: dict[str, Any]) -> Completion:
        """One completion; its version is that of the weights its first token was sampled with."""
        body = {"token_ids": prompt, "sampling_params": parameters, "stream": False}
        sampled = self.server.post("inference/v1/generate", body)["choices"][0]
        ids = np.array(sampled["token_ids"], np.int32)
        logprobs = np.array([token["logprob"] for token in sampled["logprobs"]["content"]], np.float32)
        if not np.isfinite(logprobs).all():
            raise not_finite()
        return Completion(index, ids, logprobs, int(sampled["weight_versions"][0]["version"]))

    def first_difference(self, policy: Policy) -> str | None:
        held = self.server.post("weight_checker", {"action": "checksum"})["checksums"]
        for name, parameter in policy.named_parameters():
            if held.get(name) != checksum(parameter, self.dtype, padded=parameter.shape[0] == self.size.vocab_size):
                return name
        return None

    def close(self) -> None:
        self.transfer.shutdown()
        if self.sends:
            with contextlib.suppress(UserError):  # a server that is gone has nothing to give back
                self.server.post("shutdown_weight_transfer_engine")


def checksum(parameter: torch.Tensor, dtype: torch.dtype, padded: bool) -> str:
    """sha256 of a tensor as vLLM holds it, hex; `padded`: with rows of zeros up to a whole block of the vocabulary."""
    tensor = parameter.detach().to("cpu", dtype)
    if padded:
        tensor = F.pad(tensor, (0, 0, 0, -len(tensor) % VOCABULARY_BLOCK))
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
