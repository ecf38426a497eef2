"""The whole step, ours and the public pipeline's, taking turns in one process on the same work; stage by stage.

    make bench-peers
    python bench/step.py --peer public --soundfont /usr/share/sounds/sf2/FluidR3_GM.sf2 --out bench/results/step.json

A step of the paper: 32 completions of 256 tokens (4 prompts x 8) by a 17.2 M policy that plays real music, cut at 10 s,
one soundfont, Audiobox of the published size with random weights, one optimizer step; float32, all threads to whoever
has the turn. Ours runs through the stations of a real training run, with float32 and with int8 scoring, one stage after
the other, so that each has its time, and as it comes ("overlapped"). The public pipeline is in bench/peers/public.py;
its second form leaves gradient checkpointing off, which TRL has on.

The floors are those of float32 arithmetic: scoring in int8 may stay below its own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import REFERENCE, Work, chosen_peers, interleaved, measured_ceilings, parser, report
from policies import PAPER, playing_policy
from results import write_result
from scaling import AUDIOBOX_GFLOP_PER_S, Job, sampling_terms, update_terms

from fastsmart.audio import find_soundfont
from fastsmart.audio.settings import RenderSettings
from fastsmart.config import Config
from fastsmart.notes import NoteBatch
from fastsmart.policy.checkpoint import save_policy
from fastsmart.policy.state import Checkpoints
from fastsmart.policy.transformer import Policy
from fastsmart.presets import demo, smart_paper
from fastsmart.reward.audiobox import make_random_weights
from fastsmart.reward.settings import RewardSettings
from fastsmart.tokens.prompts import make_prompts
from fastsmart.tokens.vocabulary import load_vocabulary
from fastsmart.train.learner import Learner
from fastsmart.train.loop import advantages
from fastsmart.train.metrics import Batch
from fastsmart.train.ranks import Ranks
from fastsmart.train.settings import PolicySettings
from fastsmart.train.stations import Rollouts, Stations
