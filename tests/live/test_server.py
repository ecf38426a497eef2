"""The page's server: what it answers, what it refuses in one sentence, and that no request ends it."""

from __future__ import annotations

import io
import json
import random
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from urllib.request import urlopen

import numpy as np
import pytest
import soundfile
from made_notes import made, melody

from fastsmart.errors import UserError
from fastsmart.live.handlers import PAGE
from fastsmart.live.server import POSTS, listen_at, token_of
from fastsmart.notes import read_midi


def refused_in_a_sentence(answer, status: int) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert "\n" not in error
    assert "Traceback" not in error
    assert 5 < len(error) < 700
    return error


def test_the_page_and_its_parts_are_there(client):
    kinds = {name: client.get(name).headers["content-type"].partition(";")[0] for name in PAGE}
    assert kinds[""] == "text/html"
    assert set(kinds.values()) == {"text/html", "text/css", "text/javascript"}


def test_a_clip_is_stereo_sound_of_its_length_at_one_loudness(client, studio):
    from pyloudnorm import Meter

    for side in client.get("state").json()["pair"]:
        samples, rate = soundfile.read(io.BytesIO(client.get(f"clips/{side['id']}.flac").content))
        assert rate == 48000
        assert samples.shape[1] == 2
        assert len(samples) / rate >= side["seconds"]
        assert np.abs(samples).max() < 1
        assert Meter(rate).integrated_loudness(samples) == pytest.approx(-23, abs=0.6)


def test_a_clip_comes_as_midi_too(client, tmp_path):
    side = client.get("state").json()["pair"][0]
    (tmp_path / "clip.mid").write_bytes(client.get(f"clips/{side['id']}.mid").content)
    assert sorted(read_midi(tmp_path / "clip.mid").pitch) == sorted(note[2] for note in side["notes"])


def test_a_choice_goes_round_by_the_server(client, studio):
    left, right = client.get("state").json()["pair"]
    order = {"left": left["id"], "right": right["id"], "choice": "left"}
    after = client.post("choose", json=order).json()
    assert after["choices"] == 1
    assert {clip["id"] for clip in after["pair"]}.isdisjoint({left["id"], right["id"]})
    lines = [json.loads(line) for line in client.get("choices.jsonl").text.splitlines()]
    assert [(c["left"], c["right"], c["choice"]) for c in lines] == [(left["id"], right["id"], "left")]
    assert refused_in_a_sentence(client.post("choose", json=order), 409).startswith("these two have been judged")
    back = client.post("undo").json()
    assert [clip["id"] for clip in back["pair"]] == [left["id"], right["id"]]
    assert back["choices"] == 0
    assert client.get("taste.json").json()["choices"] == 0


@pytest.mark.parametrize(
    "path",
    [
        *("../session.json", "clips/../session.json", "clips/..%2fsession.flac", "clips/%2e%2e%2f.token.flac"),
        *("clips/a/b.flac", "clips/a%00b.flac", "piano/60.flac", "piano/-1.flac", "//etc/passwd"),
        *(f"piano/{'9' * 5000}.flac", "piano/021.flac", "piano/%C2%B2%C2%B1.flac"),
        *("page/live.html", "live.js/..", "%2e%2e/%2e%2e/etc/passwd", "clips/" + "a" * 65 + ".flac", ".token"),
    ],
)
def test_no_path_leads_out_of_the_page(client, path):
    answer = client.get(path)
    assert answer.status_code in (403, 404), answer.text
    assert "token" not in answer.text


def test_a_file_of_100_mb_is_refused_in_one_sentence(client):
    error = refused_in_a_sentence(client.post("phrase?name=big.mid", content=b"\0" * 100_000_000), 413)
    assert error.startswith("big.mid is larger than 8 MiB")


def test_a_file_that_hides_its_size_is_refused_when_it_has_grown_too_large(client):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield b"\0" * 2**20
            if len(taken) > 20:
                return

    refused_in_a_sentence(client.post("phrase?name=big.mid", content=endless()), 413)


