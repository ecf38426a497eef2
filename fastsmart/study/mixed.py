"""The statistics of a listening test: a difference with listeners and prompts as crossed random effects, and power.

What is analysed is a difference a listener made on a prompt: the rating of one policy's clip minus that of the other's,
or +1, 0, -1 for one policy chosen, neither, the other. Listeners' general mildness, prompts' general appeal and any
liking of a listener for a prompt cancel in it. What remains is

    difference[i, j] = effect + listener[i] + clips[j] + residual[i, j]

listener[i] is a by-listener slope of the policy: tastes for a policy differ (Barr, Levy, Scheepers and Tily 2013,
"Random effects structure for confirmatory hypothesis testing: keep it maximal"). clips[j] is what the two policies
happened to play on prompt j (Clark 1973, "The language-as-fixed-effect fallacy"), so a result speaks of the policies.

Variances come from the analysis of variance: Henderson's method III (1953) where answers are missing, REML where none
is. A variance estimated below 0 is 0 and its degrees of freedom go to the residual. The effect is the generalised
least squares mean. Its p value and interval are by parametric bootstrap of its estimated variance (Halekoh and
Højsgaard 2014, `PBmodcomp`): with few listeners a normal quantile is too sure, and Satterthwaite's too timid where a
variance is near 0.

Shape letters: L listeners, P prompts, B bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special, stats

from fastsmart.errors import UserError
from fastsmart.music.bootstrap import LEVEL

DRAWS = 512  # of the bootstrap; near .05, p moves by a twentieth of itself from seed to seed
# The bootstrap draws from variances at the upper ends of their one-sided intervals of level 1 - PLAUSIBLE, little above
# the estimates. At .5, the level of a test at .05 is up to .063 with 8 listeners; at .3, down to .032 where nothing
# differs; docs/listening.md has the level at .4.
PLAUSIBLE = 0.4
POWER_DRAWS = 256  # tests simulated for a power, each judged by as many bootstrap draws
NODES = 24  # of the quadrature over normal effects
Variances = tuple[np.ndarray, np.ndarray, np.ndarray]  # of listeners, of clips, of what is left


@dataclass(frozen=True)
class Effect:
    """A mean difference, with its interval of level `LEVEL` and its two-sided p value.

    error  : standard error
    pairs  : differences it rests on
    spread : standard deviation of the difference over "listener", over "clips" and of what is left, "residual"
    """

    estimate: float
    error: float
    low: float
    high: float
    p: float
    listeners: int
    prompts: int
    pairs: int
    spread: dict[str, float]


@dataclass(frozen=True)
class Layout:
    """Differences that there are: `given`, bool [L, P], at least one in every row and column."""

    given: np.ndarray

    @property
    def by_listener(self) -> np.ndarray:
        return self.given.sum(1)

    @property
    def by_prompt(self) -> np.ndarray:
        return self.given.sum(0)

    @property
    def freedom(self) -> tuple[int, int, int]:
        """Degrees of freedom of listeners, of prompts and of the residual, with every listener linked to the others."""
        listeners, prompts = self.given.shape
        return listeners - 1, prompts - 1, int(self.given.sum()) - listeners - prompts + 1

    def sums(self, rows: np.ndarray, columns: np.ndarray, squares: np.ndarray) -> dict[str, np.ndarray]:
        """Sums of squares of B sets of differences: of each factor alone, of each after the other, of the residual.

        rows, columns : sums by listener [B, L] and by prompt [B, P]
        squares       : sum of squares [B]
        """
        link = self.given / self.by_listener[:, None]
        inner = np.linalg.pinv(np.diag(self.by_prompt.astype(float)) - self.given.T @ link)
        rest = columns - rows @ link
        mean = rows.sum(1) ** 2 / self.given.sum()
        listener = (rows**2 / self.by_listener).sum(1) - mean
        prompt = (columns**2 / self.by_prompt).sum(1) - mean
        both = listener + ((rest @ inner) * rest).sum(1)
        return {
            "listener": listener,
            "prompt": prompt,
            "listener after prompt": both - prompt,
            "prompt after listener": both - listener,
            "residual": np.maximum(squares - mean - both, 0.0),
        }

    def variances(self, sums: Mapping[str, np.ndarray]) -> Variances:
        """Variances from sums of squares, [B] each, none below 0."""
        n, (for_l, for_p, left) = self.given.sum(), self.freedom
        of_l, of_p, residual = sums["listener after prompt"], sums["prompt after listener"], sums["residual"]
        # a factor whose mean square is below the residual's leaves the model, and what is left is the other alone
        without_l, without_p = (of_l + residual) / (for_l + left), (of_p + residual) / (for_p + left)
        listeners, prompts = self.given.shape
        full = residual / left
        both = (of_l / for_l >= full) & (of_p / for_p >= full)
        prompt_only = ~both & (of_l / for_l < full) & (sums["prompt"] / for_p >= without_l)
        listener_only = ~both & ~prompt_only & (of_p / for_p < full) & (sums["listener"] / for_l >= without_p)
        nothing = (of_l + sums["prompt"] + residual) / (n - 1)
        cases = [both, prompt_only, listener_only]
        left_over = np.select(cases, [full, without_l, without_p], nothing)
        alone_l = (sums["listener"] - for_l * left_over) / (n - (self.by_listener**2).sum() / n)
        alone_p = (sums["prompt"] - for_p * left_over) / (n - (self.by_prompt**2).sum() / n)
        of_listeners = np.select(cases, [(of_l - for_l * full) / (n - prompts), 0.0, alone_l], 0.0)
        of_clips = np.select(cases, [(of_p - for_p * full) / (n - listeners), alone_p, 0.0], 0.0)
        return np.maximum(of_listeners, 0.0), np.maximum(of_clips, 0.0), left_over

    def plausible(self, sums: Mapping[str, np.ndarray], found: Variances) -> Variances:
        """Variances [B] at the upper ends of their one-sided intervals, from sums of squares and what was found."""
        (for_l, for_p, left), n = self.freedom, self.given.sum()
        listeners, prompts = self.given.shape
        high_l, high_p = 1 / stats.f.ppf(PLAUSIBLE, [for_l, for_p], left)
        of_listeners = (high_l * sums["listener after prompt"] - for_l * found[2]) / (n - prompts)
        of_clips = (high_p * sums["prompt after listener"] - for_p * found[2]) / (n - listeners)
        return np.maximum(of_listeners, found[0]), np.maximum(of_clips, found[1]), found[2]

    def weights(self, variances: Variances) -> np.ndarray:
        """Weights [L, P] of the generalised least squares mean, which sum to 1."""
        of_l, of_p, residual = (float(v[0]) for v in variances)
        listeners, _ = self.given.shape
        if residual <= 0:
            return self.given / self.given.sum()
        counts = np.block(
            [
                [np.diag(self.by_listener.astype(float)), self.given.astype(float)],
                [self.given.T.astype(float), np.diag(self.by_prompt.astype(float))],
            ]
        )
        scale = np.sqrt(np.r_[np.full(listeners, of_l), np.full(len(self.by_prompt), of_p)])
        equations = scale[:, None] * counts * scale + residual * np.eye(len(counts))
        shrunk = scale * np.linalg.solve(equations, scale * np.r_[self.by_listener, self.by_prompt])
        weights = self.given * (1 - shrunk[:listeners, None] - shrunk[listeners:])
        return weights / weights.sum()


def crossed_mean(differences: np.ndarray) -> Effect:
    """The mean difference between two policies with listeners and prompts as crossed random effects.

    differences : float [L, P], NaN where a listener did not judge both

    Raises UserError where fewer than two listeners, fewer than two prompts or too few differences are left, or all
    of them are 0.
    """
    given = np.isfinite(differences)
    given_l, given_p = given.any(1), given.any(0)
    differences, given = differences[given_l][:, given_p], given[given_l][:, given_p]
    layout = Layout(given)
    if min(given.shape) < 2 or layout.freedom[2] < 1:
        raise UserError(
            f"{int(given.sum())} comparisons by {given.shape[0]} listeners on {given.shape[1]} prompts are too few for "
            "a test; collect more, from at least two listeners on at least two prompts"
        )
    filled = np.where(given, differences, 0.0)
    if not filled.any():
        raise UserError("all answers are equal, so there is no difference to test; collect more")
    sums = layout.sums(filled.sum(1)[None], filled.sum(0)[None], (filled**2).sum()[None])
    found = layout.variances(sums)
    weights = layout.weights(found)
    shares = np.array([(weights.sum(1) ** 2).sum(), (weights.sum(0) ** 2).sum(), (weights**2).sum()])
    estimate, variance = (
        float((weights * filled).sum()),
        float(sum(s * v[0] for s, v in zip(shares, found, strict=True))),
    )
    spread = {name: float(np.sqrt(v[0])) for name, v in zip(("listener", "clips", "residual"), found, strict=True)}
    common = {"listeners": given.shape[0], "prompts": given.shape[1], "pairs": int(given.sum()), "spread": spread}
    if variance <= 1e-12 * estimate**2:  # nothing varies: what is left is that all signs agree
        return Effect(estimate, 0.0, estimate, estimate, 2.0 ** (1 - min(given.shape)), **common)
    drawn_from = layout.plausible(sums, found)
    ratio = np.sqrt(_bootstrapped(layout, drawn_from, shares) / _weighted(shares, drawn_from))
    half = float(_critical(ratio[None])[0] * np.sqrt(variance))
    p = float(_tail(ratio, abs(estimate) / np.sqrt(variance)))
    return Effect(estimate, float(np.sqrt(variance)), estimate - half, estimate + half, p, **common)


def _bootstrapped(layout: Layout, variances: Variances, shares: np.ndarray) -> np.ndarray:
    """The variance of the mean as B simulated tests of this layout estimate it, [B]."""
    if layout.given.all():
        return _weighted(shares, layout.variances(_balanced(layout, variances, _chi_squared(layout.freedom, DRAWS, 0))))
    normal_l, normal_p, residuals = _normal(layout.given.shape)
    residuals = residuals * layout.given
    rows, columns = np.einsum("bij->bi", residuals), np.einsum("bij->bj", residuals)  # three times as fast as sum
    squares = np.einsum("bij,bij->b", residuals, residuals)
    s, c, e = (float(np.sqrt(v[0])) for v in variances)
    n_l, n_p = layout.by_listener, layout.by_prompt
    given: np.ndarray = layout.given.astype(float)
    all_squares = (
        s**2 * (normal_l**2 @ n_l)
        + c**2 * (normal_p**2 @ n_p)
        + e**2 * squares
        + 2 * s * c * ((normal_l @ given) * normal_p).sum(1)
        + 2 * s * e * (normal_l * rows).sum(1)
        + 2 * c * e * (normal_p * columns).sum(1)
    )
    all_rows = s * normal_l * n_l + c * normal_p @ given.T + e * rows
    all_columns = c * normal_p * n_p + s * normal_l @ given + e * columns
    return _weighted(shares, layout.variances(layout.sums(all_rows, all_columns, all_squares)))


@lru_cache(maxsize=2)
def _normal(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standard normal draws, the same for every test of a shape: of listeners [B, L], clips [B, P], rest [B, L, P]."""
    random = np.random.default_rng(0)
    normal_l, normal_p = random.standard_normal((DRAWS, shape[0])), random.standard_normal((DRAWS, shape[1]))
    return normal_l, normal_p, random.standard_normal((DRAWS, *shape), np.float32)


