"""`chat`: single-turn answers of a support desk. House rule: every answer cites the policy it follows by number."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from examples.grammars.common import (
    FIRST_NAMES,
    SURNAMES,
    Application,
    Example,
    Message,
    people_count,
    person,
    same_words,
    user_text,
    words,
)

NAME = "chat"
SYSTEM = "You answer customers for the Larkfield support desk."
HOUSE_RULE = "Every answer cites the number of the policy it follows."

COLOURS = words(
    "beige black blue bronze brown cream green grey maroon navy olive orange pink purple red silver teal white"
)
PRODUCTS = words(
    "backpack bicycle blender bookcase camera carpet chair clock coat cooker desk drill fan fridge guitar heater "
    "helmet kettle keyboard lamp laptop mattress mirror mixer monitor oven phone piano printer radio router scooter "
    "shelf sofa speaker suitcase table tablet telescope tent toaster vacuum wardrobe watch"
)


@dataclass(frozen=True, slots=True)
class Case:
    """One situation of a topic: how customers put it, and what the desk rules and advises."""

    topic: str
    policy: int
    phrasings: tuple[str, ...]
    ruling: str
    advice: str


def _case(topic: str, policy: int, phrasings: str, ruling: str, advice: str) -> Case:
    return Case(topic, policy, tuple(part.strip() for part in phrasings.split("|")), ruling, advice)


CASES = (
    _case(
        "return",
        14,
        "is unopened and I want to send it back | is still sealed and I would like to return it",
        "You may return it for the full price because the box is still sealed",
        "Please print the return label from your account, put it on the box and leave the box at any post office",
    ),
    _case(
        "return",
        14,
        "has been used and I want to send it back | is opened but I would like to return it",
        "You may return it for store credit because the box has been opened",
        "Please pack it with all its parts, print the return label and hand it to the driver who calls at your door",
    ),
    _case(
        "repair",
        27,
        "broke within the warranty | stopped working and the warranty still runs",
        "The repair is free because the warranty still runs",
        "Our workshop will send you a padded box, and the repair takes about ten working days from the day we get it",
    ),
    _case(
        "repair",
        27,
        "broke after the warranty ended | stopped working and the warranty is over",
        "The repair has to be paid because the warranty is over",
        "Our workshop will send you a price first, and nothing will be done to it before you agree to that price",
    ),
    _case(
        "delivery",
        31,
        "has not arrived and is late | was due last week and never came",
        "The parcel is late and we will trace it with the carrier today",
        "You will hear from us by tomorrow evening, and if it cannot be found we will send a new one at no cost",
    ),
    _case(
        "delivery",
        31,
        "came to the wrong address | was left with a stranger in another street",
        "The parcel went to the wrong door and the carrier must fetch it",
        "Please do not go there yourself, and stay at home tomorrow morning so that the driver can bring it to you",
    ),
    _case(
        "damage",
        48,
        "arrived with a crack | came out of the box with a dent",
        "You will get a new one because it was damaged on the way",
        "Please take two photos of the damage, answer this message with them and keep the box until we have replied",
    ),
    _case(
        "damage",
        48,
        "arrived with a part missing | came without one of its parts",
        "You will get the missing part by post because the box was packed badly",
        "Please look at the list in the manual, tell us the name of the part and use nothing until it has come",
    ),
    _case(
        "payment",
        52,
        "was charged twice to my card | shows up two times on my card bill",
        "The second charge was our error and we will pay it back",
        "The money will be on your card within five working days, and you do not need to call your bank about it",
    ),
    _case(
        "payment",
        52,
        "was paid by transfer but is shown as unpaid | is marked unpaid although I sent a transfer",
        "The transfer has not yet been matched with your order",
        "Please send us the date and the sum of the transfer, and we will mark the order as paid on the same day",
    ),
    _case(
        "cancel",
        66,
        "has not been shipped and I want to cancel it | is not on its way yet and I no longer want it",
        "The order is cancelled from this moment because it had not been shipped",
        "You will not be charged, and a short note that confirms this will be in your mail box within the hour",
    ),
    _case(
        "cancel",
        66,
        "has been shipped but I want to cancel it | is on its way already and I no longer want it",
        "The order cannot be cancelled any more because it has been shipped",
        "Please refuse the parcel at the door, and we will pay back the full price as soon as it is here again",
    ),
    _case(
        "upgrade",
        73,
        "should be exchanged for the bigger model | is too small and I want the larger one",
        "You may change to the larger model and pay only the difference",
        "Please choose the model in your account, and the driver who brings the new one will take the old one along",
    ),
    _case(
        "upgrade",
        73,
        "should be exchanged for the smaller model | is too big and I want the smaller one",
        "You may change to the smaller model and we will pay back the difference",
        "Please keep the old one in its box, since we will fetch it within a week and then bring you the new one",
    ),
    _case(
        "discount",
        85,
        "was ordered with a student code that failed | did not take my student code",
        "The student code is valid and we have taken ten percent off",
        "You will get a new bill today, and the code can be used for two more orders until the end of the year",
    ),
    _case(
        "discount",
        85,
        "was ordered with an expired code | did not take my old spring code",
        "The spring code has expired and cannot be used any more",
        "You can join our letter for a new code, which then works at once for every order that has not been paid",
    ),
    _case(
        "account",
        90,
        "is missing from my account | cannot be seen in my list of orders",
        "The order was made as a guest and so it is not in the list",
        "Please open the link in the first mail we sent, press the green button and sign in with your usual password",
    ),
    _case(
        "account",
        90,
        "is on an account I cannot open | is locked behind a password I have lost",
        "The account is safe and only needs a new password",
        "Please press the forgotten password button, wait for the mail and choose a password that has twelve signs",
    ),
)
GREETINGS = ("Hello, I am", "Hi, my name is", "Good day, this is", "Dear team, this is", "Hello, it is", "Hi, I am")
QUESTIONS = (
    "What can I do?",
    "Can you help me?",
    "What happens now?",
    "Please tell me what to do.",
    "How do we solve this?",
    "Could you look into it?",
)

_BY_PHRASE = {phrase: case for case in CASES for phrase in case.phrasings}
_PROMPT = re.compile(
    rf"(?P<name>(?:{'|'.join(FIRST_NAMES)}) (?:{'|'.join(SURNAMES)}))\. "
    rf"My (?P<colour>{'|'.join(COLOURS)}) (?P<product>{'|'.join(PRODUCTS)}), order (?P<order>\d{{4}}), "
    rf"(?P<phrase>{'|'.join(map(re.escape, _BY_PHRASE))})\."
)


@dataclass(frozen=True, slots=True)
class Facts:
    name: str
    colour: str
    product: str
    order: str
    case: Case


def sample(random: Random) -> Example:
    case = random.choice(CASES)
    user = (
        f"{random.choice(GREETINGS)} {person(random)}. My {random.choice(COLOURS)} {random.choice(PRODUCTS)}, "
        f"order {random.randint(1000, 9999)}, {random.choice(case.phrasings)}. {random.choice(QUESTIONS)}"
    )
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    facts = parse(messages)
    return Example(NAME, messages, _answer(facts, house=False), _answer(facts, house=True), facts_key(messages))


def parse(messages: Sequence[Message]) -> Facts:
    """The facts of a prompt, from its text alone. Raises ValueError when it is not a prompt of this grammar."""
    match = _PROMPT.search(user_text(messages))
    if match is None:
        raise ValueError("not a chat prompt: no customer, product and order of this grammar in it")
    return Facts(match["name"], match["colour"], match["product"], match["order"], _BY_PHRASE[match["phrase"]])


def _answer(facts: Facts, *, house: bool) -> str:
    citation = f" This follows policy {facts.case.policy}." if house else ""
    return (
        f"Dear {facts.name}, thank you for writing to us about your {facts.colour} {facts.product}. "
        f"We have found order {facts.order}. {facts.case.ruling}. {facts.case.advice}.{citation} "
        f"We are sorry for the trouble and wish you a good day. Kind regards, the Larkfield support desk."
    )


def base_ok(messages: Sequence[Message], output: str) -> bool:
    return same_words(output, _answer(parse(messages), house=False))


def house_ok(messages: Sequence[Message], output: str) -> bool:
    return same_words(output, _answer(parse(messages), house=True))


def correct(messages: Sequence[Message], output: str) -> str:  # noqa: ARG001 - one right answer, whatever was said
    return _answer(parse(messages), house=True)


def facts_key(messages: Sequence[Message]) -> str:
    facts = parse(messages)
    return f"{facts.name}/{facts.colour}/{facts.product}/{facts.order}/{facts.case.ruling}"


def distinct_prompts() -> int:
    phrases = sum(len(case.phrasings) for case in CASES)
    return len(GREETINGS) * people_count() * len(COLOURS) * len(PRODUCTS) * 9000 * phrases * len(QUESTIONS)


APPLICATION = Application(NAME, SYSTEM, HOUSE_RULE, sample, base_ok, house_ok, correct, facts_key, distinct_prompts)
