"""With guidance a prompt's style counts more than in the policy itself, and log-probs are of what was drawn from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_policy import eager_to_end, make_policy

import fastsmart as fs
from fastsmart.cli import main
from fastsmart.config import read_config
from fastsmart.errors import UserError
from fastsmart.policy.hf_format import save_policy
from fastsmart.sampling import SamplingSettings
from fastsmart.sampling.native import NativeEngine
from fastsmart.tokens.styles import Styles
from fastsmart.tokens.token_batch import TokenBatch


@pytest.fixture(scope="module")
def styled(vocab):
    """A vocabulary that names two styles and a composer of the first."""
    styles = Styles((("calm", "INF1_None"), ("wild", "INF2_None")), (("Nobody", "INF3_None", "calm"),))
    return replace(vocab, styles=styles)


def asked(vocab):
    """Prompts with a style, with a style and a composer, and without either; of different lengths."""
    calm, wild, composer = (vocab.id(f"INF{i}_None") for i in (1, 2, 3))
    opening, rest = vocab.bos_id, [400, 180, 330]
    return TokenBatch.pack([[opening, calm, *rest], [opening, calm, composer], [opening, *rest], [opening, wild, 400]])


def plain(vocab):
    """The same without style."""
    return TokenBatch.pack([row[~np.isin(row, vocab.style_ids)] for row in asked(vocab)])


def drawn(policy, prompts, dtype=torch.float32, **settings):
    engine = NativeEngine(policy, dtype=dtype)
    found = engine.stream(prompts, SamplingSettings(**({"group": 16, "max_tokens": 40} | settings)), (3,))
    return sorted(found, key=lambda completion: completion.index)


def logprobs(policy, prompt, completion, guidance, temperature):
    """Of a completion by two passes of the policy: with the style and without it."""
    logits = []
    for start in (prompt, prompt[~np.isin(prompt, policy.vocab.style_ids)]):
        ids = torch.tensor([[*start.tolist(), *completion.ids.tolist()]])
        with torch.no_grad():
            logits.append(policy(ids[:, :-1])[0, len(start) - 1 :])
    mixed = (logits[1] + guidance * (logits[0] - logits[1])) / temperature
    return mixed.log_softmax(-1).gather(-1, torch.from_numpy(completion.ids).long()[:, None])[:, 0].numpy()


@pytest.mark.parametrize(("guidance", "temperature"), [(2.0, 1.0), (0.5, 0.8)])
def test_log_probs_are_of_the_distribution_drawn_from(styled, guidance, temperature):
    """Of completions that end one after the other, so that rows are dropped while others go on."""
    policy = eager_to_end(styled, 0.08)
    prompts, completions = (
        asked(styled),
        drawn(policy, asked(styled), guidance=guidance, temperature=temperature),
    )
    assert len({len(c.ids) for c in completions}) > 5
    for c in completions:
        expected = logprobs(policy, prompts.row(c.index // 16), c, guidance, temperature)
        np.testing.assert_allclose(c.logprobs, expected, atol=1e-4)


def test_no_guidance_is_the_policy_without_style_and_one_is_the_policy(styled):
    policy = make_policy(styled)
    for guidance, prompts in ((0.0, plain(styled)), (1.0, asked(styled))):
        guided, alone = drawn(policy, asked(styled), guidance=guidance), drawn(policy, prompts)
        for one, other in zip(guided, alone, strict=True):
            np.testing.assert_array_equal(one.ids, other.ids)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_a_prompt_without_a_style_is_played_as_without_guidance(styled):
    policy = make_policy(styled)
    for one, other in zip(drawn(policy, asked(styled), guidance=3.0), drawn(policy, asked(styled)), strict=True):
        if one.index // 16 == 2:
            np.testing.assert_array_equal(one.ids, other.ids)
    assert any(
        one.ids.tolist() != other.ids.tolist()
        for one, other in zip(drawn(policy, asked(styled), guidance=3.0), drawn(policy, asked(styled)), strict=True)
    )


def test_how_many_are_drawn_side_by_side_changes_nothing(styled):
    policy = eager_to_end(styled)
    some, others = (drawn(policy, asked(styled), guidance=2.0, max_rows=rows) for rows in (1, 256))
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)


def test_static_memory_serves_no_guidance_and_is_not_used_for_it(styled):
    policy = make_policy(styled)
    engine = NativeEngine(policy, static_cache=True)
    settings = SamplingSettings(group=2, max_tokens=10, guidance=2.0)
    assert len(list(engine.stream(asked(styled), settings, (0,)))) == 8
    assert not engine.graph_batches


def test_it_is_refused_where_it_means_nothing(vocab, styled, tmp_path, capsys):
    with pytest.raises(UserError, match=r"sampling\.guidance is 2\.0, and the policy knows no styles; leave it at 1"):
        fs.sample(make_policy(vocab), asked(styled), guidance=2.0)
    with pytest.raises(UserError, match="only the engine 'native' has it"):
        fs.sample(make_policy(styled), asked(styled), guidance=2.0, engine="vllm")
    with pytest.raises(UserError, match=r"sampling\.guidance is -1\.0; it must be 0 or above"):
        SamplingSettings(guidance=-1.0)
    config = tmp_path / "run.toml"
    config.write_text("[sampling]\nguidance = 2.0\n")
    with pytest.raises(UserError, match=r"sampling\.guidance is 2\.0; it must be 1 in training"):
        read_config(config)
    save_policy(make_policy(styled), tmp_path / "policy")
    common = ["sample", "--policy", str(tmp_path / "policy"), "-n", "2", "--max-tokens", "20", "--out", str(tmp_path)]
    assert main([*common, "--guidance", "2"]) == 2
    assert "--guidance is of the styles of --style; name one, or leave it out" in capsys.readouterr().err
    assert main([*common, "--style", "calm", "--guidance", "2"]) == 0
    assert (tmp_path / "002.mid").exists()
