"""A first look at a GPU, in about five minutes: is every kernel right, and how far is it from the least its work takes?

    python bench/gpu_first.py --out runs/first.jsonl                 # all checks
    python bench/gpu_first.py --out runs/first.jsonl --only attention encoder --profile

Needs what bench/gpu_suite.py needs, and fastsmart need not be installed. A line is written to --out, and said, the
moment it is known: check, case, microseconds, the floor of its work at the rates measured here, the share of it that
was reached, how far the result is from the twin's ("apart", of "limit"), and "ok" where that decides something.

The checks run one after the other in a process of their own. One that crashes, loses the GPU or says nothing for
--silence seconds is noted as not ok and the next begins in a new process. Without a GPU kernels are checked in
Triton's interpreter where there is Triton, and times say nothing. The exit code is 1 when a check
was not ok.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from gpu_suite import ROOT, end_all, surroundings

CHECKS = {  # name -> module and function, what matters most first
    "machine": "gpu_first_kernels:machine",
    "decode": "gpu_first_kernels:decode",
    "attention": "gpu_first_kernels:attention",
    "sampler": "gpu_first_stages:sampler",
    "encoder": "gpu_first_stages:encoder",
    "recorded_elsewhere": "gpu_first_stages:recorded_elsewhere",
    "update": "gpu_first_stages:update",
    "mixdown": "gpu_first_stages:mixdown",
    "sample": "gpu_first_kernels:sample",
    "log_probs": "gpu_first_kernels:log_probs",
    "objective": "gpu_first_kernels:objective",
    "convolution": "gpu_first_kernels:convolution",
    "moments": "gpu_first_kernels:moments",
    "position": "gpu_first_encoder:position",
    "norm": "gpu_first_encoder:norm",
    "decode_products": "gpu_first_kernels:decode_products",
}
BEGINS = "begins"  # the only key, beside the check, of the line that a worker begins a check with
LONGEST = 1500  # characters of a traceback that are kept

Line = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="file of JSON lines; written anew")
    options.add_argument("--only", nargs="+", default=list(CHECKS), choices=list(CHECKS), metavar="CHECK")
    options.add_argument("--device", default="", help='"cuda" or "cpu"; default: a GPU where there is one')
    options.add_argument("--quick", action="store_true", help="toy shapes; implied without a GPU")
    options.add_argument("--profile", action="store_true", help="say which kernels decode step, encoder, update take")
    options.add_argument("--silence", type=float, default=90.0, help="seconds without a line that end a check (90)")
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args(arguments)
    if given.worker:
        work(given)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with open(given.out, "w", encoding="utf-8") as sink, tempfile.TemporaryDirectory() as folder:
        worker = [__file__, "--worker", "--out", os.devnull, "--device", given.device]
        worker += ["--quick"] * given.quick + ["--profile"] * given.profile
        failed = look_at(given.only, worker, surroundings(Path(folder)), given.silence, sink)
    print(f"not ok: {', '.join(failed)}" if failed else "all ok")
    return int(bool(failed))


def look_at(
    checks: Sequence[str], worker: Sequence[str], environment: Mapping[str, str], silence_s: float, sink: TextIO
) -> list[str]:
    """Run checks in a worker, and in another from the next on when it dies; gives those that were not ok.

    worker : after `python`, which then gets --only and the checks
    """
    rest, failed = list(checks), []
    while rest:
        process = subprocess.Popen(
            [sys.executable, *worker, "--only", *rest], env=environment, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        under_way, said = "", ""
        try:
            for text in lines_of(process, silence_s):
                line = parsed(text)
                if line is None:
                    print(text, flush=True)
                    said = text if text.strip() else said
                elif BEGINS in line:
                    under_way = line["check"]
                    rest = rest[rest.index(under_way) :]
                else:
                    tell(line, sink)
                    if line.get("ok") is False:
                        failed.append(line["check"])
                    if line.get("ends"):
                        rest, under_way = rest[1:], ""
        finally:
            end_all(process)
            if process.stdout:
                process.stdout.close()
        if rest:  # it died, or was silent for too long, in this check
            why = f"its process ended with {process.returncode}: {said[-300:]}"
            tell({"check": under_way or rest[0], "ok": False, "error": why}, sink)
            failed.append(under_way or rest[0])
            rest = rest[1:]
    return list(dict.fromkeys(failed))


def lines_of(process: subprocess.Popen[bytes], silence_s: float) -> Iterator[str]:
    """What a process writes, line by line, until it ends or writes nothing for `silence_s`."""
    assert process.stdout is not None
    descriptor, text = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while selector.select(silence_s):
            new = os.read(descriptor, 2**16)
            if not new:
                process.wait()
                break
            *whole, text = (text + new).split(b"\n")
            yield from (line.decode("utf-8", errors="replace") for line in whole)
    if text:
        yield text.decode("utf-8", errors="replace")


def parsed(text: str) -> Line | None:
    """A line of a worker, if it is one."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "check" in line else None


def tell(line: Line, sink: TextIO | None = None) -> None:
    """Say a line, and write it, at once."""
    text = json.dumps(line, default=float)
    print(text, flush=True)
    if sink:
        sink.write(text + "\n")
        sink.flush()


def work(options: argparse.Namespace) -> None:
    """Run checks, in the worker: every finding is a line. Ends with the GPU's context when that is lost."""
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # asked for when a kernel file is imported
    from gpu_look import Look

    torch.manual_seed(0)
    for name in options.only:
        tell({"check": name, BEGINS: True})
        start, ends = time.perf_counter(), {"check": name, "ends": True}
        try:
            module, function = CHECKS[name].split(":")
            check = getattr(importlib.import_module(module), function)
            for finding in check(Look(device, options.quick or device == "cpu", options.profile)):
                tell({"check": name, **finding})
        except Exception as error:
            if "CUDA error" in str(error) or isinstance(error, torch.AcceleratorError):
                raise  # nothing else can run in this process
            ends |= {"ok": False, "error": repr(error)[:300], "trace": traceback.format_exc()[-LONGEST:]}
        tell(ends | {"seconds": round(time.perf_counter() - start, 1)})


if __name__ == "__main__":
    sys.exit(main())