@pytest.mark.parametrize("content", [b"", b"MThd", b"not MIDI at all", b"MThd" + struct.pack(">IHHH", 6, 1, 9, 96)])
def test_a_file_that_is_no_midi_is_refused_in_one_sentence(client, studio, content):
    error = refused_in_a_sentence(client.post("phrase?name=mine.mid", content=content), 422)
    assert "mine.mid" in error
    assert str(studio.session.folder.path) not in error
    assert studio.answers.phrase is None
    assert not [path for path in studio.session.folder.path.iterdir() if "phrase" in path.name]


def test_a_phrase_longer_than_the_policy_holds_says_to_take_fewer_bars(client, tmp_path):
    made([melody(1, 1500)]).to_midi(0, tmp_path / "long.mid")
    error = refused_in_a_sentence(
        client.post("phrase?name=long.mid", content=(tmp_path / "long.mid").read_bytes()), 422
    )
    assert "fewer bars" in error or "how many bars" in error
    assert "--" not in error


def test_a_phrase_in_a_metre_that_the_policy_does_not_know_says_so(client, tmp_path):
    odd = replace(made([melody(1, 16)]), meter_tick=np.zeros(1, np.int32), meter=np.array([[7, 16]], np.int32))
    replace(odd, meter_offsets=np.array([0, 1])).to_midi(0, tmp_path / "odd.mid")
    content = (tmp_path / "odd.mid").read_bytes()
    error = refused_in_a_sentence(client.post("phrase?name=odd.mid", content=content), 422)
    assert error.startswith(
        "cannot continue odd.mid: there are bars of 7/16 in it, which the policy does not know; choose"
    )
    assert "--" not in error


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("choose", b"{"),
        ("choose", b"[]"),
        ("choose", b'{"left": 1, "right": "b", "choice": "left"}'),
        ("choose", b"[" * 100_000),
        ("choose", b"\xff\xfe"),
        ("settings", b'{"boldness": 11}'),
        ("settings", b'{"boldness": true}'),
        ("settings", b'{"boldness": 5.5}'),
        ("settings", b'{"paused": 1}'),
        ("settings", b'{"listener": ""}'),
        ("settings", b'{"listener": "a\\nb"}'),
        ("settings", b'{"listener": ["a"]}'),
        ("back", b'{"version": 7}'),
        ("back", b'{"version": -1}'),
        ("back", b'{"version": true}'),
        ("played", b'{"notes": [], "tempo": 100}'),
        ("played", b'{"notes": [[0, 1, 60]], "tempo": 100}'),
        ("played", b'{"notes": [[0, 1, 200, 80]], "tempo": 100}'),
        ("played", b'{"notes": [[0, 1, NaN, 80]], "tempo": 100}'),
        ("played", b'{"notes": [[0, Infinity, 60, 80]], "tempo": 100}'),
        ("played", b'{"notes": [[0, 1, 60, 80]], "tempo": 1e999}'),
        ("played", b'{"notes": [["0", 1, 60, 80]], "tempo": 100}'),
        ("phrase?bars=-1", b""),
        ("phrase?bars=x", b""),
        ("settings", b'{"x": "' + b"a" * 300_000 + b'"}'),
    ],
)
def test_what_is_no_order_is_refused_in_one_sentence_and_changes_nothing(client, studio, path, content):
    before = studio.session.place
    answer = client.post(path, content=content)
    refused_in_a_sentence(answer, answer.status_code)
    assert answer.status_code in (400, 413, 422)
    assert studio.session.place == before


