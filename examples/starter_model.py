"""Shape of the starter model, and its files on disk: written whole or not at all."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from examples.starter_tokenizer import PAD, TURN_END, save_tokenizer

CONTEXT_TOKENS = 2048


def starter_config(tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=704,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(TURN_END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


def save_starter(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write bf16 weights, configuration and tokenizer into `directory`, each file replaced in one step."""
    directory.mkdir(parents=True, exist_ok=True)
    shipped = LlamaForCausalLM(model.config)
    shipped.load_state_dict(model.state_dict())
    shipped.to(torch.bfloat16)
    shipped.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    with TemporaryDirectory(dir=directory) as temporary:
        shipped.save_pretrained(temporary)
        save_tokenizer(tokenizer, Path(temporary), CONTEXT_TOKENS)
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, directory / file.name)
