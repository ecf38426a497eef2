"""Counts and numbers are checked where they enter: one sentence that names the option or key, before any work."""

from __future__ import annotations

import json
import time

import pytest
from small_run import config_for
from token_sources import write_piece

from fastsmart.cli import main
from fastsmart.config import Config, read_config, to_toml, with_overrides
from fastsmart.errors import UserError
from fastsmart.machine.files import os_errors_as_user_errors
from fastsmart.policy.device import usable_device
from fastsmart.policy.hf_format import load_policy, policy_size
from fastsmart.study.scoring import scored_before
from fastsmart.study.sweep import read_sweep
from fastsmart.tokens.prompts import procedural
from fastsmart.tokens.settings import PromptSettings

INF, NAN = float("inf"), float("nan")
HUGE = "9" * 21


def refused(capsys, arguments, says):
    begun = time.monotonic()
    assert main([str(a) for a in arguments]) == 2, arguments
    error = capsys.readouterr().err
    assert error.startswith("fastsmart: ")
    assert error.count("\n") == 1
    assert says in error, error
    assert len(error) < 500
    assert time.monotonic() - begun < 60


ARGUMENTS = [
    ("sample -n 0", "--number is 0; it must be at least 1"),
    ("sample -n -1", "--number is -1; it must be at least 1"),
    ("sample -n 99999999999", "--number is 99999999999; it must be at most 1,000,000"),
    ("sample -n many", "--number is many; it must be a whole number"),
    (f"sample --seed {'9' * 5000}", "--seed is 9999"),
    ("sample --tempo nan 90", "--tempo is nan; it must be a finite number above 0"),
    ("sample --tempo 90 60", "--tempo goes from 90 to 60; write the lower one first"),
    ("sample --tempo 500 600", "--tempo LOW 500 and HIGH 600 leave no tempo; the vocabulary has 40"),
    ("sample --time-signature 1/4", "--time-signature: no '1/4' in the vocabulary"),
    ("sample --temperature inf", "--temperature is inf"),
    ("sample --temperature 0", "--temperature is 0; it must be a finite number above 0"),
    ("sample --top-p 1.5", "--top-p is 1.5; it must be a finite number above 0 to 1"),
    ("render x --workers -1", "--workers is -1"),
    ("bank verify x --clips 0", "--clips is 0"),
    ("bank verify x --clips -1", "--clips is -1"),
    ("pretrain --midi x --out y --seed -1", "--seed is -1"),
    (f"pretrain --midi x --out y --seed {HUGE}", f"--seed is {HUGE}; it must be at most"),
    ("pretrain --midi x --out y --threads -1", "--threads is -1"),
    ("pretrain --midi x --out y --learning-rate inf", "--learning-rate is inf"),
    ("pretrain --midi x --out y --device xyz", "--device is 'xyz', which does not work here"),
    ("pretrain --midi x --out y --layers 1000000000", "--layers is 1000000000; it must be at most 1,024"),
    ("evaluate --policy pop909-tiny --out y --best-of -1", "--best-of is -1"),
    ("evaluate --policy pop909-tiny --out y --training-set nope", "--training-set nope holds no MIDI files"),
    ("evaluate --policy pop909-tiny --out y -n 1", "--prompts is 1; it must be at least 2"),
    ("report y --players -1", "--players is -1"),
    ("listen power --effect 0.3 --prompts 0", "--prompts is 0"),
    ("listen power --effect 0.3 --prompts -5", "--prompts is -5"),
    ("listen power --effect nan", "--effect is nan"),
    ("listen power --effect 1.5 --design ab", "--effect is 1.5; with --design ab it is a chance"),
    ("listen power --effect 0.3 --clip-sd nan", "--clip-sd is nan"),
    ("listen power --effect 0.3 --sd -1", "--sd is -1"),
    ("sweep x --out y --index -1", "--index is -1"),
    ("score PIECE --reward consonance --max-seconds -1", "--max-seconds is -1"),
    ("score PIECE --reward consonance --max-seconds nan", "--max-seconds is nan"),
    ("score PIECE --reward consonance --max-seconds 1e-9", "--max-seconds is 1e-09; it must be 0, all of the file"),
    ("score PIECE --reward consonance --device xyz", "--device is 'xyz', which does not work here"),
    ("render EMPTY", "files is empty"),
    ("sample --policy EMPTY", "policy is empty"),
    ("sample --out EMPTY", "out is empty"),
    ("evaluate --policy EMPTY --out y", "policy is empty"),
]


