"""What the page shows of a session, in a musician's words."""

from __future__ import annotations

import math
from typing import Any

from fastsmart.live.answers import Answers
from fastsmart.live.composer import Composer
from fastsmart.live.session import Session
from fastsmart.live.teacher import FIRST_CHOICES, Teacher
from fastsmart.reward.taste import Taste
from fastsmart.reward.taste_features import LABELS
from fastsmart.study.sound import note_rows
from fastsmart.taste import Clip
from fastsmart.taste.choices import of_listener, standing
from fastsmart.words import counted

RECENT = 10  # choices whose predictions are counted
SHOWN = 8  # features
LEAST_CERTAINTY = 0.7
WORDS = ((0.97, "quite sure"), (0.9, "fairly sure"), (LEAST_CERTAINTY, "a guess"))


def view(session: Session, composer: Composer, teacher: Teacher, answers: Answers) -> dict[str, Any]:
    """All that a page needs to draw itself, as JSON."""
    place, mine = session.place, standing(of_listener(session.choices, session.place.listener))
    version, _ = teacher.newest()
    return {
        "listener": place.listener,
        "joint": session.settings.joint,
        "choices": len(mine),
        "pair": None if place.pair is None else [_clip(session, id) for id in place.pair],
        "phrase": _phrase(answers),
        "answering": bool(place.phrase),
        "boldness": place.boldness,
        "paused": place.paused,
        "training": _training(teacher, session),
        "learnt": learnt(session.taste),
        "policies": [{"version": v, "name": policy_name(v), "now": v == version} for v in teacher.versions()],
        "damaged": list(session.damaged[:3]),
        "trouble": composer.error or answers.error,
    }


def learnt(taste: Taste | None) -> dict[str, Any]:
    """What a taste says: of named features those it has a view of, the most certain first; how well it has guessed, and
    how far a lesson follows it (`Taste.borne_out`)."""
    if taste is None or taste.choices == 0:
        return {"features": [], "guessed": 0, "right": 0, "followed": 0.0}
    named = [e for e in taste.explained() if e.name in LABELS and math.isfinite(e.effect)]
    effects = [e for e in named if e.certainty >= LEAST_CERTAINTY]
    recent = min(RECENT, len(taste.predictions))
    return {
        "features": [
            {
                "low": e.low,
                "high": e.high,
                "liked": e.liked,
                "effect": round(e.effect, 3),
                "certainty": round(e.certainty, 3),
                "sure": next(word for least, word in WORDS if e.certainty >= least),
            }
            for e in effects[:SHOWN]
        ],
        "guessed": recent,
        "right": round(taste.recent_agreement(recent) * recent) if recent else 0,
        "followed": round(taste.borne_out, 3),
    }


def policy_name(version: int) -> str:
    """What a policy is called on the page."""
    return "as it came" if version == 0 else f"after {counted(version, 'lesson')}"


def _clip(session: Session, id: str) -> dict[str, Any]:
    """A clip as the page draws it; while it is still being played, without notes, which come on their own."""
    if not session.has(id):
        return {"id": id, "whole": False, "notes": [], "seconds": 0.0, "about": "", "policy": ""}
    clip = session.clip(id)
    return {
        "id": id,
        "whole": True,
        "notes": note_rows(clip.notes, 0),
        "seconds": round(float(clip.notes.end_s[0]), 3),
        "about": _about(clip),
        "policy": policy_name(clip.version),
    }


def _about(clip: Clip) -> str:
    notes = clip.notes
    bpm = float(notes.tempo_bpm[0]) if len(notes.tempo_bpm) else 120.0
    metre = "/".join(str(int(x)) for x in notes.meter[0]) if len(notes.meter) else "4/4"
    return f"{metre}, {bpm:.0f} bpm, {counted(int(notes.counts[0]), 'note')}"


def _phrase(answers: Answers) -> dict[str, Any] | None:
    phrase = answers.phrase
    if phrase is None:
        return None
    return {"name": phrase.name, "notes": note_rows(phrase.notes, 0), "seconds": round(phrase.end_s, 3)}


def _training(teacher: Teacher, session: Session) -> dict[str, Any]:
    missing = max(FIRST_CHOICES - len(session.judgements()), 0)
    return {"doing": teacher.doing, "missing": missing, "error": teacher.error}
