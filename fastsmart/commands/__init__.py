"""The bodies of the subcommands: each reads its options, calls the job and says what came of it."""

from fastsmart.commands.machine import bank, doctor
from fastsmart.commands.playing import render, sample, score
from fastsmart.commands.studying import evaluate, listen, report, sweep
from fastsmart.commands.training import bench, pretrain, profile, top, train

__all__ = [
    "bank",
    "bench",
    "doctor",
    "evaluate",
    "listen",
    "pretrain",
    "profile",
    "render",
    "report",
    "sample",
    "score",
    "sweep",
    "top",
    "train",
]