@pytest.mark.parametrize(("line", "says"), ARGUMENTS, ids=[line[:60] for line, _ in ARGUMENTS])
def test_an_argument_that_cannot_be_meant_is_refused_before_any_work(line, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [{"EMPTY": "", "PIECE": "piece.mid"}.get(word, word) for word in line.split()]
    if "PIECE" in line:
        write_piece(tmp_path / "piece.mid", 0)
    before = {p.name for p in tmp_path.iterdir()}
    refused(capsys, words, says)
    assert {p.name for p in tmp_path.iterdir()} == before


SETTINGS = [
    ("prompts.tempo_min=-1", "prompts.tempo_min is -1.0; it must be at least 0"),
    ("prompts.tempo_max=1e9", "prompts.tempo_max is 1000000000.0; it must be at most 1,000"),
    ("prompts.pitch_min=-3", "prompts.pitch_min is -3"),
    ("sampling.temperature=inf", "sampling.temperature is inf; it must be a finite number"),
    ("sampling.temperature=nan", "sampling.temperature is nan; it must be a finite number"),
    ("train.learning_rate=inf", "train.learning_rate is inf"),
    ("train.weight_decay=inf", "train.weight_decay is inf"),
    ("train.max_grad_norm=-inf", "train.max_grad_norm is -inf"),
    ("train.mismatch_limit=inf", "train.mismatch_limit is inf"),
    ("train.betas=[0.9, inf]", "train.betas[1] is inf"),
    ("grpo.mask_high=inf", "grpo.mask_high is inf"),
    ("grpo.max_tokens=-1", "grpo.max_tokens must be from 0 to 1,000,000; got -1"),
    (f"train.seed={HUGE}", "train.seed is a number of more than 18 digits"),
    (f"prompts.seed={HUGE}", "prompts.seed is a number of more than 18 digits"),
    (f"sampling.group={HUGE}", "sampling.group is a number of more than 18 digits"),
    ("sampling.group=10000000", "sampling.group is 10000000; it must be at most 1,000,000"),
    ("sampling.group=1000000", "makes 8,000,000 completions a step; at most 1,000,000"),
    ("train.threads=100000", "train.threads is 100000; it must be at most 1,024"),
    ("train.steps=" + "9" * 5000, "--set train.steps is 999"),
    ("train.learning_rate=" + "9" * 400, "train.learning_rate is a number of more than 18 digits"),
    ("train.learning_rate=" + "[" * 3000, "--set train.learning_rate is [[["),
    ("policy.source=" + "x" * 20_000, "--set policy.source has a value of 20,000 characters"),
    ("policy.source=" + "x" * 5000, "write at most 4,096 characters"),
    ("policy.source='a\\u0000b'", "policy.source"),
    ('policy.source="a\\u0000b"', "none of them NUL"),
    ("policy.source=''", "policy.source is empty"),
    ("policy.device=''", "policy.device is ''; write auto, cpu, cuda or cuda:0"),
    ("train.steps=" + "x" * 9000, "train.steps is 'xxx"),
    ("x" * 5000 + ".y=1", "unknown key xxx"),
    ("audio.backend=" + "x" * 4000, "... (4,000 characters)"),
    ("sampling.engine=" + "x" * 4000, "... (4,000 characters)"),
    ("sampling.vllm.kv_cache_bytes=9000000000000000000", "vllm.kv_cache_bytes is 9000000000000000000"),
]


@pytest.mark.parametrize(("setting", "says"), SETTINGS, ids=[f"{i} {s[:30]}" for i, (s, _) in enumerate(SETTINGS)])
def test_a_value_that_cannot_be_meant_is_refused_by_a_dry_run(setting, says, capsys):
    if setting == "policy.source='a\\u0000b'":  # a literal string of TOML: a backslash, no NUL
        assert main(["train", "--dry-run", "--set", setting]) == 0
        return
    refused(capsys, ["train", "--dry-run", "--set", setting], says)


def test_every_number_of_a_config_refuses_infinity_and_what_no_machine_holds(capsys):
    import tomllib

    kinds = {int: [HUGE, "-" + HUGE], float: ["inf", "-inf", "nan", "9" * 400]}
    tried = 0
    for section, keys in tomllib.loads(to_toml(Config())).items():
        for key, value in keys.items():
            for text in kinds.get(type(value), []):
                tried += 1
                with pytest.raises(UserError, match=rf"{section}\.{key} "):
                    with_overrides(Config(), [f"{section}.{key}={text}"])
    assert tried > 100


@pytest.mark.parametrize(
    "text", ["[train]\nsteps = " + "9" * 5000, "[train]\nbetas = " + "[" * 3000, "a." * 3000 + "b = 1"]
)
def test_a_file_with_a_number_or_a_list_beyond_reason_is_named(tmp_path, text):
    (tmp_path / "big.toml").write_text(text)
    with pytest.raises(UserError, match=r"big\.toml"):
        read_config(tmp_path / "big.toml")


def test_a_file_that_begins_with_an_editors_mark_is_read(tmp_path):
    (tmp_path / "mark.toml").write_text("[train]\nsteps = 7\n", encoding="utf-8-sig")
    assert read_config(tmp_path / "mark.toml").train.steps == 7


def test_the_same_limits_hold_in_python(vocab, checkpoint):
    with pytest.raises(UserError, match=r"prompts\.tempo_min is nan"):
        PromptSettings(tempo_min=NAN)
    for n in (0, -1, 10**11):
        with pytest.raises(UserError, match="prompts were asked for"):
            procedural(vocab, n)
    with pytest.raises(UserError, match=r"train\.learning_rate is inf"):
        config_for(checkpoint, {"train": {"learning_rate": INF}})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("[]", "it is no JSON object"),
        ("null", "it is no JSON object"),
        ("[" * 5000, "not a Phi-3 configuration"),
        ({"num_hidden_layers": 10**9}, "num_layers of a policy is 1000000000; it must be from 1 to 1,024"),
        ({"num_hidden_layers": -1}, "num_layers of a policy is -1"),
        ({"num_hidden_layers": INF}, "not a Phi-3 configuration"),
        ({"vocab_size": 10**12}, "vocab_size of a policy"),
        ({"hidden_size": 2**40}, "hidden_size of a policy"),
        ({"max_position_embeddings": 10**15}, "max_positions of a policy"),
        ({"rope_theta": NAN}, "rope_theta of a policy is nan"),
        ({"rope_scaling": 5}, "not a Phi-3 configuration"),
    ],
)
def test_a_checkpoint_of_impossible_size_is_refused_before_memory_is_taken(checkpoint, config, says):
    path = checkpoint / "config.json"
    text = config if isinstance(config, str) else json.dumps(json.loads(path.read_text()) | config)
    path.write_text(text)
    begun = time.monotonic()
    for read in (policy_size, load_policy):
        with pytest.raises(UserError, match=says):
            read(checkpoint)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../../etc/passwd"}}', "[" * 5000]
)
def test_an_index_of_weights_names_files_beside_it(checkpoint, text):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json "):
        load_policy(checkpoint)


