"""Policies to measure with: of any size, and playing real music, so that what follows the sampler has real work."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastsmart.policy.hf_format import load_policy
from fastsmart.policy.transformer import Policy, PolicySize

PAPER = PolicySize(413, 512, 2048, 4, 8, 8)  # of the paper's main run, 17.2 M parameters
PLAYED = "pop909-tiny"  # a 413-token policy of 4 layers, 256 wide, 768 feed-forward, 4 heads of 64


@torch.no_grad()
def playing_policy(size: PolicySize = PAPER, seed: int = 0) -> Policy:
    """The shipped policy inside a larger one, which gives the same log-probs at the cost of its own size.

    Whatever is larger may be nothing but width, feed-forward units, heads and layers; heads keep their 64 coordinates.
    The new coordinates of the residual stream are zero because nothing writes to them, and what new heads, units and
    layers compute, with fresh random weights, is multiplied by zero on its way back. A mean of squares over more
    coordinates is smaller by the ratio of the widths, which the norms' weights and epsilon make up for.
    """
    small = load_policy(PLAYED)
    own = small.size
    width, units, heads = own.hidden_size, own.intermediate_size, own.num_heads
    if size.head_size != own.head_size or size.num_kv_heads != size.num_heads:
        raise ValueError(f"heads of {size.head_size} coordinates, {own.head_size} are needed, each with its own keys")
    share = width / size.hidden_size
    size = replace(size, rms_norm_eps=own.rms_norm_eps * share, rope_theta=own.rope_theta)
    policy = Policy(size, small.vocab).initialise(torch.Generator().manual_seed(seed))
    norms = [(policy.model.norm, small.model.norm)]
    policy.model.embed_tokens.weight[:, width:] = 0
    policy.model.embed_tokens.weight[:, :width] = small.model.embed_tokens.weight
    policy.lm_head.weight[:, :width] = small.lm_head.weight
    for layer in policy.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for layer, played in zip(policy.model.layers, small.model.layers, strict=False):
        qkv, qkv_played = layer.self_attn.qkv_proj.weight, played.self_attn.qkv_proj.weight
        per_head = (3, -1, own.head_size)  # queries, keys and values, each by head
        qkv.unflatten(0, per_head)[:, :heads, :, :width] = qkv_played.unflatten(0, per_head)
        layer.self_attn.o_proj.weight[:width, :width] = played.self_attn.o_proj.weight
        gate_up, gate_up_played = layer.mlp.gate_up_proj.weight, played.mlp.gate_up_proj.weight
        gate_up.unflatten(0, (2, -1))[:, :units, :width] = gate_up_played.unflatten(0, (2, -1))
        layer.mlp.down_proj.weight[:width, :units] = played.mlp.down_proj.weight
        norms += [
            (layer.input_layernorm, played.input_layernorm),
            (layer.post_attention_layernorm, played.post_attention_layernorm),
        ]
    for norm, norm_played in norms:
        norm.weight[:width] = norm_played.weight * share**0.5
    return policy.eval()
