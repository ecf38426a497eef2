"""The encoder of text of CLaMP 2 and 3: XLM-R (Conneau et al. 2020, arXiv 1911.02116) through transformers, and a
linear layer. Shape letters: T tokens, D width of the common space."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from fastsmart.errors import UserError
from fastsmart.reward.clamp3.architecture import TEXT_SEGMENT
from fastsmart.reward.clamp3.weights import read_text_state


@torch.inference_mode()
def text_vector(checkpoint: str | Path, model: str | Path, prompt: str) -> np.ndarray:
    """A text in the common space, float32 [D], not of length 1; on the CPU, once a run.

    The mean over tokens, in segments of 128 as those of music; one line, for upstream joins several in a random order.

    checkpoint : of CLaMP 2 or 3; holds all weights
    model      : folder or hub id of the configuration and tokenizer

    Raises UserError when transformers or a file is missing, or the two do not fit.
    """
    state, projection = read_text_state(checkpoint)
    try:
        from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaModel
    except ImportError as error:
        raise UserError(f"clamp_text needs transformers ({error}); pip install 'fastsmart[clap]'") from error
    try:
        config = XLMRobertaConfig.from_pretrained(str(model))
        tokenizer: Any = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
        network = cast(Any, XLMRobertaModel)(config, add_pooling_layer=False)
        network.load_state_dict({name: t for name, t in state.items() if not name.startswith("pooler.")})
    except Exception as error:  # a library of a hundred exceptions; each says more than we could
        reason = " ".join(str(error).split()[:30])
        raise UserError(
            f"the text encoder of {checkpoint} does not fit {model} ({reason}); name a folder with config.json and "
            f"tokenizer.json of FacebookAI/xlm-roberta-base in reward.clamp_text_model"
        ) from error
    tokens = torch.tensor(tokenizer(prompt)["input_ids"])
    starts = list(range(0, len(tokens), TEXT_SEGMENT))
    segments = [tokens[at : at + TEXT_SEGMENT] for at in starts]
    weights = [len(segment) for segment in segments]
    segments[-1] = tokens[-TEXT_SEGMENT:]
    network.eval()
    means = [network(input_ids=segment[None]).last_hidden_state[0].mean(0) for segment in segments]
    vectors = F.linear(torch.stack(means), projection["weight"].float(), projection["bias"].float())
    return np.average(vectors.numpy(), axis=0, weights=weights).astype(np.float32)