def fuzzed(chance: random.Random) -> dict:
    """One request of the kind that only a broken or hostile client sends."""
    pieces = [
        *PAGE,
        *POSTS,
        "state",
        "clips/",
        "piano/",
        ".flac",
        "..",
        "%00",
        "%2f",
        "\u00e9",
        "a" * 300,
        "?bars=",
        "9",
    ]
    path = "/".join(chance.choices(pieces, k=chance.randint(1, 4)))
    if chance.random() < 0.7:
        path = chance.choice([*POSTS, "state", "choices.jsonl", f"clips/{chance.choice(['x', '..', 'clip-001'])}.mid"])
    values = ["left", "clip-001", "", 0, -1, 1e308, None, True, [], {}, "\u0000", [[0, 1, 60, 80]], "x" * 5000]
    keys = ["left", "right", "choice", "boldness", "paused", "listener", "version", "notes", "tempo", "x"]
    content = chance.choice(
        [
            b"",
            chance.randbytes(chance.randint(0, 400)),
            json.dumps({key: chance.choice(values) for key in chance.sample(keys, chance.randint(0, 6))}).encode(),
            b"MThd\0\0\0\6\0\0\0\1\0\x60MTrk\0\0\0\x20" + chance.randbytes(32),
        ]
    )
    headers = {
        "host": chance.choice(["127.0.0.1:8723"] * 8 + ["x", "[::1]", ""]),
        "content-type": chance.choice(["application/json", "audio/midi", "multipart/form-data; boundary=x", "\x7f"]),
        "range": chance.choice(["bytes=0-", "bytes=9-1", "x"]),
        "content-length": chance.choice([str(len(content))] * 6 + ["-1", "x", "9" * 30]),
    }
    method = chance.choice(["GET", "POST", "POST", "POST", "HEAD", "DELETE", "BREW"])
    return {"method": method, "url": path, "content": content, "headers": headers}


def withstands(client, studio, clips, count: int, seed: int) -> None:
    """Send so many; the server answers each, never with an error of its own, and afterwards it is as it should be."""
    chance, statuses = random.Random(seed), set()
    for _ in range(count):
        request = fuzzed(chance)
        if request["url"] == "reset":
            continue
        answer = client.request(**request, follow_redirects=False)
        assert answer.status_code < 500, (request, answer.text[:500])
        if answer.status_code >= 400 and request["method"] != "HEAD":
            refused_in_a_sentence(answer, answer.status_code)
        statuses.add(answer.status_code)
    assert {200, 403, 404, 405} <= statuses
    if not client.get("state").json()["pair"]:  # all of its sixty pieces have been passed over
        more = [replace(clip, id=f"more-{clip.id}") for clip in clips[:4]]
        studio.session.add(more)
    assert client.get("state").json()["pair"]
    files = {path.name.partition("-")[0] for path in studio.session.folder.path.rglob("*") if path.is_file()}
    known = {
        "clip",
        "first",
        "more",
        "answer",
        "choices.jsonl",
        "session.json",
        "standard.json",
        "taste.json",
        "me.json",
        ".lock",
    }
    assert {name for name in files if not name.endswith(".json")} <= known | {"phrase.mid"}


def test_hundreds_of_garbled_requests_do_no_harm(client, studio, clips):
    withstands(client, studio, clips, 300, 1)


@pytest.mark.slow
def test_ten_thousand_garbled_requests_do_no_harm(client, studio, clips):
    withstands(client, studio, clips, 10_000, 2)


def test_the_token_stays_and_only_its_owner_reads_it(tmp_path):
    token = token_of(tmp_path)
    assert len(token) >= 40
    assert token_of(tmp_path) == token
    assert (tmp_path / ".token").stat().st_mode & 0o077 == 0
    (tmp_path / ".token").write_text("short")
    assert len(token_of(tmp_path)) >= 40


def test_who_comes_before_the_server_is_up_waits():
    with listen_at("127.0.0.1", 0) as at, socket.create_connection(at.getsockname(), timeout=5):
        pass


def test_a_port_that_is_taken_is_said_in_one_sentence():
    with listen_at("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(UserError, match="choose another --port"):
            listen_at("127.0.0.1", first.getsockname()[1])


def test_a_page_that_is_open_is_let_go_when_the_server_is_stopped(tmp_path):
    command = [sys.executable, "-m", "fastsmart", "live", "--out", str(tmp_path), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--no-training", "--max-tokens", "60"], **pipes) as process:
        address = process.stdout.readline().split()[1]
        with urlopen(f"{address}events", timeout=60) as page:
            assert page.readline().startswith(b"retry")
            process.send_signal(signal.SIGINT)
            page.read()  # to the end of the stream
        _, complaints = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in complaints
    assert "ERROR" not in complaints
