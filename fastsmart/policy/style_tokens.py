"""Tokens of styles learnt by themselves, so that a policy tells its styles further apart.

Once music is heard its style is hardly a surprise, so next tokens alone teach the token of a style slowly, and a whole
network that is taught to tell styles apart learns its training pieces by heart. Here the embeddings of the styles'
tokens learn and nothing else. Shape letters: S styles, T tokens of a row.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmart.policy.crops import IGNORED, targets
from fastsmart.policy.pretrain import PretrainSettings
from fastsmart.policy.style_crops import style_cropper
from fastsmart.policy.transformer import Policy
from fastsmart.tokens.dataset import TokenDataset
from fastsmart.tokens.labels import Labels

RATE = 3e-2  # of Adam, falling to 0
CONTRAST = 3.0  # weight of telling styles apart beside the next tokens
SHARPNESS = 0.1  # of the nats of a row that tell its style; at 1 most rows of training are sure and teach nothing


def learn_style_tokens(policy: Policy, dataset: TokenDataset, labels: Labels, settings: PretrainSettings) -> Policy:
    """A copy of a policy whose embeddings of styles' tokens have learnt for `settings.style_steps` steps.

    A step reads a row of each style after the token of every style. Its loss is that of the rows after their own, nats
    a token, and `CONTRAST` times how far from sure the policy is which style each is in (the discriminative loss of
    GeDi, Krause et al. 2020, arXiv 2009.06367).

    dataset : that `evened` made
    """
    plain = replace(settings.styles, style_dropped=0.0, composer_kept=0.0)
    train = style_cropper(dataset, labels, "train", settings.crop, plain)
    tokens = torch.tensor([token for _, token in train.tokens.values()], device=settings.device)
    learner = copy.deepcopy(policy).to(settings.device).train().requires_grad_(False)
    weight = learner.model.embed_tokens.weight.requires_grad_()
    learns = torch.zeros(len(weight), 1, device=settings.device)
    learns[tokens] = 1.0
    optimizer = torch.optim.Adam([weight], lr=RATE)
    for step in range(settings.style_steps):
        random = np.random.default_rng([settings.seed, 4, step])
        rows = np.concatenate([train.rows_of(style, random, 1, augment=True) for style in train.tokens])
        with torch.autocast(learner.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            nats, length = _nats_of_rows(learner, rows, tokens, train.pad)
        own = torch.arange(len(tokens), device=settings.device)
        unsure = F.cross_entropy(-SHARPNESS * nats, own, reduction="sum") / SHARPNESS
        ((nats.diagonal().sum() + CONTRAST * unsure) / length).backward()
        assert weight.grad is not None
        weight.grad *= learns
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / settings.style_steps)
        optimizer.step()
        optimizer.zero_grad()
    return learner.requires_grad_(True).eval()


def _nats_of_rows(policy: Policy, rows: np.ndarray, tokens: Tensor, pad: int) -> tuple[Tensor, int]:
    """Nats of row i, of S rows that begin with BOS and a style, after the token of style j, [S, S]; tokens of all rows.

    rows : int64 [S, T + 1]
    """
    inputs, target = (torch.from_numpy(x).to(tokens.device) for x in targets(rows, pad))
    target[:, 0] = IGNORED  # the style is given
    styles = len(tokens)
    asked = inputs.repeat_interleave(styles, 0)
    asked[:, 1] = tokens.repeat(len(rows))
    logits = policy(asked).float()
    losses = F.cross_entropy(
        logits.transpose(1, 2), target.repeat_interleave(styles, 0), ignore_index=IGNORED, reduction="none"
    )
    return losses.sum(1).view(len(rows), styles), int((target != IGNORED).sum())
