"""The sampler with its caches beside the public procedure without any."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from learnt_notagen import learnt
from public_notagen import PublicNotaGen, random_choice, truncated
from scipy.stats import chi2_contingency

from fastsmart.errors import UserError
from fastsmart.notagen.char_loop import DRAW, CharLoop
from fastsmart.notagen.model import NotaGen, NotaGenSize
from fastsmart.notagen.patches import COUNTDOWN, decode, encode_prompt
from fastsmart.notagen.sampler import AS_THE_AUTHORS, PatchSampler, Piece
from fastsmart.notagen.weights import random_model

TINY = NotaGenSize(2, 2, 64, 12)
PROMPTS = [encode_prompt(lines) for lines in (["%a"], ["%Romantic", "%b"], ["%Chopin, Frederic"], [])]


@pytest.fixture(scope="module")
def model() -> NotaGen:
    """A network whose characters are far from equally likely, and whose patches often end early."""
    model = random_model(TINY, seed=1, scale=6.0)
    with torch.no_grad():
        model.char_level_decoder.network.wte.weight[2] *= 2
    return model


@pytest.fixture(scope="module")
def public(model: NotaGen) -> PublicNotaGen:
    return PublicNotaGen(model)


def drawn(model: NotaGen, prompts: list[np.ndarray], seed: int = 0, **changes: object) -> list[Piece]:
    settings = replace(AS_THE_AUTHORS, **changes)
    return sorted(PatchSampler(model, settings)(prompts, (seed,)), key=lambda piece: piece.index)


class SameNumbers:
    """Chooses by the uniform numbers that our sampler takes for piece `index` of seed 0."""

    def __init__(self, index: int) -> None:
        self.random = np.random.default_rng([0, index])
        self.numbers: list[float] = []

    def patch(self, settings, place: int, probabilities: np.ndarray) -> int:
        cumulative = truncated(probabilities, settings).cumsum()
        return int(np.searchsorted(cumulative, self.numbers[place] * cumulative[-1], side="right"))

    def piece(self, public: PublicNotaGen, prompt: np.ndarray, patches: int, settings) -> str:
        found, in_body = list(prompt), False
        for _ in range(patches):
            numbers = self.random.random((2, 16), np.float32)
            for turn, given in enumerate((b"", b"[r:0/")):
                self.numbers, self.place = list(numbers[turn]), len(given)

                def choose(probabilities: np.ndarray) -> int:
                    self.place += 1
                    return self.patch(settings, self.place - 1, probabilities)

                patch = public.patch(np.stack(found), choose, given)
                if in_body or bytes(patch[:3]) != b"[r:":
                    break
                in_body = True
            if patch[0] == 1 and patch[1] == 2:
                break
            found.append(np.where(np.cumsum(patch == 2) - (patch == 2) > 0, 0, patch).astype(np.uint8))
        return decode(np.stack(found))


def test_the_same_numbers_draw_the_same_pieces_as_the_public_procedure(model: NotaGen, public: PublicNotaGen):
    """Rows at different patches, of prompts of different lengths, refilled, against one at a time without caches."""
    prompts = PROMPTS + PROMPTS[:2]
    pieces = drawn(model, prompts, max_tokens=16 * 6, max_rows=4)
    assert len({len(piece.patches) for piece in pieces}) > 1
    for i, piece in enumerate(pieces):
        expected = SameNumbers(i).piece(public, prompts[i], 6, AS_THE_AUTHORS)
        assert piece.text == expected
        assert piece.text.startswith(decode(prompts[i]))


def test_the_distribution_is_that_of_the_public_procedure(model: NotaGen, public: PublicNotaGen):
    """Two samples of 150 patches, their first and last characters and lengths: chi-square at p > 0.001 each."""
    count, prompt = 150, PROMPTS[0]
    ours = [piece.text[3:] for piece in drawn(model, [prompt] * count, seed=5, max_tokens=16)]
    choose = random_choice(AS_THE_AUTHORS, np.random.default_rng(6))
    theirs = [decode(public.piece(prompt, 1, choose))[3:] for _ in range(count)]
    for what in (lambda text: text[:1], lambda text: text[-1:], lambda text: len(text) // 3, lambda text: text[:2]):
        assert two_sample_p([what(t) for t in ours], [what(t) for t in theirs]) > 0.001
    colder = [piece.text[3:] for piece in drawn(model, [prompt] * count, seed=5, max_tokens=16, temperature=0.4)]
    assert two_sample_p([t[:2] for t in colder], [t[:2] for t in theirs]) < 0.001  # so the test can tell


def two_sample_p(ours: list, theirs: list) -> float:
    """p of a chi-square test of two samples of categories; those seen less than ten times are one."""
    common = [c for c in set(ours + theirs) if (ours + theirs).count(c) >= 10]
    table = np.array([[sample.count(c) for c in common] for sample in (ours, theirs)])
    rare = np.array([[len(ours)], [len(theirs)]]) - table.sum(axis=1, keepdims=True)
    table = np.hstack([table, rare]) if rare.any() else table
    return float(chi2_contingency(table).pvalue) if table.shape[1] > 1 else 1.0


def test_a_piece_depends_on_its_number_not_on_those_beside_it(model: NotaGen):
    together = drawn(model, PROMPTS, max_tokens=64)
    alone = [next(PatchSampler(model, replace(AS_THE_AUTHORS, max_tokens=64))([p], (0,), i)) for i, p in
             enumerate(PROMPTS)]  # fmt: skip
    assert [piece.text for piece in together] == [piece.text for piece in alone]
    assert [piece.text for piece in drawn(model, PROMPTS, seed=1, max_tokens=64)] != [p.text for p in together]


def test_sixteen_steps_without_a_look_draw_what_rows_that_leave_draw(model: NotaGen):
    """The loop a GPU records, beside that of a CPU."""
    settings = replace(AS_THE_AUTHORS, temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    told = torch.randn(24, TINY.hidden, generator=generator)
    uniform = torch.rand(24, 16, generator=generator)
    given = torch.full((24, 16), DRAW)
    given[3, :4] = torch.tensor(list(b"[r:0"))

    def recorder(job):
        """In place of a recording: what is replayed is the job."""
        result = job()

        class Graph:
            def replay(self) -> None:
                result.copy_(job())

        return Graph(), result

    with torch.inference_mode():
        eager = CharLoop(model, settings)
        fixed = CharLoop(model, settings, 24, recorder)
        expected = eager(told, uniform, given)
        assert torch.equal(fixed(told, uniform, given), expected)
        assert torch.equal(fixed(told[:5], uniform[:5], given[:5]), expected[:5])  # fewer rows than were recorded
    ended = (expected == 2).any(1)
    assert ended.any()
    assert not ended.all()
    assert bytes(expected[3, :4].tolist()) == b"[r:0"


def test_the_body_begins_with_bar_0():
    """Of a network that writes countdowns whatever it is told."""
    model = random_model(NotaGenSize(1, 1, 64, 12))
    with torch.no_grad():
        char = model.char_level_decoder.network
        char.wpe.weight.zero_()
        for place, letter in enumerate("[r:7"):  # each place has a direction of its own, which is that letter's
            char.wpe.weight[place, place] = 40.0
            char.wte.weight[ord(letter)].zero_()[place] = 10.0
    (piece,) = drawn(model, [encode_prompt(["K:C"])], max_tokens=48, top_k=1)
    assert piece.text.startswith(f"K:C\n{COUNTDOWN}0/")
    assert f"{COUNTDOWN}7" in piece.text  # only the first is given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_that_has_learnt_a_tune_plays_it_and_ends(dtype: torch.dtype):
    """The way from training log-probs to text: nothing between them is a character off."""
    tune = "K:C\n[r:0/1][V:1]CDEF|\n[r:1/0][V:1]G4|]\n"
    (piece,) = drawn(learnt(tune).to(dtype), [encode_prompt([])], temperature=0.5)
    assert piece.text == tune
    assert piece.complete


def test_a_full_context_goes_on_from_the_header_and_the_last_bars():
    bars = "".join(f"[r:{i}/{9 - i}][V:1]CDEF|\n" for i in range(10))
    size = NotaGenSize(1, 1, 64, 14)
    model = random_model(size, scale=3.0)
    (piece,) = drawn(model, [encode_prompt(["K:C", *bars.splitlines()[:5]])], max_tokens=16 * 40)
    assert len(piece.text) > len(decode(piece.patches))  # longer than the context
    assert piece.text.startswith("K:C\n" + bars[:50])
    assert decode(piece.patches).startswith("K:C\n[r:")
    assert len(piece.patches) <= 14


def test_pieces_end_at_the_limit(model: NotaGen):
    for piece in drawn(model, PROMPTS, max_tokens=33):
        prompt = PROMPTS[piece.index]
        assert len(piece.patches) <= len(prompt) + 3 + piece.complete
        assert piece.complete or len(piece.patches) == len(prompt) + 3


def test_what_cannot_be_drawn_is_said(model: NotaGen):
    with pytest.raises(UserError, match="leaves nothing to draw, the context is 12"):
        drawn(model, [np.zeros((12, 16), np.uint8)])
    broken = random_model(TINY)
    with torch.no_grad():
        broken.char_level_decoder.network.ln_f.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="no longer finite"):
        drawn(broken, PROMPTS)
