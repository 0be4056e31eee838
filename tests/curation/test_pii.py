"""Personal data: what is found, what only looks like it, what masking leaves."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store import pii

PERSONAL = [
    ("card", "my card is 4111 1111 1111 1111, thanks", "4111 1111 1111 1111"),
    ("card", "5500-0000-0000-0004", "5500-0000-0000-0004"),
    ("card", "amex 378282246310005.", "378282246310005"),
    ("card", "six 6011111111111117 and more", "6011111111111117"),
    ("iban", "pay DE89 3704 0044 0532 0130 00 BY FRIDAY", "DE89 3704 0044 0532 0130 00"),
    ("iban", "GB82WEST12345698765432", "GB82WEST12345698765432"),
    ("iban", "(NO9386011117947)", "NO9386011117947"),
    ("email", "write to Ada.Lovelace+x@mail.example.co.uk!", "Ada.Lovelace+x@mail.example.co.uk"),
    ("email", "<bob@example.com>", "bob@example.com"),
    ("phone", "call +49 30 901820 now", "+49 30 901820"),
    ("phone", "+1 (415) 555-2671", "+1 (415) 555-2671"),
    ("phone", "0044 20 7946 0958", "0044 20 7946 0958"),
    ("phone", "(415) 555-2671", "(415) 555-2671"),
    ("key", "use sk-proj-abcdefghijklmnopqrstuvwx1234", "sk-proj-abcdefghijklmnopqrstuvwx1234"),
    ("key", "AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    ("key", "wh_abcd1234_" + "A" * 32, "wh_abcd1234_" + "A" * 32),
    ("key", "ghp_" + "a1" * 18, "ghp_" + "a1" * 18),
]  # fmt: skip
HARMLESS = [
    "order 4111 1111 1111 1112",  # the check digit is wrong
    "0000 0000 0000 0000",
    "DE89 3704 0044 0532 0130 01",
    "DE89 3704 0044 0532 0130",  # two digits short
    "XX82WEST12345698765432",  # no such country
    "on 2021-03-04 at 10:15:00.123",
    "version 1.22.333.4444",
    "3.14159265358979323846",
    "user@localhost and a @mention",
    "the sum is 1,234,567,890.00",
    "sk-short",
    "isbn 978-3-16-148410-0",
    "550e8400-e29b-41d4-a716-446655440000",
    "1609459200000 is a time in milliseconds",
]


@pytest.mark.parametrize(("kind", "text", "stretch"), PERSONAL)
def test_what_is_personal_is_found_and_masked_whole(kind: str, text: str, stretch: str) -> None:
    assert [(one.kind, text[one.start : one.end]) for one in pii.find(text)] == [(kind, stretch)]
    treated = pii.treat(text, "mask")
    assert treated == (text.replace(stretch, f"[{kind.upper()}]"), (kind,))


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert pii.find(text) == []


def test_tagging_says_what_is_there_and_changes_nothing_and_off_says_nothing() -> None:
    text = "bob@example.com paid with 4111111111111111"
    assert pii.treat(text, "tag") == (text, ("card", "email"))
    assert pii.treat(text, "off") == (text, ())


def test_every_string_of_a_chat_is_treated_and_its_roles_are_kept() -> None:
    call = {"type": "function", "function": {"name": "mail", "arguments": '{"to": "bob@example.com"}'}}
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "I am bob@example.com"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    masked, kinds = pii.treat_document(chat, "mask")
    assert kinds == ("email",)
    assert masked[0] == {"role": "user", "content": [{"type": "text", "text": "I am [EMAIL]"}]}
    assert masked[1]["tool_calls"][0]["function"]["arguments"] == '{"to": "[EMAIL]"}'
    assert chat[0]["content"] == [{"type": "text", "text": "I am bob@example.com"}]


@given(st.text(alphabet="0123456789 -.@+abcDEX[]", max_size=80))
def test_a_masked_text_has_nothing_left_and_stays_as_it_is(text: str) -> None:
    masked = pii.treat(text, "mask").value
    assert pii.treat(masked, "mask").value == masked


@pytest.mark.parametrize(
    "piece",
    [
        "1",
        "1 ",
        "a@",
        "a@b.co ",
        "a.",
        "DE",
        "DE12 ",
        "+1 ",
        "sk-",
        "eyJaaaaaaaaaaaa.",
        "-----BEGIN PRIVATE KEY-----\n",
    ],
)
def test_hostile_text_takes_no_longer_than_its_length(piece: str) -> None:
    began = time.process_time()
    pii.find(piece * (200_000 // len(piece)))
    assert time.process_time() - began < 2.0
