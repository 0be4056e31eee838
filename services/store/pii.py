"""Personal data in text by deterministic patterns with checksums, so that the same text is always treated alike.

Pure functions: curation applies them when it writes an example, and a log writer may before it writes a record. A
number counts as a card or an IBAN only when its check digits are right; names and addresses no pattern can know.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

Mode = Literal["off", "tag", "mask"]
MODES: tuple[Mode, ...] = get_args(Mode)

# Lengths of IBANs by country (SWIFT's registry); a wrong length is no IBAN, whatever its remainder.
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "CH": 21,
    "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18,
    "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23,
    "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LI": 21, "LT": 20, "LU": 20, "LV": 21,
    "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24, "PL": 28,
    "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TN": 24,
    "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip
# How long cards are by their first digit: 2 and 5 Mastercard, 3 Amex, Diners and JCB, 4 Visa, 6 Discover and UnionPay.
CARD_LENGTHS = {"2": (16,), "3": (14, 15, 16), "4": (13, 16, 19), "5": (16,), "6": (16, 17, 18, 19)}
# Bounded repetitions everywhere: hostile text must not make a pattern slow.
EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9][\w.+%-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![\w-])"
)
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?![A-Za-z0-9])")
CARD = re.compile(r"(?<![\w.,-])\d(?:[ -]?\d){12,18}(?![\w-]|[.,]\d)")
PHONE = re.compile(r"(?<![\w.+])(?<!\d[ -])(?:\+|00)[1-9](?:[ ./()-]{0,2}\d){7,14}(?![\w-]|\.\d)")
NATIONAL = re.compile(r"(?<![\w./-])\(?0?[1-9]\d{2}\)?[ .-]\d{3}[ .-]\d{4}(?![\w-]|\.\d)")
KEY = re.compile(
    r"(?<![\w-])(?:sk-(?:[a-z]{2,8}-)?[A-Za-z0-9_-]{20,200}|wh_[a-z0-9]{8}_[A-Za-z0-9_-]{20,80}|gh[opsur]_[A-Za-z0-9]{36,255}"
    r"|github_pat_\w{40,255}|glpat-[\w-]{20,64}|xox[abpr]-[A-Za-z0-9-]{10,200}|A(?:KIA|SIA)[A-Z0-9]{16}"
    r"|AIza[\w-]{35}|hf_[A-Za-z0-9]{30,64}|eyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,1000})(?![\w-])"
    r"|-----BEGIN (?:[A-Z]{2,12} )?PRIVATE KEY-----[A-Za-z0-9+/=\s]{20,10000}"
    r"(?:-----END (?:[A-Z]{2,12} )?PRIVATE KEY-----)?"
)


class Found(NamedTuple):
    """A stretch [start, end) of a text and what it is."""

    kind: str
    start: int
    end: int


Finder = Callable[[str], list[Found]]


class Treated(NamedTuple):
    """A text or document as it may be kept, and the kinds of personal data that were in it, sorted."""

    value: Any
    kinds: tuple[str, ...]


def mode_of(config: Mapping[str, Any]) -> Mode:
    """What a project does with personal data; marks it unless told otherwise."""
    chosen = config.get("pii", "tag")
    return chosen if chosen in MODES else "tag"


def find(text: str) -> list[Found]:
    """What is personal in a text, in order, without overlaps: where two patterns claim a stretch the surer one wins."""
    taken: list[Found] = []
    covered = bytearray(len(text))
    if any(sign in text for sign in "@-_+0123456789") or "eyJ" in text:
        for kind, pattern, sure in PATTERNS:
            for match in pattern.finditer(text):
                start, length = match.start(), sure(match[0])
                if length and not any(covered[start : start + length]):
                    covered[start : start + length] = b"1" * length
                    taken.append(Found(kind, start, start + length))
    return sorted(taken, key=lambda one: one.start)


def treat(text: str, mode: Mode, finder: Finder = find) -> Treated:
    """The text with its personal data marked (`tag` changes nothing) or replaced by `[EMAIL]` and the like (`mask`)."""
    found = finder(text) if mode != "off" else []
    kinds = tuple(sorted({one.kind for one in found}))
    if mode == "mask":
        for one in reversed(found):
            text = f"{text[: one.start]}[{one.kind.upper()}]{text[one.end :]}"
    return Treated(text, kinds)


def treat_document(value: object, mode: Mode, finder: Finder = find) -> Treated:
    """Every string inside a JSON document treated; roles and other names are kept as they are."""
    kinds: set[str] = set()
    return Treated(_walk(value, mode, kinds, finder), tuple(sorted(kinds))) if mode != "off" else Treated(value, ())


def _walk(value: object, mode: Mode, kinds: set[str], finder: Finder) -> object:
    if isinstance(value, str):
        treated = treat(value, mode, finder)
        kinds.update(treated.kinds)
        return treated.value
    if isinstance(value, Mapping):
        return {
            key: item if key in ("role", "type") else _walk(item, mode, kinds, finder) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_walk(item, mode, kinds, finder) for item in value]
    return value


def luhn(digits: str) -> bool:
    """Whether a number's last digit is its check digit (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        doubled = int(digit) * (2 if place % 2 else 1)
        total += doubled - 9 if doubled > 9 else doubled
    return total % 10 == 0


def mod97(iban: str) -> bool:
    """Whether an IBAN's check digits are right (ISO 13616): 1 after moving the first four characters to the end."""
    moved = iban[4:] + iban[:4]
    return int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def _whole(text: str) -> int:
    return len(text)


def _card(text: str) -> int:
    digits = re.sub(r"\D", "", text)
    return len(text) if len(digits) in CARD_LENGTHS.get(digits[0], ()) and len(set(digits)) > 1 and luhn(digits) else 0


def _iban(text: str) -> int:
    """How much of the match is the IBAN: words after it may look like more groups of it."""
    length = IBAN_LENGTHS.get(text[:2], 0)
    end, count = 0, 0
    while end < len(text) and count < length:
        count += text[end] != " "
        end += 1
    whole = length and count == length and (end == len(text) or text[end] == " ")
    return end if whole and mod97(text[:end].replace(" ", "")) else 0


def _phone(text: str) -> int:
    digits = re.sub(r"\D", "", text)
    return len(text) if 8 <= len(digits.removeprefix("00")) <= 15 else 0


# The surest first: a card's digits could pass for a telephone number.
PATTERNS: tuple[tuple[str, re.Pattern[str], Callable[[str], int]], ...] = (
    ("key", KEY, _whole), ("email", EMAIL, _whole), ("iban", IBAN, _iban), ("card", CARD, _card),
    ("phone", PHONE, _phone), ("phone", NATIONAL, _whole),
)  # fmt: skip
