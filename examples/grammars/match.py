"""`match`: does an offer suit a person, and why? House rule: the answer closes by naming the deciding criterion."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import perm
from random import Random

from examples.grammars.common import (
    FIRST_NAMES,
    ORGANISATIONS,
    PLACES,
    SURNAMES,
    Application,
    Example,
    Message,
    organisation,
    people_count,
    person,
    phrases,
    same_words,
    user_text,
)

NAME = "match"
SYSTEM = (
    "You compare what a person wants with what an offer gives. The notes are sorted by weight. Say whether it is a "
    "match, what the person wants and the offer gives in the note that decides, and why it decides."
)
HOUSE_RULE = "The answer closes by naming the deciding criterion."

CRITERIA: dict[str, list[str]] = {
    "location": PLACES[::7],
    "hours": phrases("mornings,evenings,nights,weekends,weekdays,afternoons,long shifts,short shifts"),
    "contract": phrases("a permanent contract,a seasonal contract,a trial contract,freelance work,a yearly contract"),
    "language": phrases("English,French,German,Spanish,Italian,Polish,Danish,Turkish,Arabic,Dutch"),
    "travel": phrases("no travel,weekly travel,monthly travel,travel by train,travel by car,travel abroad"),
    "team": phrases("a small team,a large team,a new team,a remote team,a mixed team,a quiet team"),
    "training": phrases("evening courses,paid courses,a mentor,online lessons,a long training,no training"),
    "style": phrases("a modern style,a classic style,a rustic style,a plain style,a bold style"),
    "colour": phrases("red,blue,green,black,white,yellow,brown,grey,orange,purple"),
    "material": phrases("wool,cotton,leather,linen,silk,steel,oak,glass,paper,rubber"),
    "size": phrases("a small size,a medium size,a large size,a narrow size,a wide size"),
    "delivery": phrases("delivery by bike,delivery by truck,delivery by post,delivery at night,pickup in person"),
    "season": phrases("spring,summer,autumn,winter"),
    "price": [f"{price} crowns" for price in range(20, 95, 5)],
}
FAMILIES = {
    "post": ("location", "hours", "contract", "language", "travel", "team", "training", "price"),
    "advert": ("location", "style", "colour", "material", "size", "delivery", "season", "price"),
}
NOTES_PER_PROMPT = 6
# The word that says whether a note agrees stands before the values, so that a model reading on knows it when they come.
AGREEING = (
    "they agree, since {name} wants {want} and the {family} gives {give}.",
    "there is no conflict, for {name} looks for {want} and the {family} has {give}.",
    "all is well, as {name} asks for {want} and the {family} offers {give}.",
)
DIFFERING = (
    "they differ, since {name} wants {want} but the {family} gives {give}.",
    "there is a conflict, for {name} looks for {want} but the {family} has {give}.",
    "all is not well, as {name} asks for {want} but the {family} offers {give}.",
)
REMARKS = (
    "This came up in the first talk and was written down at once.",
    "The point was asked about twice and the reply stayed the same.",
    "It is in the papers that were sent last week by mail.",
    "Nothing more was said about this point in the talk.",
    "The reply was short and clear, and needs no more words.",
    "A friend who knows both sides said the same thing later.",
    "The form has a line for this and it was filled in.",
    "This was checked by phone before the notes were typed.",
    "There is a letter about it in the folder on the desk.",
    "It was the last thing to be settled before lunch.",
    "The page with the details is the third one in the file.",
    "Both of them read this line and put their names to it.",
)

_VALUES = "|".join(
    sorted({re.escape(value) for values in CRITERIA.values() for value in values}, key=len, reverse=True)
)
_NOTE = re.compile(r"^\d\. (?P<criterion>[A-Z][a-z]+), (?:met|open): (?P<said>[^.]+\.)", re.MULTILINE)
_HEADER = re.compile(
    rf"Person: (?P<name>(?:{'|'.join(FIRST_NAMES)}) (?:{'|'.join(SURNAMES)}))\n"
    rf"Offer: (?:a|an) (?P<family>{'|'.join(FAMILIES)}) of (?P<offerer>{'|'.join(ORGANISATIONS)})\n"
)
_VALUE = re.compile(rf"\b(?:{_VALUES})\b")


@dataclass(frozen=True, slots=True)
class Note:
    criterion: str
    want: str
    give: str

    @property
    def agrees(self) -> bool:
        return self.want == self.give


@dataclass(frozen=True, slots=True)
class Facts:
    name: str
    offerer: str
    notes: list[Note]

    @property
    def deciding(self) -> Note:
        """The note that differs, or the heaviest note when all agree."""
        return next((note for note in self.notes if not note.agrees), self.notes[0])


def sample(random: Random) -> Example:
    family = random.choice(sorted(FAMILIES))
    name = person(random)
    differing = random.choice((0, 1, 1))  # two notes that differ would need counting, which is not the point here
    criteria = random.sample(FAMILIES[family], NOTES_PER_PROMPT)
    against = set(random.sample(criteria, differing))
    remarks = random.sample(REMARKS, NOTES_PER_PROMPT)
    lines = []
    for index, (criterion, remark) in enumerate(zip(criteria, remarks, strict=True), start=1):
        said = _note(random, criterion, name, family, criterion in against)
        mark = "open" if criterion in against else "met"
        lines.append(f"{index}. {criterion.capitalize()}, {mark}: {said} {remark}")
    article = "an" if family == "advert" else "a"
    user = f"Person: {name}\nOffer: {article} {family} of {organisation(random)}\n" + "\n".join(lines)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    facts = parse(messages)
    return Example(NAME, messages, _base_answer(facts), _house_answer(facts), facts_key(messages))


def _note(random: Random, criterion: str, name: str, family: str, differs: bool) -> str:
    want, other = random.sample(CRITERIA[criterion], 2)
    form = random.choice(DIFFERING if differs else AGREEING)
    return form.format(name=name.split()[0], family=family, want=want, give=other if differs else want)


def parse(messages: Sequence[Message]) -> Facts:
    """The facts of a prompt, from its text alone. Raises ValueError when it is not a prompt of this grammar."""
    text = user_text(messages)
    header = _HEADER.search(text)
    notes = [_parse_note(found["criterion"], found["said"]) for found in _NOTE.finditer(text)]
    if header is None or not notes:
        raise ValueError("not a match prompt: no person, offer and notes of this grammar in it")
    return Facts(header["name"], header["offerer"], notes)


def _parse_note(criterion: str, said: str) -> Note:
    values = _VALUE.findall(said)
    if len(values) != 2:
        raise ValueError(f"not a match prompt: the note on {criterion} names {len(values)} values and must name two")
    return Note(criterion, values[0], values[1])


def _base_answer(facts: Facts) -> str:
    deciding = facts.deciding
    verdict, joint, reason = (
        ("match", "and", "weighs most, and there is no note where they differ")
        if deciding.agrees
        else ("no match", "but", "decides, because it is the one where they differ")
    )
    return (
        f"Verdict: {verdict}. {facts.name} wants {deciding.want}, {joint} {facts.offerer} gives {deciding.give}. "
        f"The note on {deciding.criterion} {reason}."
    )


def _house_answer(facts: Facts) -> str:
    return f"{_base_answer(facts)} Deciding criterion: {facts.deciding.criterion}."


def base_ok(messages: Sequence[Message], output: str) -> bool:
    return same_words(output, _base_answer(parse(messages)))


def house_ok(messages: Sequence[Message], output: str) -> bool:
    return same_words(output, _house_answer(parse(messages)))


def correct(messages: Sequence[Message], output: str) -> str:  # noqa: ARG001 - one right answer, whatever was said
    return _house_answer(parse(messages))


def facts_key(messages: Sequence[Message]) -> str:
    return repr(parse(messages))


def distinct_prompts() -> int:
    """A lower bound: every criterion has at least four values, and only the agreeing forms are counted."""
    orders = perm(8, NOTES_PER_PROMPT) * perm(len(REMARKS), NOTES_PER_PROMPT)
    notes: int = orders * (4 * len(AGREEING)) ** NOTES_PER_PROMPT
    return len(FAMILIES) * people_count() * len(ORGANISATIONS) * notes


APPLICATION = Application(NAME, SYSTEM, HOUSE_RULE, sample, base_ok, house_ok, correct, facts_key, distinct_prompts)
