"""The policy that a page was begun with, as `first-policy.json` in its folder keeps it: lessons and taste are of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastsmart.errors import UserError
from fastsmart.machine.files import read_file, write_atomic

if TYPE_CHECKING:
    from fastsmart.policy.transformer import Policy

FIRST_POLICY_FILE = "first-policy.json"


def first_policy(folder: str | Path) -> str | None:
    """Name or absolute path of the policy that the folder was begun with; None where none is known."""
    known = _known(Path(folder))
    return known[0] if known else None


def keep_first_policy(folder: Path, name: str, policy: Policy) -> None:
    """Write down that the folder was begun with this policy; raises UserError where it was begun with another."""
    from fastsmart.policy.hf_format import weights_hash

    weights, known = weights_hash(policy), _known(folder)
    if known and known[1] != weights:
        raise UserError(
            f"{folder} was begun with another policy than {name} ({known[0]}, or what it held then); "
            "leave --policy out, name that one, or choose another --out"
        )
    place = str(Path(name).resolve()) if Path(name).is_dir() else name
    if known != (place, weights):
        write_atomic(folder / FIRST_POLICY_FILE, json.dumps({"policy": place, "sha256": weights}) + "\n")


def _known(folder: Path) -> tuple[str, str] | None:
    path = folder / FIRST_POLICY_FILE
    try:
        tree = json.loads(read_file(path))
        return str(tree["policy"]), str(tree["sha256"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged; remove it, and name the policy of this folder with --policy") from error
