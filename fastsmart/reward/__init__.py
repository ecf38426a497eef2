"""Rewards: clips in, one number per clip out."""

from fastsmart.reward.base import Clips, Reward, Scores
from fastsmart.reward.blend import RewardBlend
from fastsmart.reward.registry import REWARDS, load_reward, register
from fastsmart.reward.settings import RewardSettings

__all__ = [
    "REWARDS",
    "Clips",
    "Reward",
    "RewardBlend",
    "RewardSettings",
    "Scores",
    "load_reward",
    "register",
]
