"""Rewards: clips in, one number per clip out."""

from fastsmart.reward.base import Clips, Reward, Scores
from fastsmart.reward.mix import RewardMix, combine
from fastsmart.reward.registry import REWARDS, load_reward
from fastsmart.reward.settings import RewardSettings

__all__ = ["REWARDS", "Clips", "Reward", "RewardMix", "RewardSettings", "Scores", "combine", "load_reward"]
