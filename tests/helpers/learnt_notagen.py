"""A tiny NotaGen that has learnt one tune by heart."""

from __future__ import annotations

import numpy as np
import torch

from fastsmart.notagen.model import NotaGen, NotaGenSize
from fastsmart.notagen.patches import encode
from fastsmart.notagen.weights import random_model


def learnt(tune: str, steps: int = 120, max_patches: int = 32) -> NotaGen:
    """One layer a level, 64 wide, trained on the log-probs of the tune alone."""
    model = random_model(NotaGenSize(1, 1, 64, max_patches))
    patches = torch.from_numpy(encode(tune).astype(np.int64))[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (-model(patches).sum()).backward()
        optimizer.step()
    return model.eval()
