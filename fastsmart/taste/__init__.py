"""Taste: what a listener likes, learnt from choices between two clips; as a reward it is `taste` of the registry."""

from fastsmart.reward.taste import Taste as Taste
from fastsmart.reward.taste_features import LABELS as LABELS
from fastsmart.reward.taste_features import Standard as Standard
from fastsmart.reward.taste_features import features as features
from fastsmart.taste.choices import Choice as Choice
from fastsmart.taste.choices import ChoiceLog as ChoiceLog
from fastsmart.taste.choices import append_choice as append_choice
from fastsmart.taste.choices import read_choices as read_choices
from fastsmart.taste.choices import standing as standing
from fastsmart.taste.clips import Clip as Clip
from fastsmart.taste.clips import ClipFolder as ClipFolder
from fastsmart.taste.pairs import next_pair as next_pair
from fastsmart.taste.replay import TasteFolder as TasteFolder
from fastsmart.taste.replay import replay as replay
