"""What the three example grammars share: the example record, the split rule and the word lists.

A grammar turns a seeded random generator into a chat prompt and two answers: BASE, which the starter model is
trained on, and HOUSE, which follows a rule the starter model has never seen. Checkers and oracle read the facts
back out of the prompt text, so they work on a logged prompt alone.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Message = dict[str, str]
Split = Literal["train", "held_out"]

HELD_OUT_TENTHS = 1
MAX_OUTPUT_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with both answers; `facts` names the latent facts and nothing about their phrasing."""

    app: str
    messages: list[Message]
    base: str
    house: str
    facts: str


@dataclass(frozen=True, slots=True)
class Application:
    """One narrow application: how to draw prompts and how to judge answers.

    `correct`, `base_ok` and `house_ok` raise ValueError when the prompt is not of this grammar; they accept any
    output text. `house_ok` asks for the base rules and the house rule together.
    """

    name: str
    system: str
    house_rule: str
    sample: Callable[[Random], Example]
    base_ok: Callable[[Sequence[Message], str], bool]
    house_ok: Callable[[Sequence[Message], str], bool]
    correct: Callable[[Sequence[Message], str], str]
    facts_key: Callable[[Sequence[Message]], str]
    distinct_prompts: Callable[[], int]

    def is_held_out(self, messages: Sequence[Message]) -> bool:
        return held_out(self.facts_key(messages))


def held_out(facts: str) -> bool:
    """Whether these facts belong to the held-out tenth. Rephrasing the same facts never crosses the split."""
    return hashlib.sha256(facts.encode()).digest()[0] % 10 < HELD_OUT_TENTHS


def stream(application: Application, split: Split, seed: int) -> Iterator[Example]:
    """Endless examples of one split; the same seed gives the same sequence on every machine."""
    random = Random(f"{application.name}/{split}/{seed}")
    while True:
        example = application.sample(random)
        if held_out(example.facts) == (split == "held_out"):
            yield example


def user_text(messages: Sequence[Message]) -> str:
    """The last user message's text; raises ValueError when there is none."""
    for message in reversed(messages):
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            return message["content"]
    raise ValueError("the prompt has no user message")


def same_words(output: str, expected: str) -> bool:
    """Whether the output says exactly the expected sentences, white space aside."""
    return len(output) <= MAX_OUTPUT_CHARACTERS and output.split() == expected.split()


def compound(heads: Sequence[str], tails: Sequence[str]) -> list[str]:
    return [head + tail for head in heads for tail in tails]


def words(text: str) -> list[str]:
    return text.split()


def phrases(text: str) -> list[str]:
    return text.split(",")


FIRST_NAMES = words(
    "Ada Aldo Amira Anton Asha Astrid Basil Bela Bianca Boris Bruno Carla Cedric Celia Chiara Cleo Conrad Cora "
    "Dahlia Dario Delia Diego Dora Edgar Edith Elena Elias Elsa Emil Enzo Esther Fabio Farah Felix Fiona Flora "
    "Franka Gemma Georg Gloria Greta Gustav Hana Harald Hazel Heidi Hugo Ibrahim Ida Igor Ilse Imran Ingrid Iris "
    "Ivan Jade Jakob Jamila Jonas Judith Julia Karim Karl Katja Kenji Kira Klara Lars Leila Leon Lidia Linus Lola "
    "Lotte Lucia Magnus Malik Mara Marek Matteo Maya Milan Mina Mona Nadia Naomi Nils Nina Noor Odette Olaf Olga "
    "Omar Oscar Otto Paula Pavel Petra Quentin Rafael Rania Rita Robin Rosa Rufus Sabine Samir Selma Silas Simon "
    "Sofia Stefan Tara Tessa Theo Tilda Tomas Ulla Uma Vera Victor Viola Walter Wanda Yara Yusuf Zelda Zoe"
)
SURNAME_HEADS = words(
    "Alb Bar Berg Bran Cal Cord Dal Den Dor Eng Fal Fen Gal Gard Gren Hal Hart Hol Jan Kar Kel Kol Lam Lind Lor "
    "Mal Mar Mor Nor Ost Pal Per Quin Ran Rev Ros Sal Sol Stav Tam Thor Tol Val Var Ver Vol Wal Wen Yar Zan"
)
SURNAME_TAILS = words(
    "ander ano ati berg dahl den ek elli ero eska etti hart inen ini kov lund man nes ora osa ovic quist sen strom sky"
)
SURNAMES = compound(SURNAME_HEADS, SURNAME_TAILS)
PLACE_HEADS = words(
    "Ash Black Bram Brook Clay Cold Crow East Elm Fair Fox Glen Gold Gran Grey Hazel High Kings Lake Long Maple "
    "Mill New North Oak Old Raven Red Rose Sand Silver South Stone Swan Thorn West White Wind Winter Wood"
)
PLACE_TAILS = words("bridge bury dale field ford gate ham haven hill mere mouth port side stead ton wick")
PLACES = compound(PLACE_HEADS, PLACE_TAILS)
ORGANISATION_STEMS = words(
    "Acorn Amber Apex Arbor Atlas Aurora Beacon Birch Bluebell Bright Canyon Cedar Cobalt Comet Copper Coral Crescent "
    "Crystal Delta Drift Eagle Ember Falcon Fern Flint Forge Garnet Granite Harbor Harvest Heron Horizon Indigo Iron "
    "Ivory Jasper Juniper Kestrel Lantern Laurel Linden Lotus Lunar Magnet Marble Meadow Meridian Nimbus Opal Orchid "
    "Osprey Pearl Pioneer Polar Prairie Quartz River Saffron Sierra Solar Summit Tidal Timber Topaz Umbra Vector "
    "Velvet Vertex Willow Zenith"
)
ORGANISATION_SUFFIXES = words("Bank Foods Foundry Group Institute Labs Logistics Motors Partners Press Systems Works")
ORGANISATIONS = [f"{stem} {suffix}" for stem in ORGANISATION_STEMS for suffix in ORGANISATION_SUFFIXES]


def person(random: Random) -> str:
    return f"{random.choice(FIRST_NAMES)} {random.choice(SURNAMES)}"


def place(random: Random) -> str:
    return random.choice(PLACES)


def organisation(random: Random) -> str:
    return random.choice(ORGANISATIONS)


def people_count() -> int:
    return len(FIRST_NAMES) * len(SURNAMES)
