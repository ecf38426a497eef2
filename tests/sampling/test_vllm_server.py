"""A vLLM server of one's own: the order of the weight transfer, its sizes, versions and errors.

What speaks HTTP here checks every request with vLLM's own models and answers in them; vLLM's own trainer side drives
the transfer. Only NCCL is left out, for which it takes GPUs."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from vllm_policy import make_vllm_policy

from fastsmart.errors import UserError
from fastsmart.policy.transformer import Policy
from fastsmart.sampling import Rollout, SamplingSettings, make_engine
from fastsmart.sampling.native import NativeEngine
from fastsmart.sampling.settings import VllmSettings
from fastsmart.sampling.vllm_isolation import isolated
from fastsmart.sampling.vllm_server import checksum
from fastsmart.tokens.token_batch import TokenBatch

with isolated():
    from vllm.distributed.weight_transfer import nccl_engine
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest, GenerateTokensResponse
    from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests

PROMPTS = TokenBatch.pack([[21, 400, 180, 330], [1]])


class FakeServer:
    """The routes of `vllm serve`, in front of weights that arrive by a direct copy instead of NCCL."""

    def __init__(self, policy):
        self.policy = policy
        self.log, self.version, self.paused, self.refuse = [], "default", False, {}
        self.native = NativeEngine(policy)
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply({})

            def do_POST(self):
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

            def reply(self, body):
                route = self.path.removeprefix("/")
                with fake.lock:
                    fake.log.append(route)
                    status, answer = fake.refuse.get(route) or (200, fake.answer(route, body))
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, route, body):
        if route == "get_world_size":
            return {"world_size": 2}
        if route == "init_weight_transfer_engine":
            self.init = nccl_engine.NCCLWeightTransferInitInfo(**body["init_info"])
        if route == "pause?mode=keep":
            self.paused = True
        if route == "resume":
            self.paused = False
        if route == "update_weights":
            assert self.paused
            self.update = nccl_engine.NCCLWeightTransferUpdateInfo(**body["update_info"])
        if route == "finish_weight_update":
            self.version = body["weight_version"]
            self.native.load(self.policy, int(self.version))
        if route == "weight_info":
            return {"weight_version": self.version}
        if route == "weight_checker":
            return {"checksums": self.digests()}
        if route == "inference/v1/generate":
            return self.generate(GenerateRequest(**body))
        return {}

    def generate(self, request):
        p = request.sampling_params
        settings = SamplingSettings(group=1, max_tokens=p.max_tokens, temperature=p.temperature)
        (c,) = self.native.stream(TokenBatch.pack([request.token_ids]), settings, (p.seed,))
        content = [{"token_id": int(i), "logprob": float(x)} for i, x in zip(c.ids, c.logprobs, strict=True)]
        spans = [{"version": self.version, "start": 0, "end": len(c.ids)}]
        choice = {"index": 0, "token_ids": c.ids.tolist(), "logprobs": {"content": content}, "weight_versions": spans}
        return GenerateTokensResponse(request_id="r", choices=[choice]).model_dump()

    def digests(self):
        """vLLM's own checksums of the tensors as it would hold them."""
        held = torch.nn.Module()
        for name, p in self.policy.named_parameters():
            rows = -len(p) % 64 if p.shape[0] == 413 else 0
            padded = torch.nn.functional.pad(p.detach(), (0, 0, 0, rows)) if rows else p.detach()
            *path, leaf = name.split(".")
            module = held
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            module.register_parameter(leaf, torch.nn.Parameter(padded))
        return compute_tensor_digests(held)

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class FakeGroup:
    def destroy(self):
        pass


class OnGpu(Policy):
    """A policy that takes itself for one on a GPU."""

    device = torch.device("cuda")


@pytest.fixture
def trained(vocab):
    policy = make_vllm_policy(vocab, seed=1)
    policy.__class__ = OnGpu
    return policy


@pytest.fixture
def server(vocab, monkeypatch):
    fake = FakeServer(make_vllm_policy(vocab))
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: fake.log.append("rendezvous") or FakeGroup())

    def without_nccl(self, source, meta):
        fake.sent = []
        for name, tensor in self._checked_iter(source, meta):
            fake.sent.append((name, tuple(tensor.shape)))
            fake.policy.get_parameter(name).data.copy_(tensor)

    monkeypatch.setattr(nccl_engine.NCCLTrainerWeightTransferEngine, "_broadcast", without_nccl)
    yield fake
    fake.close()


def connect(server, policy, **settings):
    settings = SamplingSettings("vllm", group=3, max_tokens=20, vllm=VllmSettings(server=server.address, **settings))
    return make_engine(settings, policy, version=4), settings