@lru_cache(maxsize=8)
def _chi_squared(freedom: tuple[int, int, int], draws: int, seed: int) -> np.ndarray:
    """Sums of squares of listeners, of prompts and of what is left, for variances of 1, [3, draws]; quasi-random."""
    points = stats.qmc.Sobol(3, rng=np.random.default_rng(seed)).random(draws)
    return np.stack([stats.chi2.ppf(points[:, k], df) for k, df in enumerate(freedom)])


def _balanced(layout: Layout, variances: Variances, drawn: np.ndarray) -> dict[str, np.ndarray]:
    """Sums of squares of tests without gaps, [N, B] flattened, for variances [N] and draws [3, B]."""
    (listeners, prompts), (of_l, of_p, left) = layout.given.shape, variances
    scales = np.stack([left + prompts * of_l, left + listeners * of_p, left])
    of_listeners, of_prompts, residual = (scales[:, :, None] * drawn[:, None]).reshape(3, -1)
    return {
        "listener": of_listeners,
        "prompt": of_prompts,
        "listener after prompt": of_listeners,  # the order of the factors does not matter
        "prompt after listener": of_prompts,
        "residual": residual,
    }


def _weighted(shares: np.ndarray, variances: Variances) -> np.ndarray:
    """The variance of a mean in which each of three variances has such a share, [B]."""
    of_l, of_p, residual = variances
    return shares[0] * of_l + shares[1] * of_p + shares[2] * residual


