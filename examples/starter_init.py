"""Initial weights that already copy: an induction circuit, written down instead of waited for.

A small model learns to copy names when one head looks at the previous token and a later one looks for earlier places
that followed the current token (Olsson et al. 2022, "In-context Learning and Induction Heads"). Left to chance that
takes most of the training budget here; started this way, random sequences are copied within twenty steps.
"""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

EMBEDDING_STD = 0.1
# One embedding component is the same for every token, so that a head can attend by position alone.
CONSTANT = 4.0
FAST_PAIRS = 12  # rotary pairs that tell the previous token from its neighbours
SLOW_PAIRS = 17  # from here on rotation is small over a prompt, so content decides
INDUCTION_LAYERS = (1, 2)


def start_copying(model: LlamaForCausalLM) -> None:
    """Overwrite embeddings, a previous-token head in layer 0 and induction heads above it; the rest stays random."""
    with torch.no_grad():
        _embeddings(model)
        written, read = _previous_token_head(model)
        for layer in INDUCTION_LAYERS:
            _induction_heads(model, layer, written, read)


def _embeddings(model: LlamaForCausalLM) -> None:
    weight = model.model.embed_tokens.weight
    weight.normal_(0, EMBEDDING_STD)
    weight[:, 0] = CONSTANT * EMBEDDING_STD


def _previous_token_head(model: LlamaForCausalLM) -> tuple[Tensor, Tensor]:
    """Query and key are constants one rotation apart, so the score peaks at distance one.

    Returns the directions [head, hidden] it writes to and the ones it reads the previous token's embedding from.
    """
    attention, hidden, head = model.model.layers[0].self_attn, model.config.hidden_size, _width(model)
    half = head // 2
    angles = 10000.0 ** (-torch.arange(half) / half)
    size = torch.zeros(half)
    size[:FAST_PAIRS] = 1.5
    attention.k_proj.weight[:head] = 0
    attention.k_proj.weight[:half, 0] = size
    written, read = _directions(head, hidden), _directions(head, hidden)
    attention.v_proj.weight[:head] = read
    for query in range(_queries_per_key(model)):
        rows = slice(query * head, (query + 1) * head)
        attention.q_proj.weight[rows] = 0
        attention.q_proj.weight[rows, 0] = torch.cat([size * torch.cos(angles), -size * torch.sin(angles)])
        attention.o_proj.weight[:, rows] = EMBEDDING_STD * written.T / _queries_per_key(model)
    return written, read


def _induction_heads(model: LlamaForCausalLM, layer: int, written: Tensor, read: Tensor) -> None:
    """Keys see the previous token where layer 0 wrote it, queries the current one; values add their own embedding."""
    attention, hidden, head = model.model.layers[layer].self_attn, model.config.hidden_size, _width(model)
    half, shared = head // 2, _queries_per_key(model)
    slow = torch.cat([torch.arange(SLOW_PAIRS, half), torch.arange(half + SLOW_PAIRS, head)])
    for group in range(model.config.num_key_value_heads):
        chosen = torch.randperm(head)[: len(slow)]
        key, query, value = torch.zeros(head, hidden), torch.zeros(head, hidden), _directions(head, hidden)
        key[slow], query[slow] = written[chosen], read[chosen]
        attention.k_proj.weight[group * head : (group + 1) * head] = key
        attention.v_proj.weight[group * head : (group + 1) * head] = value
        for index in range(group * shared, (group + 1) * shared):
            rows = slice(index * head, (index + 1) * head)
            attention.q_proj.weight[rows] = query
            attention.o_proj.weight[:, rows] = EMBEDDING_STD * value.T


def _directions(count: int, hidden: int) -> Tensor:
    """Orthonormal rows, blind to the constant component."""
    rows = torch.empty(count, hidden)
    torch.nn.init.orthogonal_(rows)
    rows[:, 0] = 0
    return rows


def _width(model: LlamaForCausalLM) -> int:
    return int(model.config.hidden_size // model.config.num_attention_heads)


def _queries_per_key(model: LlamaForCausalLM) -> int:
    return int(model.config.num_attention_heads // model.config.num_key_value_heads)
