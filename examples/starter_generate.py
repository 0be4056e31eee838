"""Greedy answers for many prompts at once, through transformers' own generation."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

from examples.grammars.common import Message
from examples.starter_data import render_prompt
from examples.starter_tokenizer import PAD, TURN_END

MAX_NEW_TOKENS = 160


@torch.inference_mode()
def greedy_answers(
    model: Any,  # noqa: ANN401 - a transformers or PEFT model; neither ships types
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    batch_size: int = 64,
) -> list[str]:
    """The model's greedy answer to each prompt, in order. Prompts are left-padded and grouped by length."""
    pad, end = tokenizer.token_to_id(PAD), tokenizer.token_to_id(TURN_END)
    encoded = [tokenizer.encode(render_prompt(messages)).ids for messages in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    answers = [""] * len(prompts)
    model.eval()
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        length = max(len(encoded[index]) for index in group)
        ids = torch.tensor([[pad] * (length - len(encoded[i])) + encoded[i] for i in group])
        mask = torch.tensor([[0] * (length - len(encoded[i])) + [1] * len(encoded[i]) for i in group])
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=pad,
        )
        for index, row in zip(group, output[:, length:].tolist(), strict=True):
            answers[index] = tokenizer.decode(row[: row.index(end)] if end in row else row, skip_special_tokens=False)
    return answers
