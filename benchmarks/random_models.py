"""Random-weight models for measuring servers: real shapes, no meaning, and output that never ends early.

    python -m benchmarks.random_models DIR [tiny-bf16 tiny-fp32 small-bf16 small-fp32]

Each directory is a Hugging Face model with a byte-level BPE tokenizer trained on generated words, a chat template, and
`words.json`: strings of exactly one token, so that prompts have exact lengths. End-of-sequence and invisible tokens
have zero output rows, which greedy decoding never chooses: every server streams the same number of visible tokens.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

NAMES = ("tiny-bf16", "tiny-fp32", "small-bf16", "small-fp32")
VOCABULARY = {"tiny": 4096, "small": 32000}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SEED = 0
SPECIAL = ["<|endoftext|>", "<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONSETS = (*"bcdfghjklmnprstvwz", "br", "ch", "cl", "dr", "fl", "gr", "kr", "pl", "pr", "sh", "sk", "st", "th", "tr")
VOWELS = (*"aeiou", "ai", "ea", "io", "ou")
CODAS = ("", "", "", *"lmnrst", "nd", "rk", "st")
POSITIONS = 4096


def main() -> None:
    """Write the models that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="*", default=list(NAMES), metavar="NAME")
    options = parser.parse_args()
    for name in options.names:
        print(ensure_model(options.directory, name), flush=True)


def ensure_model(root: Path, name: str) -> Path:
    """The directory of a model, written now unless it is there. Raises ValueError for a name that is none."""
    if name not in NAMES:
        raise ValueError(f"{name!r} is no model: choose from {', '.join(NAMES)}")
    directory = root / name
    # Written last, so a directory without it is an interrupted write.
    if not (directory / "words.json").exists():
        write_model(directory, name)
    return directory


def write_model(directory: Path, name: str) -> None:
    """Weights, configuration, tokenizer and word list of one model."""
    size, _, precision = name.partition("-")
    tokenizer = make_tokenizer(VOCABULARY[size])
    torch.manual_seed(SEED)
    model = make_weights(size, tokenizer)
    silence(model, tokenizer)
    model = model.to(DTYPES[precision]).eval()
    # Without an end token here, greedy runs of every server reach their token limit.
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, do_sample=False)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "words.json").write_text(json.dumps(one_token_words(tokenizer)))


def make_weights(size: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """tiny: Llama's shape, 6 million parameters; small: Qwen2-0.5B's with fewer tokens, 0.4 billion."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if size == "tiny":
        shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=4096, num_key_value_heads=2, max_position_embeddings=POSITIONS, **shape, **ids)
        )
    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen2Config(
        vocab_size=32000, num_key_value_heads=2, max_position_embeddings=POSITIONS, rope_parameters=rope,
        tie_word_embeddings=True, **shape, **ids,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """GPT-2's kind of byte-level BPE, with exactly `vocabulary` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(generated_text(2 * vocabulary), trainer)
    missing = vocabulary - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<|extra_{index}|>" for index in range(missing)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>",
        clean_up_tokenization_spaces=False, model_max_length=POSITIONS,
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def generated_text(words: int) -> Iterator[str]:
    """Every one of that many made-up words several times, the first ones far more often, as in real text."""
    draw = random.Random(SEED)
    syllables = [onset + vowel + coda for onset in ONSETS for vowel in VOWELS for coda in CODAS]
    known = sorted({"".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(words)})
    draw.shuffle(known)
    for rank, word in enumerate(known):
        yield f" {word}" * (3 + 2000 // (1 + rank))


def one_token_words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Words that are one token each, with the space before them, alone and in a row."""
    spelled = (" " + token[1:] for token in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{2,}", token))
    words = sorted(word for word in spelled if len(tokenizer.encode(word, add_special_tokens=False)) == 1)
    row = random.Random(SEED).choices(words, k=1000)
    if len(tokenizer.encode("".join(row), add_special_tokens=False)) != len(row):
        raise AssertionError("words that are one token alone are more in a row")
    return words


def silence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Zero the output rows of tokens that end or show nothing: their logit is 0, the greatest is more."""
    shown = [tokenizer.decode([token], skip_special_tokens=True) for token in range(model.config.vocab_size)]
    unseen = [token for token, text in enumerate(shown) if not re.fullmatch(r"[ -~]*[!-~][ -~]*", text)]
    with torch.no_grad():
        model.get_output_embeddings().weight[unseen] = 0


if __name__ == "__main__":
    main()
