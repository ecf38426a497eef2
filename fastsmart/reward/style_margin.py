"""Whether a clip is in the style that was asked for. Shape letters: N clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastsmart.errors import UserError
from fastsmart.music.styles import JUDGE_FILE, LEAST, StyleJudge, load_judge
from fastsmart.reward.base import Clips, Surroundings
from fastsmart.reward.settings import RewardSettings

MEDIANS = "median_margin"  # of the judge's `about`: log-odds of the median real clip by style
LOWEST = float(np.log(LEAST) - np.log1p(-LEAST))  # nats, of a clip that the judge hears in another style for sure


class StyleMargin:
    """Log-odds, in nats, that the judge gives to the style a clip was asked for, at most those of the style's median
    real clip: more would be paid for caricature only.

    Range from `LOWEST`, -9.2, which a clip without notes has, to the median, about 1 to 6. A clip that was asked for no
    style, or for one that the judge does not know, has 0.

    Hacked by whatever the judge takes for the style and listeners do not: it counts intervals, rhythms, chords and
    registers, and hears no form. A second judge of another family (`fastsmart.music.style_forest`) never trains.
    """

    name = "style_margin"
    needs_audio = False

    def __init__(self, judge: StyleJudge | str | Path) -> None:
        self.judge = judge if isinstance(judge, StyleJudge) else load_judge(Path(judge))
        self.ceiling = {str(style): float(top) for style, top in self.judge.about.get(MEDIANS, {}).items()}

    @classmethod
    def from_settings(cls, settings: RewardSettings, surroundings: Surroundings) -> StyleMargin:
        path = settings.style_judge or surroundings.style_judge
        if not path:
            raise UserError(
                f"reward style_margin needs a judge of styles, and the base policy has no {JUDGE_FILE} beside it; "
                "name one with reward.style_judge"
            )
        return cls(path)

    def __call__(self, clips: Clips) -> np.ndarray:
        asked = clips.asked or ("",) * len(clips)
        margin = self.judge.margin(clips.notes, asked)
        margin[clips.notes.counts == 0] = LOWEST
        top = np.array([self.ceiling.get(style, np.inf) for style in asked])
        found = np.clip(margin, LOWEST, top)
        return np.where([style in self.judge.styles for style in asked], found, 0.0).astype(np.float32)