def _tail(ratio: np.ndarray, t: np.ndarray | float) -> np.ndarray:
    """Chance [...] of a standardised difference beyond t [...] for estimated over true errors `ratio` [..., B]."""
    return special.erfc(ratio * np.asarray(t)[..., None] / np.sqrt(2)).mean(-1)


def _critical(ratio: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """The t [N] that a difference of nought passes with chance 1 - level, for `ratio` [N, B]; by bisection."""
    low, high = np.zeros(len(ratio)), np.full(len(ratio), 64.0)
    for _ in range(30):
        middle = (low + high) / 2
        beyond = _tail(ratio, middle) > 1 - level
        low, high = np.where(beyond, middle, low), np.where(beyond, high, middle)
    return (low + high) / 2


def sign_test(won: int, lost: int) -> float:
    """Two-sided p value that the two are chosen equally often; ties are left out beforehand. NaN without choices."""
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else float("nan")


def crossed_power(
    effect: float, spread: Mapping[str, float], listeners: int, prompts: int, level: float = LEVEL
) -> float:
    """Chance that `crossed_mean` finds a mean difference of `effect`, every listener judging both on every prompt.

    spread : standard deviations of the difference, as in `Effect.spread`

    Mean squares of simulated tests are drawn from their chi-squared laws (fixed seed), each test is judged as
    `crossed_mean` would, and the chance of its mean is exact. Raises UserError for fewer than two listeners or prompts.
    """
    s2, c2, e2 = (spread[name] ** 2 for name in ("listener", "clips", "residual"))
    variance = s2 / listeners + c2 / prompts + e2 / (listeners * prompts)
    if min(listeners, prompts) < 2:
        raise UserError(
            f"{listeners} listeners and {prompts} prompts are too few for a test; have at least two of each"
        )
    if variance == 0:
        return float(effect != 0)
    layout, shares = (
        Layout(np.ones((listeners, prompts), bool)),
        1 / np.array([listeners, prompts, listeners * prompts]),
    )
    truth = np.array([s2]), np.array([c2]), np.array([e2])
    sums = _balanced(layout, truth, _chi_squared(layout.freedom, POWER_DRAWS, 1))
    found = layout.variances(sums)
    said, drawn_from = _weighted(shares, found), layout.plausible(sums, found)
    again = layout.variances(_balanced(layout, drawn_from, _chi_squared(layout.freedom, POWER_DRAWS, 2)))
    ratio = np.sqrt(_weighted(shares, again).reshape(POWER_DRAWS, -1) / _weighted(shares, drawn_from)[:, None])
    threshold = _critical(ratio, level) * np.sqrt(said / variance)
    shift = abs(effect) / np.sqrt(variance)
    return float((stats.norm.sf(threshold - shift) + stats.norm.cdf(-threshold - shift)).mean())


def rating_power(
    effect: float, spread: Mapping[str, float], listeners: int, prompts: int, level: float = LEVEL
) -> float:
    """Chance that a difference of `effect` points is found, when every listener rates both policies on every prompt.

    spread : standard deviations of one rating: "taste" of a listener for a policy, "clip" of a policy on a prompt, and
             "residual"; a difference of two ratings has twice each variance
    """
    doubled = {"listener": "taste", "clips": "clip", "residual": "residual"}
    of_pair = {name: float(np.sqrt(2) * spread[key]) for name, key in doubled.items()}
    return crossed_power(effect, of_pair, listeners, prompts, level)


def choice_power(
    preference: float, spread: Mapping[str, float], listeners: int, prompts: int, level: float = LEVEL
) -> float:
    """Chance that a preference is found, when every listener chooses one of two on every prompt.

    preference : chance that the one policy is chosen, over all listeners and prompts
    spread     : standard deviations of the log-odds: "taste" over listeners, "clip" over pairs of clips (a mixed
                 logistic model without ties)
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    weights = weights / weights.sum()
    effects = spread["taste"] * nodes[:, None] + spread["clip"] * nodes

    def chances(log_odds: float) -> np.ndarray:
        return special.expit(log_odds + effects)

    high = 40.0 + 8 * (spread["taste"] + spread["clip"])
    low = -high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if weights @ chances(middle) @ weights < preference else (low, middle)
    chance = chances((low + high) / 2)
    of_listeners, of_clips = chance @ weights, weights @ chance
    s2 = float(weights @ (2 * of_listeners - 1) ** 2 - (2 * preference - 1) ** 2)
    c2 = float(weights @ (2 * of_clips - 1) ** 2 - (2 * preference - 1) ** 2)
    e2 = 1 - (2 * preference - 1) ** 2 - s2 - c2
    of_choice = {"listener": s2, "clips": c2, "residual": e2}
    of_choice = {name: float(np.sqrt(max(v, 0.0))) for name, v in of_choice.items()}
    return crossed_power(2 * preference - 1, of_choice, listeners, prompts, level)
