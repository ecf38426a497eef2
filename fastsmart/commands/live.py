"""The body of live."""

from __future__ import annotations

import argparse
import ipaddress
import sys
from collections.abc import Sequence
from pathlib import Path

from fastsmart.errors import UserError
from fastsmart.words import counted

NAMED = 3  # damaged lines


def live(options: argparse.Namespace) -> int:
    if options.replay:
        return _replay(options)
    from fastsmart.live.first_policy import first_policy
    from fastsmart.live.settings import LiveSettings

    if options.policy is None:
        options.policy = first_policy(options.out)
    given = {
        key: value
        for key in (
            "policy",
            "listener",
            "host",
            "port",
            "soundfont",
            "boldness",
            "threads",
            "seconds",
            "max_tokens",
            "embedding",
        )
        if (value := getattr(options, key)) is not None
    }
    settings = LiveSettings(joint=options.joint, train=not options.no_training, **given)
    if options.bars is not None and not options.phrase:
        raise UserError("--bars is of the MIDI file of --continue; name one, or leave it out")

    from fastsmart.live.server import listen_at, make_app, serve, token_of
    from fastsmart.live.studio import Studio

    at = listen_at(settings.host, settings.port)
    studio = Studio.open(options.out, settings)
    try:
        if options.phrase:
            studio.take_file(options.phrase, options.bars or 0)
        token = token_of(Path(options.out))
        address, port, *_ = at.getsockname()  # in numbers: other names are refused
        if not ipaddress.ip_address(address).is_loopback:
            print("fastsmart: whoever reaches this machine and knows the address can use the page", file=sys.stderr)
        _warn_of(studio.session.damaged)
        studio.start()
        host = f"[{address}]" if ":" in address else address
        print(f"open http://{host}:{port}/{token}/ in a browser; Ctrl-C ends it", flush=True)
        return serve(make_app(studio, token), at, studio.events)
    finally:
        studio.close()


def _replay(options: argparse.Namespace) -> int:
    """Learn the taste of a file of choices without the page, and train what the page had trained."""
    from fastsmart.live.replay import replay_all
    from fastsmart.taste import read_choices

    _warn_of(read_choices(options.replay).damaged)
    taste, policy = replay_all(options.replay, options.out, options.listener, print)
    print(f"{counted(taste.choices, 'choice')} learnt; {policy or 'nothing was trained on them'}")
    return 0


def _warn_of(damaged: Sequence[str]) -> None:
    """Name the first lines of a file of choices that are none, and count the others."""
    for line in damaged[:NAMED]:
        print(f"fastsmart: {line}; it counts for nothing", file=sys.stderr)
    if len(damaged) > NAMED:
        print(f"fastsmart: and {counted(len(damaged) - NAMED, 'line')} more", file=sys.stderr)
