"""Small files of M3, CLaMP 2 and CLaMP 3 in the published form, and BERT with their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastsmart.reward.clamp3.architecture import CHARACTERS, HEAD, KINDS, SEGMENT, Kind, Size
from fastsmart.reward.clamp3.mtf import PATCH
from fastsmart.reward.clamp3.weights import make_random_weights, random_state

SMALL = Size(width=128, ffn=256, layers=2, out=96)
M3_SMALL = Size(width=128, ffn=256, layers=2, out=128)
WORDS = ("<s>", "<pad>", "</s>", "<unk>", "calm", "nocturne", "for", "piano", "a", "loud", "march")


def kind(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def small(name: str) -> Size:
    return M3_SMALL if name == "M3" else SMALL


def write_small_clamp(path: Path, name: str = "CLaMP 2", seed: int = 0) -> Path:
    return make_random_weights(path, kind(name), seed, small(name))


def write_with_text(path: Path, folder: Path, name: str = "CLaMP 3", width: int = 64) -> Any:
    """A file with an encoder of text and a folder with its configuration and tokenizer; that encoder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = transformers.XLMRobertaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=2 * width,
        max_position_embeddings=140,
        pad_token_id=1,
    )
    config.save_pretrained(folder)
    torch.manual_seed(1)
    text = transformers.XLMRobertaModel(config).eval()
    for parameter in text.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    named = kind(name)
    state = random_state(named, SMALL, 0) | {f"{named.text}.{key}": t for key, t in text.state_dict().items()}
    state |= {f"{named.text_projection}.weight": torch.randn(SMALL.out, width)}
    state |= {f"{named.text_projection}.bias": torch.randn(SMALL.out)}
    torch.save({"model": state, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "modality": "symbolic"}, path)
    return text


def bert_vector(state: dict[str, torch.Tensor], named: Kind, size: Size, patches: Any) -> torch.Tensor:
    """Vector of at most 512 patches by transformers' BertModel over one-hot characters, filled up as upstream does."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // HEAD,
        intermediate_size=size.ffn,
        max_position_embeddings=SEGMENT,
    )
    bert = BertModel(config).eval()
    base = f"{named.music}.base."
    bert.load_state_dict({key.removeprefix(base): t for key, t in state.items() if key.startswith(base)})
    ids = torch.zeros(1, SEGMENT, PATCH, dtype=torch.long)
    ids[0, : len(patches)] = torch.from_numpy(patches).long()
    mask = (torch.arange(SEGMENT) < len(patches)).float()[None]
    one_hot = torch.nn.functional.one_hot(ids, CHARACTERS).flatten(2).float()
    embedding = [state[f"{named.music}.patch_embedding.{part}"] for part in ("weight", "bias")]
    with torch.inference_mode():
        x = torch.nn.functional.linear(one_hot, *embedding)
        hidden = bert(inputs_embeds=x, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if named.music_projection:
            mean = torch.nn.functional.linear(
                mean, *(state[f"{named.music_projection}.{part}"] for part in ("weight", "bias"))
            )
    return mean[0]
