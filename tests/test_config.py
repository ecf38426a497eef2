"""Configs: TOML in, the same config out, and every mistake named with the way out."""

import pytest

from fastsmart.config import Config, read_config, to_toml, with_overrides
from fastsmart.errors import UserError
from fastsmart.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_written_config_reads_back_the_same(name, tmp_path):
    config = PRESETS[name]()
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert read_config(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[train]\nstpes = 3", r"unknown key train\.stpes; did you mean train\.steps\?"),
        ("[trian]\nsteps = 3", r"unknown key trian; did you mean train\?"),
        ("[train]\nzebra = 3", r"unknown key train\.zebra; train has algorithm, steps, "),
        ("train = 3", "train is a section"),
        ("[train]\nsteps = 'many'", r"train\.steps is 'many'; it must be a whole number"),
        ("[train]\nsteps = 2.5", r"train\.steps is 2\.5; it must be a whole number"),
        ("[train]\nsteps = true", r"train\.steps is True; it must be a whole number"),
        ("[train]\nsteps = 0", r"train\.steps is 0; it must be at least 1"),
        ("[train]\nbetas = [0.9]", r"train\.betas .* list of 2"),
        ("[train]\nschedule = 'stairs'", r"train\.schedule is 'stairs'; choose one of linear, cosine, constant"),
        ("[grpo]\nloss = 'ppo'", r"grpo\.loss .*bnpo"),
        ("[grpo]\nclip_low = 3.0", r"grpo\.clip_low must be"),
        ("[audio]\ntail = 'long'", r"audio\.tail"),
        ("[reward.terms]\nconsonanse = 1.0", r"reward\.terms\.consonanse.*did you mean consonance\?"),
        ("[reward.terms]\nconsonance = 'a lot'", r"reward\.terms\.consonance is 'a lot'; it must be a number"),
        ("[reward.terms]\nconsonance = -1.0", r"reward\.terms\.consonance is -1\.0"),
        ("[prompts]\nsource = 'radio'", r"prompts\.source"),
        ("[prompts]\ntime_signatures = '4/4'", r"prompts\.time_signatures is '4/4'; it must be a list"),
        ("[sampling]\ntop_k = 50", r"sampling\.top_k and sampling\.top_p must be off"),
        ("[sampling]\ngroup = 1", r"sampling\.group must be at least 2"),
        ("[train\nsteps = 3", "not valid TOML"),
    ],
)
def test_mistakes_are_named(text, says, tmp_path):
    path = tmp_path / "mistake.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value).split(": ", 1)[0]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.toml"):
        read_config(tmp_path / "nowhere.toml")


def test_assignments_are_read_as_toml_and_else_as_text():
    config = Config()
    texts = (
        "train.steps=7",
        "train.learning_rate=1",
        "policy.source=some/where",
        'prompts.time_signatures=["3/4"]',
        "reward.terms.consonance=2",
        "audio.reverb=true",  # refused with the bank, until the next one is in
        "audio.backend=fluidsynth",
        "train.listen=100",  # more than the evaluation prompts, until the next one is in
        "train.eval_prompts=200",
    )
    config = with_overrides(config, texts)
    assert (config.train.steps, config.train.learning_rate, config.policy.source) == (7, 1.0, "some/where")
    assert (config.prompts.time_signatures, config.reward.terms, config.audio.reverb) == (
        ("3/4",),
        {"consonance": 2.0},
        True,
    )
    with pytest.raises(UserError, match=r"section\.key=value"):
        with_overrides(config, ["train.steps"])


def test_one_term_set_leaves_the_others_of_the_preset():
    config = with_overrides(PRESETS["demo"](), ["reward.terms.consonance=9"])
    assert config.reward.terms == {**PRESETS["demo"]().reward.terms, "consonance": 9.0}
    assert with_overrides(config, ["reward.terms={variety=1}"]).reward.terms == {"variety": 1.0}
