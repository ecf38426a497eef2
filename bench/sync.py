"""New weights to the samplers: the native engine and vLLM in memory, beside a round trip through a checkpoint file.

    python bench/sync.py --peer all --out bench/results/sync.json

The floor is a copy of the weights, 4 bytes each. The native engine also packs its matrices for the rows it decodes, in
the first step of the next rollout: that counts as sampling. "checkpoint" is what a pipeline without a sync in memory
does: save_pretrained, then from_pretrained by whoever samples, on the disk of the temporary folder.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

import as_commands  # noqa: F401  # isort: skip  # before torch

from harness import Job, Work, interleaved, measured_ceilings, parser, report
from stages import compute_dtype, finish, made, paper_policy, parse, phi3, run

from fastsmart.policy.transformer import Policy
from fastsmart.sampling import SamplingSettings, make_engine

PEERS = ("vllm", "checkpoint")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, 15, PEERS)
    given = parse(options, {"runs": 9}, arguments)
    policy = paper_policy(given.device)
    versions = itertools.count(1)
    with ExitStack() as stack:

        def loads(engine: str) -> dict[str, Job]:
            settings = SamplingSettings(engine=engine, max_rows=64)
            made_engine = make_engine(settings, policy, dtype=compute_dtype(given.device))
            stack.enter_context(closing(made_engine))
            return {engine: lambda: made_engine.load(policy, next(versions))}

        folder = stack.enter_context(tempfile.TemporaryDirectory())
        makers = {"vllm": lambda: loads("vllm"), "checkpoint": lambda: checkpoint(policy, folder)}
        peers, left_out = made(makers, given)
        seconds = interleaved(loads("native") | peers, given.runs, given.device)
    weights = policy.num_parameters
    work = [Work("weights read and written", gbyte=8e-9 * weights)]
    case = report("sync", seconds, "native", work, measured_ceilings(given.device))
    cases = {f"{weights / 1e6:.1f} M": case | {"weight_bytes": 4 * weights}}
    return finish("sync", cases, given, left_out=left_out)


def checkpoint(policy: Policy, folder: str) -> dict[str, Job]:
    model, dtype = phi3(policy), compute_dtype(str(policy.device))

    def job() -> None:
        model.save_pretrained(folder)
        type(model).from_pretrained(folder, dtype=dtype).to(policy.device)

    return {"checkpoint": job}


if __name__ == "__main__":
    run(main)
