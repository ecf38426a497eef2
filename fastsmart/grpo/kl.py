"""Single-sample estimators of KL(policy ‖ reference) from log-probs (Schulman 2020, joschu.net/blog/kl-approx.html).

With x sampled from the policy and r = reference(x) / policy(x):

| estimator | value         | expectation of the value | expectation of the gradient as a loss term           |
|-----------|---------------|--------------------------|------------------------------------------------------|
| k1        | −log r        | KL(policy ‖ reference)   | 0: only noise; it is meant for rewards and metrics   |
| k2        | (log r)² / 2  | biased, close to the KL  | that of KL(policy ‖ reference)                       |
| k3        | r − 1 − log r | KL(policy ‖ reference)   | that of KL(reference ‖ policy), the other direction  |

(the last column: Tang and Munos, arXiv 2506.09477). Multiplied by the importance ratio policy / sampler, with its
gradient, k1 and k3 both get value *and* gradient of KL(policy ‖ reference), on and off policy (DeepSeek-V3.2, arXiv
2512.02556); see `LossSettings.kl_ratio`. Per token, all of them ignore how a token changes the tokens after it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def k1(log_r: Tensor) -> Tensor:
    """−log r: unbiased, of either sign, high variance."""
    return -log_r


def k2(log_r: Tensor) -> Tensor:
    """(log r)² / 2: biased, never negative, low variance."""
    return 0.5 * log_r.square()


def k3(log_r: Tensor) -> Tensor:
    """r − 1 − log r: unbiased, never negative, low variance; the KL term of GRPO (arXiv 2402.03300, equation 4)."""
    return torch.expm1(log_r) - log_r


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_divergence(logprob: Tensor, reference: Tensor, estimator: str = "k3", clamp: float | None = None) -> Tensor:
    """Estimate KL(policy ‖ reference) for each token sampled from the policy.

    logprob, reference: log-probs of the sampled tokens under the two, same shape, which is the result's; gradients flow
    to `logprob` as the table above says. With `clamp`, log r is limited to ±clamp: a token the policy has all but given
    up (r → ∞) then costs at most exp(clamp), and passes no gradient while it is beyond the limit. `estimator` is a key
    of `ESTIMATORS`.
    """
    log_r = reference - logprob
    if clamp is not None:
        log_r = log_r.clamp(-clamp, clamp)
    return ESTIMATORS[estimator](log_r)
