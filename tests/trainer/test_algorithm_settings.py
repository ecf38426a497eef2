"""What train.algorithm does not read is refused in one sentence, and the presets of each algorithm are whole."""

import pytest

from fastsmart import UserError
from fastsmart.config import Config, merged, read_config, to_toml, with_overrides
from fastsmart.presets import load_preset


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["dpo.beta=0.2"],
            r"^dpo\.beta is set, and train\.algorithm 'grpo' does not read it; leave it out, or ",
        ),
        (["tilt.clips=2"], r"^tilt\.clips is set, and train\.algorithm 'grpo' does not read it"),
        (["train.algorithm=dpo", "tilt.clips=2"], r"^tilt\.clips is set, and train\.algorithm 'dpo' does not read it"),
        (["train.algorithm=dpo", "grpo.beta=0.1"], r"^grpo\.beta is set, and train\.algorithm 'dpo' does not read it"),
        (["train.algorithm=tilt", "diversity.floor=0.9"], r"^\[diversity\] acts on the advantages of .*'grpo'"),
        (["train.algorithm=dpo", "train.pipeline=one-step-off"], r"^train\.pipeline = 'one-step-off' is for .*'grpo'"),
        (["train.algorithm=dpo", "reward.normalize=group"], r"^reward\.normalize = 'group' is for .*'grpo'"),
        (["train.algorithm=tilt", "train.iterations=2"], r"^train\.iterations is 2; .*tilt\.round_steps says"),
        (["train.algorithm=dpo", "dpo.prompts=1000000"], r"^dpo\.prompts times sampling\.group makes 8,000,000"),
        (["train.algorithm=ppo"], r"^train\.algorithm is 'ppo'; choose one of grpo, tilt, dpo"),
        (["train.algorithm=dpo", "dpo.keep=0.6"], r"^dpo\.keep is 0\.6; it must be above 0 and at most 0\.5"),
        (["train.algorithm=dpo", "dpo.beta=0"], r"^dpo\.beta is 0\.0; it must be above 0"),
        (["train.algorithm=dpo", "dpo.penalty=-1"], r"^dpo\.penalty is -1\.0; it must be 0 \(plain DPO\) or above"),
        (["train.algorithm=dpo", "dpo.refuse=['noise']"], r"^dpo\.refuse\[0\] is 'noise'; choose one of empty, dupl"),
        (["train.algorithm=tilt", "tilt.gain=-1"], r"^tilt\.gain is -1\.0; it must be 0 or above"),
        (["credit.strength=2"], r"^credit\.strength is set, and train\.algorithm 'grpo' does not read it"),
        (["train.algorithm=credit", "credit.strength=0"], r"^credit\.strength is 0\.0; it must be above 0"),
        (["train.algorithm=credit", "credit.goal=-1"], r"^credit\.goal is -1\.0; it must be 0 or above"),
        (["train.algorithm=credit", "credit.pull=2"], r"^credit\.pull is 2\.0; it must be from 0 to 1"),
        (["train.algorithm=credit", "credit.neutral_share=1.5"], r"^credit\.neutral_share is 1\.5; it must be from"),
        (["train.algorithm=tilt", "tilt.best_of=1"], r"^tilt\.best_of is 1; it must be at least 2"),
    ],
)
def test_what_an_algorithm_does_not_read_is_refused(settings, said):
    with pytest.raises(UserError, match=said) as caught:
        with_overrides(Config(), settings)
    assert "\n" not in str(caught.value)


def test_the_kernel_of_the_log_probs_is_read_by_all():
    assert with_overrides(Config(), ["train.algorithm=dpo", "grpo.kernel=torch"]).grpo.kernel == "torch"


def test_a_config_of_a_run_begun_before_there_was_a_choice_is_grpo(tmp_path):
    text = to_toml(Config())
    sections = text.split("\n[")
    old = "\n[".join(part for part in sections if not part.startswith(("tilt]", "dpo]")))
    (tmp_path / "old.toml").write_text(old.replace('algorithm = "grpo"\n', ""))
    assert "algorithm" not in (tmp_path / "old.toml").read_text()
    assert read_config(tmp_path / "old.toml") == merged(Config(), {"train": {"algorithm": "grpo"}})


def test_the_presets_have_whole_rounds():
    for name, algorithm, rounds in (("dpo", "dpo", 3), ("notagen-dpo", "dpo", 3), ("diverse", "credit", 3 * 8)):
        config = load_preset(name)
        assert config.train.algorithm == algorithm
        assert config.train.steps - config.merge.tilt_steps == rounds * getattr(config, algorithm).round_steps
    paper = load_preset("notagen-dpo")
    assert (paper.sampling.group, paper.dpo.keep, paper.dpo.prompts) == (100, 0.1, 112)
