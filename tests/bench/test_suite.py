"""What `make bench` calls a regression, on results made up here."""

import json

import pytest
import suite

from fastsmart.errors import UserError
from fastsmart.machine.files import cpu_cores, processor
from fastsmart.machine.hardware import cpu_family

CASES = {"sampling": "64 x 64", "decode": "64 x 256"}
BASELINE = {"sampling 64 x 64": 10.0, "decode 64 x 256": 0.5}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A suite whose stages take made-up seconds; call it with their times, the reference kernel's and options."""
    baselines = tmp_path / "baselines.json"
    baselines.write_text(json.dumps({"this, 2 cores": BASELINE}))
    monkeypatch.setattr(suite, "STAGES", tuple(CASES))
    monkeypatch.setattr(suite, "machine", lambda: "this, 2 cores")

    def call(seconds, reference_s=0.1, *options):
        def measure(stage, folder):
            if stage not in seconds:
                return False
            report = {
                "ours": "fast",
                "contenders": {"fast": {"median_s": seconds[stage]}},
                "share_of_floor": 0.5,
                "over_reference_kernel": seconds[stage] / reference_s,
            }
            (folder / f"{stage}.json").write_text(json.dumps({"cases": {CASES[stage]: report}}))
            return True

        monkeypatch.setattr(suite, "measure", measure)
        return suite.main(["--out", str(tmp_path / "out"), "--baselines", str(baselines), *options])

    call.baselines = baselines
    return call


def test_what_takes_as_long_as_before_passes(bench, capsys):
    assert bench({"sampling": 1.0, "decode": 0.05}) == 0
    printed = capsys.readouterr().out
    assert "no stage has become slower" in printed
    assert "sampling 64 x 64" in printed


def test_a_stage_twice_as_slow_fails_and_is_named(bench, capsys):
    assert bench({"sampling": 1.0, "decode": 0.1}) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "decode 64 x 256 has become slower" in last
    assert "2.00 x its baseline" in last
    assert bench({"sampling": 1.0, "decode": 0.1}, 0.1, "--tolerance", "2.5") == 0


def test_a_machine_twice_as_slow_in_everything_passes(bench):
    assert bench({"sampling": 2.0, "decode": 0.1}, 0.2) == 0


def test_an_unknown_processor_is_told_how_to_add_itself(bench, monkeypatch, capsys):
    monkeypatch.setattr(suite, "machine", lambda: "another, 8 cores")
    assert bench({"sampling": 9.0, "decode": 9.0}) == 0
    assert "nothing for another, 8 cores" in capsys.readouterr().out
    assert bench({"sampling": 9.0, "decode": 9.0}, 0.1, "--accept") == 0
    assert json.loads(bench.baselines.read_text()) == {
        "this, 2 cores": BASELINE,
        "another, 8 cores": {"sampling 64 x 64": 90.0, "decode 64 x 256": 90.0},
    }
    assert bench({"sampling": 20.0, "decode": 9.0}) == 1


def test_an_entry_that_names_no_chip_is_kept_and_not_compared_with(bench, monkeypatch, capsys):
    """Two generations of one name, which once shared an entry."""
    monkeypatch.undo()
    old = f"{processor()}, {cpu_cores()} cores"
    assert suite.machine() != old
    assert cpu_family() in suite.machine()
    assert suite.of_unknown_chip({old: BASELINE}) == old
    assert suite.of_unknown_chip({suite.machine(): BASELINE}) == ""


def test_a_stage_that_does_not_run_fails_and_is_not_accepted(bench, capsys):
    before = bench.baselines.read_text()
    assert bench({"sampling": 1.0}, 0.1, "--accept") == 1
    assert "decode did not run" in capsys.readouterr().out
    assert bench.baselines.read_text() == before


def test_a_case_that_is_no_longer_measured_fails():
    rows = {"decode 64 x 256": suite.Row(0.05, 0.5, 0.5)}
    (found,) = suite.regressions(rows, BASELINE, 1.5)
    assert found == "sampling 64 x 64 has a baseline but was not measured"


def test_a_case_without_a_baseline_is_mentioned_and_passes(capsys):
    rows = {name: suite.Row(1.0, 0.5, ratio) for name, ratio in BASELINE.items()} | {"sync": suite.Row(1.0, 0.5, 9.0)}
    assert suite.regressions(rows, BASELINE, 1.5) == []
    assert "sync has no baseline yet" in capsys.readouterr().out


BROKEN = ["{", "[1]", '{"this": 3}', '{"this": {"decode": "fast"}}', '{"this": {"decode": null}}']


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_of_baselines_is_one_sentence_and_nothing_is_measured(bench, text):
    bench.baselines.write_text(text)
    with pytest.raises(UserError, match=r"baselines\.json is not a file of baselines") as error:
        bench({})
    assert "\n" not in str(error.value)