@pytest.mark.parametrize("name", ["xyz", "", "meta", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match="--device is '"):
        usable_device(name, "--device")


@pytest.mark.parametrize(
    "text",
    ["config = 5", "set = 5", "set = [5]", "runs = 5", "runs = [1]", "[[runs]]\nname='a'\nset = 5",
     "[[runs]]\nname='a'\nset = [1]", "[[runs]]\nname=1\nset = []", "grid = 5", "preset = 5",
     "prompts = " + "9" * 5000],
)  # fmt: skip
def test_a_sweep_of_another_form_is_named(tmp_path, text):
    (tmp_path / "sweep.toml").write_text(text)
    with pytest.raises(UserError, match=r"sweep\.toml"):
        read_sweep(tmp_path / "sweep.toml")


def test_scores_to_go_on_with_that_are_no_text_are_named(tmp_path):
    (tmp_path / "scores.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"scores\.jsonl is no text"):
        scored_before(tmp_path / "scores.jsonl", ["consonance"])


def test_weights_of_audiobox_that_are_a_text_are_named(tmp_path):
    from fastsmart.reward.audiobox.weights import _read_torch

    for text in ("hello", "e", "\x80\x02."):
        (tmp_path / "some.txt").write_text(text)
        with pytest.raises(UserError, match=r"some\.txt is not a"):
            _read_torch(tmp_path / "some.txt")


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (FileExistsError(17, "File exists"), "something of that name is in the way; move it"),
        (PermissionError(13, "Permission denied"), "choose a folder you can write to"),
        (OSError(28, "No space left on device"), "free some space"),
    ],
)
def test_what_cannot_be_written_comes_with_the_way_out_of_its_cause(tmp_path, error, way_out):
    with pytest.raises(UserError, match=way_out), os_errors_as_user_errors(tmp_path / "x"):
        raise error


def test_a_device_is_not_replaced_by_a_file(tmp_path, capsys):
    """A rename would do so for whoever may write beside it, as root may in /dev."""
    from fastsmart.machine.files import write_atomic

    (tmp_path / "null").symlink_to("/dev/null")
    write_piece(tmp_path / "piece.mid", 0)
    words = ["score", str(tmp_path / "piece.mid"), "--reward", "variety", "--out", str(tmp_path / "null"), "--resume"]
    refused(capsys, words, "null: it is a device or a pipe")
    with pytest.raises(UserError, match="it is a device or a pipe"):
        write_atomic("/dev/null", "text")
    assert (tmp_path / "null").is_char_device()