SYNC = ["pause?mode=keep", "start_weight_update", "update_weights", "finish_weight_update", "weight_info", "resume"]


def test_a_sync_goes_in_vllms_order_and_carries_every_tensor(server, trained):
    engine, _ = connect(server, trained, transfer_port=29777)
    assert server.log[0] == "get_world_size"
    assert sorted(server.log[1:3]) == ["init_weight_transfer_engine", "rendezvous"]  # both at once
    assert server.log[3:] == SYNC
    server.log.clear()
    engine.load(trained, 5)
    assert server.log == SYNC
    named = [(name, tuple(p.shape)) for name, p in trained.named_parameters()]
    assert server.sent == named
    assert list(zip(server.update.names, map(tuple, server.update.shapes), strict=True)) == named
    assert set(server.update.dtype_names) == {"float32"}
    assert (engine.version, server.version, server.paused) == (5, "5", False)
    assert (server.init.master_port, server.init.world_size, server.init.rank_offset) == (29777, 3, 1)
    engine.close()
    assert server.log[-1] == "shutdown_weight_transfer_engine"


def test_buffers_are_the_size_of_the_model(server, trained):
    connect(server, trained)
    assert server.init.packed
    assert server.init.packed_buffer_size_bytes == 4 * trained.num_parameters


def test_completions_come_with_logprobs_and_version(server, trained):
    engine, settings = connect(server, trained)
    rollout = Rollout.gather(engine.stream(PROMPTS, settings, (0,)), PROMPTS, 3)
    assert rollout.version == 4
    for i, length in enumerate(rollout.lengths):
        ids = torch.from_numpy(rollout.sequence(i).astype(np.int64))[None]
        with torch.no_grad():
            logprob = trained(ids)[0].log_softmax(-1)
        first = int(rollout.prompt_lengths[i])
        expected = logprob[first - 1 : -1].gather(-1, ids[0, first:, None])[:, 0]
        np.testing.assert_allclose(rollout.logprobs[i, :length], expected, atol=1e-4)
    again = Rollout.gather(engine.stream(PROMPTS, settings, (0,)), PROMPTS, 3)
    np.testing.assert_array_equal(rollout.ids, again.ids)
    assert (rollout.ids[0] != rollout.ids[1]).any()
    engine.close()


def test_a_tensor_that_did_not_arrive_is_named(server, trained):
    engine, _ = connect(server, trained)
    assert engine.first_difference(trained) is None
    for name, parameter in trained.named_parameters():
        server.policy.get_parameter(name).data.add_(1.0)
        assert engine.first_difference(trained) == name
        server.policy.get_parameter(name).data.copy_(parameter)
    wide = checksum(trained.lm_head.weight, torch.bfloat16, padded=True)
    assert re.fullmatch("[0-9a-f]{64}", wide)
    assert wide != checksum(trained.lm_head.weight, torch.float32, padded=True)


@pytest.mark.parametrize(
    ("route", "status", "says"),
    [
        ("update_weights", 500, r"refuses update_weights: .*out of memory"),
        ("start_weight_update", 400, r"refuses start_weight_update: .*out of memory"),
        ("pause?mode=keep", 404, "start it with VLLM_SERVER_DEV_MODE=1"),
    ],
)
def test_what_the_server_refuses_ends_the_sync_and_it_stays_paused(server, trained, route, status, says):
    engine, _ = connect(server, trained)
    server.refuse[route] = (status, {"error": "out of memory"})
    with pytest.raises(UserError, match=says):
        engine.load(trained, 5)
    assert server.log[-1] != "resume"
    assert engine.version == 4


def test_another_version_than_was_sent_is_refused(server, trained):
    engine, _ = connect(server, trained)
    server.refuse["weight_info"] = (200, {"weight_version": "4"})
    with pytest.raises(UserError, match="holds version 4, not 5"):
        engine.load(trained, 5)
    assert server.log[-1] != "resume"


def test_a_server_that_is_gone_or_talks_nonsense_is_named(server, trained):
    engine, settings = connect(server, trained)
    server.refuse["inference/v1/generate"] = (200, b"<html>")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+ does not answer inference/v1/generate"):
        list(engine.stream(PROMPTS, settings, (0,)))
    server.close()
    with pytest.raises(UserError, match="does not answer"):
        engine.load(trained, 5)
    engine.close()  # says nothing


def test_weights_go_out_from_a_gpu_only(server, vocab):
    with pytest.raises(UserError, match="from a GPU"):
        connect(server, make_vllm_policy(vocab))
