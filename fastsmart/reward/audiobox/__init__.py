"""Meta Audiobox Aesthetics (Tjandra et al. 2025, arXiv 2502.05139): its published formats, our forward, the reward."""

from fastsmart.reward.audiobox.reward import AudioboxReward
from fastsmart.reward.audiobox.weights import HUB_ID, cached_checkpoint, make_random_weights, read_weights

__all__ = ["HUB_ID", "AudioboxReward", "cached_checkpoint", "make_random_weights", "read_weights"]
