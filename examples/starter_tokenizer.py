"""The starter model's tokenizer: byte-level BPE over the grammars' text, digits one by one, ChatML turns.

House answers are part of the corpus so that corrections tokenise sensibly; the starter model is never trained on them.
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.grammars.common import PLACE_HEADS, PLACE_TAILS, SURNAME_HEADS, SURNAME_TAILS, stream
from examples.grammars.simulate import APPLICATIONS

VOCABULARY = 2160
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, PAD)
CORPUS_EXAMPLES_PER_APPLICATION = 8000

# The newline stands before every turn but the first, never after the last: a finished assistant turn ends in
# <|im_end|> exactly, which is also what the engine emits last.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


_COMPOUNDS = re.compile(
    rf"\b(?:({'|'.join(SURNAME_HEADS)})({'|'.join(SURNAME_TAILS)})|({'|'.join(PLACE_HEADS)})({'|'.join(PLACE_TAILS)}))\b"
)


def corpus(seed: int) -> Iterator[str]:
    """Grammar text in which surnames and places are cut into their two parts.

    The parts become tokens and the thousands of whole names do not, so every token a name is made of is seen often
    enough for a small model to learn to copy it.
    """
    for application in APPLICATIONS.values():
        for example in islice(stream(application, "train", seed), CORPUS_EXAMPLES_PER_APPLICATION):
            contents = [message["content"] for message in example.messages]
            for text in ("system\nuser\nassistant", *contents, example.base, example.house):
                yield from filter(None, _COMPOUNDS.split(text))


def train_tokenizer(seed: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # A name is the same token after a space and after a quotation mark, so copying it into JSON is plain copying.
    names_and_digits = pre_tokenizers.Split(Regex(r"[A-Z][a-z]+|\d"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [names_and_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, context_tokens: int) -> None:
    """Write tokenizer.json and the tokenizer_config.json that AutoTokenizer and the engine read."""
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_tokens,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": PAD,
        "additional_special_tokens": [END_OF_TEXT, TURN_START],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(configuration, indent=2) + "\n")
