"""One process that encodes MIDI files: `python -m fastsmart.tokens.encode_worker PIPE`, see `dataset.encode_folder`.

Reads one message, JSON with the vocabulary's description and the paths; sends one message a file, in order: a byte that
says whether it could be encoded, then its ids (uint16) or the reason.
"""

from __future__ import annotations

import json
import sys
from multiprocessing.connection import Connection

from fastsmart.errors import UserError
from fastsmart.tokens.dataset import HEADER, encode_midi
from fastsmart.tokens.vocabulary import Vocabulary


def main() -> None:
    pipe = Connection(int(sys.argv[1]))
    task = json.loads(pipe.recv_bytes())
    vocab = Vocabulary((), task["description"])  # encoding needs only MidiTok's own description
    for path in task["paths"]:
        try:
            message = HEADER.pack(True) + encode_midi(path, vocab).tobytes()
        except UserError as error:
            message = HEADER.pack(False) + str(error).encode("utf-8", "replace")
        except Exception as error:  # whatever MidiTok trips over is that file's fault, and named
            message = HEADER.pack(False) + f"{path}: {type(error).__name__}: {error}".encode("utf-8", "replace")
        pipe.send_bytes(message)


if __name__ == "__main__":
    main()
