"""The statistics of a listening test: mixed models with listeners and prompts as crossed random effects, and power.

Ratings go into a linear mixed model (statsmodels' MixedLM, REML), choices between two into a mixed logistic model
(statsmodels' BinomialBayesMixedGLM, Laplace approximation) and a sign test (SciPy). Listeners and prompts are both
samples of what could have been asked (Clark 1973, "The language-as-fixed-effect fallacy"); with `clip` as a third
effect, so is what a policy happened to play on a prompt, which is what lets a result speak of the policy.

Shape letters: L listeners, P prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from fastsmart.errors import UserError
from fastsmart.music.bootstrap import LEVEL

if TYPE_CHECKING:
    import pandas as pd

EFFECTS = ("listener", "prompt")
Z = float(stats.norm.ppf(0.5 + LEVEL / 2))


@dataclass(frozen=True)
class Effect:
    """A fixed effect with its standard error; interval of level `LEVEL` and two-sided p value are by normal theory."""

    estimate: float
    error: float

    @property
    def low(self) -> float:
        return self.estimate - Z * self.error

    @property
    def high(self) -> float:
        return self.estimate + Z * self.error

    @property
    def p(self) -> float:
        return float(2 * stats.norm.sf(abs(self.estimate) / self.error)) if self.error > 0 else float("nan")


@dataclass(frozen=True)
class MixedResult:
    """A fitted mixed model.

    intercept : mean of the base (ratings), or log-odds of the other being chosen (choices)
    effects   : difference to the base for every other policy
    spread    : standard deviation of each random effect, and of what is left as "residual" (ratings only)
    converged : whether the optimiser said so
    """

    intercept: Effect
    effects: dict[str, Effect]
    spread: dict[str, float]
    converged: bool


def linear_mixed(table: pd.DataFrame, base: str, random: Sequence[str] = EFFECTS) -> MixedResult:
    """rating ~ policy with crossed random intercepts, by REML.

    table  : columns `rating`, `policy` and those of `random`, a row a rating
    base   : the policy others are compared with

    Raises UserError when statsmodels is missing, there are too few ratings, or all are equal.
    """
    formula_api = _statsmodels("statsmodels.formula.api")
    others = [policy for policy in dict.fromkeys(table["policy"]) if policy != base]
    if len(table) < len(others) + len(random) + 2:
        raise UserError(f"{len(table)} ratings are too few for a mixed model; collect more")
    if table["rating"].nunique() == 1:
        raise UserError("all ratings are equal, so there is no difference to model; collect more")
    design = table.assign(
        everyone=1, **{f"effect{k}": (table["policy"] == policy).astype(float) for k, policy in enumerate(others)}
    )
    model = formula_api.mixedlm(
        " + ".join(["rating ~ 1", *(f"effect{k}" for k in range(len(others)))]),
        design,
        groups="everyone",
        re_formula="0",
        vc_formula={name: f"0 + C({name})" for name in random},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance of 0 is a result like any other
        fit = model.fit(reml=True, method=["lbfgs", "powell"])
    spread = {name: float(np.sqrt(v)) for name, v in zip(model.exog_vc.names, fit.vcomp, strict=True)}
    found = [Effect(float(fit.fe_params.iloc[k]), float(fit.bse_fe.iloc[k])) for k in range(len(others) + 1)]
    spread = {name: spread[name] for name in random} | {"residual": float(np.sqrt(fit.scale))}
    return MixedResult(found[0], dict(zip(others, found[1:], strict=True)), spread, bool(fit.converged))


def logistic_mixed(table: pd.DataFrame, random: Sequence[str] = EFFECTS) -> MixedResult:
    """won ~ 1 with crossed random intercepts: log-odds that the other policy is chosen over the base.

    table : columns `won` (0 or 1) and those of `random`, a row a choice without ties

    Bayesian, with statsmodels' default priors (normal, standard deviation 2 for the log-odds and 1 for the log of each
    random effect's standard deviation); the estimate is the posterior mode, the error that of its Laplace
    approximation. Raises UserError when statsmodels is missing or there is no choice.
    """
    if not len(table):
        raise UserError("there is no choice to analyse: every answer was 'no preference'")
    glm = _statsmodels("statsmodels.genmod.bayes_mixed_glm")
    model = glm.BinomialBayesMixedGLM.from_formula("won ~ 1", {name: f"0 + C({name})" for name in random}, table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = model.fit_map()
    spread = {name: float(np.exp(v)) for name, v in zip(model.vcp_names, fit.vcp_mean, strict=True)}
    return MixedResult(Effect(float(fit.fe_mean[0]), float(fit.fe_sd[0])), {}, spread, True)


def sign_test(won: int, lost: int) -> float:
    """Two-sided p value that the two are chosen equally often; ties are left out beforehand. NaN without choices."""
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else float("nan")


def rating_power(
    effect: float, spread: Mapping[str, float], listeners: int, prompts: int, level: float = LEVEL
) -> float:
    """Chance that a difference of `effect` is found, when every listener rates both policies on every prompt.

    In such a balanced design the intercepts of listeners and prompts cancel and the difference has the variance
    2 clip^2 / P + 2 residual^2 / (L P) (Westfall, Kenny and Judd 2014, "Statistical power and optimal design in
    experiments in which samples of participants respond to samples of stimuli", for stimuli nested in conditions).

    spread : standard deviations "residual" and, where clips are a random effect, "clip"; others play no part
    """
    variance = 2 * spread.get("clip", 0.0) ** 2 / prompts + 2 * spread["residual"] ** 2 / (listeners * prompts)
    if variance == 0:
        return float(effect != 0)
    z, shift = stats.norm.ppf(0.5 + level / 2), abs(effect) / np.sqrt(variance)
    return float(stats.norm.sf(z - shift) + stats.norm.cdf(-z - shift))


def choice_power(preference: float, listeners: int, prompts: int, level: float = LEVEL) -> float:
    """Chance that the sign test finds a preference (a probability other than 0.5), choices taken as independent."""
    n = listeners * prompts
    wins = np.arange(n + 1)
    tail = stats.binom.cdf(np.minimum(wins, n - wins), n, 0.5)
    found = 2 * tail <= 1 - level
    return float(stats.binom.pmf(wins, n, preference)[found].sum())


def _statsmodels(module: str):
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"the analysis needs statsmodels ({error}); install it with: pip install statsmodels"
        ) from error
