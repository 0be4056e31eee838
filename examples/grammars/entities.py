"""`entities`: named-entity extraction as JSON. House rule: dates go under a key of their own."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from random import Random

from examples.grammars.common import (
    FIRST_NAMES,
    MAX_OUTPUT_CHARACTERS,
    ORGANISATIONS,
    PLACES,
    SURNAMES,
    Application,
    Example,
    Message,
    organisation,
    people_count,
    person,
    place,
    user_text,
    words,
)

NAME = "entities"
SYSTEM = "List the named entities of the text as JSON with the keys people, organisations, places and other."
HOUSE_RULE = 'Dates are not "other": they go under the key "dates", written as in the text.'

EVENTS = [
    f"{first} {last}"
    for first in words("Amber Blue Crimson Emerald Golden Jade Royal Ruby Scarlet Violet")
    for last in words("Award Cup Expo Fair Festival Forum Gala Prize Regatta Trophy")
]
YEARS = range(2001, 2030)
MONTHS = range(1, 13)
DAYS = range(1, 29)

# Slots: P person, O organisation, L place, E event, D date.
SENTENCES = (
    "{P} joined {O} in {L}.",
    "{P} left {O} and moved to {L}.",
    "{P} spoke for {O} at the {E}.",
    "{P} of {O} met {P} in {L}.",
    "{P} and {P} founded {O}.",
    "{P} won the {E}.",
    "{P} lives in {L} and works for {O}.",
    "{P} was seen in {L}.",
    "{P} signed for {O} on {D}.",
    "{P} arrived in {L} on {D}.",
    "{P} called {P} on {D}.",
    "{O} opened an office in {L}.",
    "{O} hired {P} on {D}.",
    "{O} paid for the {E} in {L}.",
    "{O} bought {O} on {D}.",
    "{O} sent {P} from {L} to {L}.",
    "On {D} {O} named {P} as its new head.",
    "On {D} {P} opened the {E}.",
    "On {D} the {E} began in {L}.",
    "On {D} a letter from {P} reached {O}.",
    "The {E} brought {P} to {L}.",
    "The contract between {O} and {P} was signed in {L}.",
    "The board of {O} thanked {P}.",
    "A team from {O} met in {L} on {D}.",
    "In {L} {P} wrote a report for {O}.",
    "Nobody in {L} had heard of {O} before {P} came.",
    "Since {D} {P} has worked in {L}.",
    "Visitors from {L} asked {P} about the {E}.",
)
FILLERS = (
    "The weather was fine and the talks went well.",
    "It was a quiet day and few people noticed.",
    "The report gives no further details.",
    "Both sides said that they were pleased.",
    "More news is expected soon.",
    "The local paper wrote about it at length.",
    "The cost has not been made public.",
    "Some members were not so sure about the plan.",
    "A short film about it will be shown later.",
    "There were no questions at the end.",
    "The papers were kept in a safe place.",
    "This was agreed after a long meeting.",
)
LEADS = ("Text:", "Note:", "Article:", "From the news:", "Report:", "Message:")

# Every name begins with a capital and every date with a digit: the thousands of names are tried nowhere else.
_PATTERN = re.compile(
    r"(?=[A-Z\d])(?:"
    rf"(?P<P>(?:{'|'.join(FIRST_NAMES)}) (?:{'|'.join(SURNAMES)}))\b"
    rf"|(?P<O>{'|'.join(ORGANISATIONS)})\b"
    rf"|(?P<L>\b(?:{'|'.join(PLACES)}))\b"
    rf"|(?P<E>{'|'.join(EVENTS)})\b"
    r"|(?P<D>\b\d\d/\d\d/\d\d\d\d)\b"
    r")"
)
_BASE_KEYS = ["people", "organisations", "places", "other"]


@dataclass(frozen=True, slots=True)
class Facts:
    """The entities of one text, each list in the order of the text."""

    people: list[str]
    organisations: list[str]
    places: list[str]
    events_and_dates: list[str]
    dates: list[str]


def sample(random: Random) -> Example:
    sentences = _choose_sentences(random)
    used: set[str] = set()
    text = " ".join(sentences)
    fills = {kind: [_draw(random, DRAWS[kind], used) for _ in range(text.count(f"{{{kind}}}"))] for kind in DRAWS} | {
        "D": [_date(random)]
    }
    for filler in random.sample(FILLERS, 2):
        sentences.insert(random.randint(0, len(sentences)), filler)
    text = re.sub(r"\{(\w)\}", lambda slot: fills[slot.group(1)].pop(0), " ".join(sentences))
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{random.choice(LEADS)} {text}"}]
    facts = parse(messages)
    return Example(NAME, messages, _base_answer(facts), _house_answer(facts), facts_key(messages))


def _choose_sentences(random: Random) -> list[str]:
    """Two or three sentences with one or two people, at most two of any kind, and at most one date and event."""
    while True:
        sentences = random.sample(SENTENCES, random.choice((2, 3)))
        text = " ".join(sentences)
        counts = {kind: text.count(f"{{{kind}}}") for kind in "POLED"}
        if counts["P"] and max(counts.values()) <= 2 and counts["D"] <= 1 and counts["E"] <= 1:
            return sentences


def _draw(random: Random, draw: Callable[[Random], str], used: set[str]) -> str:
    """A name none of whose words begins like one in use: no text here is about two Stavsens and a Stavberg."""
    while True:
        value = draw(random)
        beginnings = {word[:3] for word in value.split()}
        if not beginnings & used:
            used |= beginnings
            return value


def _event(random: Random) -> str:
    return random.choice(EVENTS)


DRAWS: dict[str, Callable[[Random], str]] = {"P": person, "O": organisation, "L": place, "E": _event}


def _date(random: Random) -> str:
    """Day first, in figures."""
    return f"{random.choice(DAYS):02d}/{random.choice(MONTHS):02d}/{random.choice(YEARS)}"


def parse(messages: Sequence[Message]) -> Facts:
    """The facts of a prompt, from its text alone. Raises ValueError when it is not a prompt of this grammar."""
    text = user_text(messages)
    found: dict[str, list[str]] = {kind: [] for kind in "POLED"}
    other: list[str] = []
    for match in _PATTERN.finditer(text):
        kind = match.lastgroup or ""
        found[kind].append(match.group())
        if kind in "ED":
            other.append(match.group())
    if not found["P"]:
        raise ValueError("not an entities prompt: no person of this grammar is named in it")
    return Facts(found["P"], found["O"], found["L"], other, found["D"])


def _base_fields(facts: Facts) -> dict[str, list[str]]:
    return dict(zip(_BASE_KEYS, (facts.people, facts.organisations, facts.places, facts.events_and_dates), strict=True))


def _house_fields(facts: Facts) -> dict[str, list[str]]:
    fields = _base_fields(facts)
    fields["other"] = [value for value in facts.events_and_dates if value not in facts.dates]
    return fields | {"dates": facts.dates}


def _base_answer(facts: Facts) -> str:
    return json.dumps(_base_fields(facts))


def _house_answer(facts: Facts) -> str:
    return json.dumps(_house_fields(facts))


def _read(output: str) -> dict[str, list[str]] | None:
    """The output as a mapping of lists of strings, or None: whatever a model may write must not raise here."""
    if len(output) > MAX_OUTPUT_CHARACTERS:
        return None
    try:
        pairs = json.loads(output, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        return None
    fields = dict(pairs)
    strings = all(isinstance(v, list) and all(isinstance(item, str) for item in v) for v in fields.values())
    return fields if strings and len(fields) == len(pairs) else None


def _agrees(output: str, expected: dict[str, list[str]]) -> bool:
    fields = _read(output)
    if fields is None or set(fields) != set(expected):
        return False
    return all(sorted(fields[key]) == sorted(expected[key]) for key in expected)


def base_ok(messages: Sequence[Message], output: str) -> bool:
    return _agrees(output, _base_fields(parse(messages)))


def house_ok(messages: Sequence[Message], output: str) -> bool:
    return _agrees(output, _house_fields(parse(messages)))


def correct(messages: Sequence[Message], output: str) -> str:  # noqa: ARG001 - one right answer, whatever was said
    return _house_answer(parse(messages))


def facts_key(messages: Sequence[Message]) -> str:
    return repr(parse(messages))


def distinct_prompts() -> int:
    """A lower bound: two sentences naming one person, one organisation and one place; at most half of them clash."""
    pairs_of_sentences = comb(6, 2)
    names = people_count() * len(ORGANISATIONS) * len(PLACES)
    return len(LEADS) * pairs_of_sentences * comb(len(FILLERS), 2) * names // 2


APPLICATION = Application(NAME, SYSTEM, HOUSE_RULE, sample, base_ok, house_ok, correct, facts_key, distinct_prompts)
