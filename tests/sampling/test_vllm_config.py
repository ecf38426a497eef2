"""Sizes and refusals that need no vLLM."""

import pytest

from fastsmart.cli import main
from fastsmart.errors import UserError
from fastsmart.policy.transformer import Policy, PolicySize
from fastsmart.sampling import SamplingSettings
from fastsmart.sampling.settings import VllmSettings
from fastsmart.sampling.vllm_config import (
    check_api,
    check_version,
    memory_needed,
    request_fields,
    transfer_buffer_bytes,
)

SMART = PolicySize(413, 512, 2048, 4, 8, 8)


def test_the_cache_holds_exactly_the_completions_that_are_asked_for(vocab):
    found = memory_needed(SMART, SamplingSettings(max_tokens=256, max_rows=64), 2, on_gpu=True)
    token_bytes = 2 * 4 * 512 * 2  # k and v, layers, hidden size, bfloat16
    assert found.kv_cache_bytes == (64 * 320 + 16) * token_bytes  # 256 and 64 of the prompt; a block of vLLM's own
    assert found.weight_bytes == 2 * Policy(SMART, vocab).num_parameters
    assert str(found).startswith("vLLM will hold 32.8 MiB of weights and a KV cache of 160.1 MiB (64 completions")


def test_the_cache_is_never_smaller_than_one_longest_sequence():
    found = memory_needed(SMART, SamplingSettings(max_tokens=16, max_rows=1), 4, on_gpu=False)
    assert found.kv_cache_bytes == (2048 + 128) * 2 * 4 * 512 * 4
    with pytest.raises(UserError, match=r"sampling\.vllm\.kv_cache_bytes is 1000; .* needs 35651584"):
        memory_needed(SMART, SamplingSettings(vllm=VllmSettings(kv_cache_bytes=1000)), 4, on_gpu=False)
    given = SamplingSettings(vllm=VllmSettings(kv_cache_bytes=2**30))
    assert memory_needed(SMART, given, 4, on_gpu=False).kv_cache_bytes == 2**30


def test_grouped_heads_take_less_cache():
    grouped = PolicySize(413, 512, 2048, 4, 8, 2)
    settings = SamplingSettings(max_tokens=256, max_rows=64)
    caches = [memory_needed(size, settings, 2, on_gpu=True).kv_cache_bytes for size in (SMART, grouped)]
    assert caches[0] == 4 * caches[1]


def test_only_max_tokens_ends_a_completion_that_ignores_eos():
    assert request_fields(SamplingSettings(), (0,), eos=2)["stop_token_ids"] == [2]
    assert request_fields(SamplingSettings(ignore_eos=True), (0,), eos=2)["stop_token_ids"] == []


def test_a_transfer_buffer_holds_the_model_or_its_largest_tensor():
    assert transfer_buffer_bytes([10, 20, 30]) == 60
    assert transfer_buffer_bytes([2**29] * 5) == 2**30
    assert transfer_buffer_bytes([2**31, 5]) == 2**31


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.dev3+gabc", "0.33.0", "0.33.2"])
def test_versions_inside_the_window(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "0.34.0rc1", "1.0", None])
def test_versions_outside_it_are_refused_with_the_way_out(version):
    with pytest.raises(UserError, match=r"pip install 'vllm>=0\.32,<0\.34', or use --engine native"):
        check_version(version)


def test_what_the_installed_one_lacks_is_named():
    check_api([], "0.33.0")
    with pytest.raises(UserError, match=r"vLLM 0\.33\.0 lacks LLMEngine\.step, SamplingParams\.seed: pip install"):
        check_api(["LLMEngine.step", "SamplingParams.seed"], "0.33.0")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_cache_bytes": -1}, r"vllm\.kv_cache_bytes is -1"),
        ({"transfer_port": 0}, r"vllm\.transfer_port is 0"),
        ({"server": "localhost:8000"}, "write it as http://HOST:PORT"),
        ({"server": "http://localhost:8000", "sleep": True}, r"with vllm\.server it shares none"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        VllmSettings(**change)


def test_dry_run_says_what_vllm_will_hold(capsys):
    options = ["train", "--preset", "demo", "--dry-run", "--set", "policy.device=cpu"]
    assert main([*options, "--engine", "vllm"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("# vLLM will hold 13.8 MiB of weights and a KV cache of 193.0 MiB (64 completions")
    assert main(options) == 0
    assert "# vLLM" not in capsys.readouterr().out
    assert main([*options, "--engine", "vllm", "--set", "sampling.vllm.kv_cach_bytes=5"]) == 2
    assert "did you mean sampling.vllm.kv_cache_bytes?" in capsys.readouterr().err
