"""Who may ask the server: the page it gave out itself, on this machine, and nobody else."""

from __future__ import annotations

import re

import pytest

from fastsmart.live.guard import HEADERS, is_local_name
from fastsmart.live.handlers import PAGE

LOCAL = ["127.0.0.1:8723", "localhost:8723", "localhost", "127.0.0.1", "[::1]:8723", "[::1]", "192.168.0.7:8723"]
FOREIGN = [
    *("evil.example", "evil.example:8723", "127.0.0.1.evil.example", "localhost.evil.example:8723", "", ":8723"),
    *("127.0.0.1:8723:1", "127.0.0.1:x", "[::1", "::1", "[127.0.0.1]:80", "[localhost]", "127.0.0.1 ", "0x7f.1"),
    *("2130706433", "localhost:", "127.0.0.1@evil.example", "[::1]evil.example", "127.0.0.1:80\x00"),
]


@pytest.mark.parametrize("host", LOCAL)
def test_an_address_in_numbers_is_this_machine(host):
    assert is_local_name(host)


@pytest.mark.parametrize("host", [host for host in FOREIGN if host != "localhost:"])
def test_a_name_that_someone_else_owns_is_not(host):
    assert not is_local_name(host)


def test_a_page_that_made_its_name_mean_this_machine_gets_nothing(client):
    for path in ("", "state", "choices.jsonl", "events"):
        answer = client.get(path, headers={"host": "evil.example:8723"})
        assert answer.status_code == 403
        assert "clip" not in answer.text


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://evil.example:8723", "file://", ""])
def test_another_page_cannot_send_orders(client, studio, origin):
    before = studio.session.place
    answer = client.post("settings", json={"boldness": 9}, headers={"origin": origin})
    assert answer.status_code == 403
    assert studio.session.place == before


def test_the_own_page_can(client, studio):
    answer = client.post("settings", json={"boldness": 4}, headers={"origin": "http://127.0.0.1:8723"})
    assert answer.status_code == 200
    assert studio.session.place.boldness == 4


@pytest.mark.parametrize("path", ["/", "/state", "/" + "u" * 48 + "/state", "/" + "t" * 47 + "/", "/" + "t" * 48, "//"])
def test_without_the_whole_token_there_is_nothing(client, path):
    answer = client.get(f"http://127.0.0.1:8723{path}", follow_redirects=False)
    assert answer.status_code == 404
    assert answer.json()["error"].startswith("there is nothing here")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "PROPFIND"])
def test_other_methods_are_refused(client, method):
    assert client.request(method, "state").status_code == 405


def test_orders_are_not_given_by_following_a_link(client, studio):
    before = studio.session.place
    for path in ("choose", "undo", "reset", "settings?boldness=1", "drop"):
        assert client.get(path).status_code == 405
    assert studio.session.place == before


def test_every_answer_forbids_the_browser_what_the_page_does_not_need(client):
    for path in ("", "state", "live.js", "nothing", "clips/none.flac"):
        headers = client.get(path).headers
        assert {name: headers[name] for name in HEADERS} == HEADERS
        assert "server" not in headers


def test_the_page_asks_for_nothing_from_elsewhere(client):
    for name in PAGE:
        text = client.get(name).text
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+|url\(|@import|src=\"[^\"]*\"|href=\"[^\"]*\"", text)
        allowed = {'src="roll.js"', 'src="sound.js"', 'src="phrase.js"', 'src="live.js"', 'href="page.css"'}
        allowed |= {'href="live.css"', 'href="data:,"', 'href="#choices"', 'href="choices.jsonl"', 'href="taste.json"'}
        found = set(addresses) - allowed
        assert not {a for a in found if "www.w3.org" not in a}, name
        assert "innerHTML" not in text
        assert "eval(" not in text
        assert " style=" not in text
