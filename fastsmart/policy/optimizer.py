"""AdamW over a policy, its learning-rate schedule, and its state as named tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsmart.policy.transformer import Policy

_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(
    policy: Policy, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused; matrices decay, norms and embeddings do not.

    On a GPU its learning rate is a tensor there, so that a step can be part of a CUDA graph.
    """
    decayed = [p for n, p in policy.named_parameters() if p.dim() == 2 and "proj" in n]
    plain = [p for n, p in policy.named_parameters() if not (p.dim() == 2 and "proj" in n)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if policy.device.type != "cuda":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    rate = torch.tensor(learning_rate, dtype=torch.float32, device=policy.device)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True, capturable=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def step_if_finite(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> None:
    """One step of a fused optimizer, which leaves weights and state as they are where the norm is not finite.

    The device decides: nobody waits for it, as with torch.amp.GradScaler, whose way of saying so this is.
    """
    optimizer.found_inf = (~grad_norm.isfinite()).to(torch.float32)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
    # the fused step leaves versions as they were, by which copies of the weights are known to be old
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])


def scheduled_rate(step: int, steps: int, peak: float, schedule: str, warmup: int = 0, floor: float = 0.0) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up, then `linear`, `cosine` or `constant` towards `floor`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(steps - warmup, 1)
    share = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))}[
        schedule
    ]
    return floor + (peak - floor) * max(share, 0.0)


def moments(name: str, shape: torch.Size) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that `optimizer_tensors` gives for a parameter after its first step."""
    return {f"{name}.{moment}": shape for moment in _MOMENTS} | {f"{name}.step": torch.Size([1])}


@torch.no_grad()
def forget_moments(optimizer: torch.optim.Optimizer) -> None:
    """Put an AdamW back to where it was before its first step."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def optimizer_tensors(optimizer: torch.optim.Optimizer, policy: Policy) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `<parameter>.<moment>`; empty before its first step."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in policy.named_parameters():
        state = optimizer.state.get(parameter, {})
        if state:
            tensors |= {f"{name}.{moment}": state[moment] for moment in _MOMENTS}
            tensors[f"{name}.step"] = torch.as_tensor(state["step"], dtype=torch.float32).reshape(1)
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, policy: Policy, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; a state without tensors is that of an optimizer before its first step."""
    if not tensors:
        return
    for name, parameter in policy.named_parameters():
        state = {moment: tensors[f"{name}.{moment}"].to(parameter.device) for moment in _MOMENTS}
        optimizer.state[parameter] = {**state, "step": tensors[f"{name}.step"].reshape(()).to(parameter.device)}
