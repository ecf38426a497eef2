"""A folder goes on with the policy it was begun with, and no page is opened that could not play."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsmart.errors import UserError
from fastsmart.live.composer import Composer
from fastsmart.live.first_policy import FIRST_POLICY_FILE, first_policy
from fastsmart.live.settings import LiveSettings
from fastsmart.live.studio import Studio


def opened(out: Path, policy: str, **settings: object) -> None:
    Studio.open(out, LiveSettings(policy, train=False, **settings)).close()


def test_a_folder_goes_on_with_the_policy_it_was_begun_with(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "taste"
    assert first_policy(out) is None
    opened(out, tiny)
    assert first_policy(out) == tiny
    with pytest.raises(UserError, match=r"taste was begun with another policy than pop909-tiny \(.*leave --policy out"):
        opened(out, "pop909-tiny")
    opened(out, tiny)


def test_a_damaged_note_of_the_policy_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / FIRST_POLICY_FILE).write_text("{")
    with pytest.raises(UserError, match=r"first-policy\.json is damaged; remove it"):
        first_policy(tmp_path)


def test_more_tokens_than_the_policy_has_room_for_are_refused(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--max-tokens is 4096; with its beginnings the policy has room for \d+$"):
        opened(tmp_path / "taste", tiny, max_tokens=4096)
    assert first_policy(tmp_path / "taste") is None


def test_a_composer_that_fails_says_so_once_and_rests(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio, tried = Studio.open(tmp_path / "taste", LiveSettings(tiny, train=False)), list[int]()

    def failing(self: Composer) -> bool:
        tried.append(1)
        raise UserError("the disk is full")

    monkeypatch.setattr(Composer, "_work", failing)
    told = []
    studio.session.changed = lambda: (told.append(1), studio.composer.look())
    studio.start()
    studio.composer.join(1.5)
    studio.close()
    assert 1 <= len(tried) <= 3
    assert len(told) == 1
    assert studio.composer.error == "the disk is full"
