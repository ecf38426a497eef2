"""The bodies of the subcommands: each reads its options, calls the job and says what came of it."""

from fastsmart.commands.live import live
from fastsmart.commands.machine import bank, doctor, selfcheck
from fastsmart.commands.playing import render, sample, score
from fastsmart.commands.studying import evaluate, frontier, listen, report, style_stats, sweep
from fastsmart.commands.training import bench, blend, pretrain, profile, top, train

__all__ = [
    "bank",
    "bench",
    "blend",
    "doctor",
    "evaluate",
    "frontier",
    "listen",
    "live",
    "pretrain",
    "profile",
    "render",
    "report",
    "sample",
    "score",
    "selfcheck",
    "style_stats",
    "sweep",
    "top",
    "train",
]
