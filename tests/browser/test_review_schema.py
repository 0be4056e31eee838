"""The page's schema check against jsonschema's, its formats against the standards' examples, and a pattern for ever."""

import json
import random
import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from playwright.sync_api import Page, expect

from services.store.base import Sessions
from tests.browser.conftest import OpenAs
from tests.browser.test_review_session import shows
from tests.console import seed

CHECKED = """async (pairs) => {
  const { problemsOf } = await import("/static/review/schema.js");
  return pairs.map(([schema, value]) => problemsOf(JSON.stringify(value), schema, "").length === 0);
}"""
VALUES: list[Any] = [
    None, True, False, 0, 1, -2, 2.5, 9, "", "a", "ab12", "naïve 😀", [], [1], [1, 1], ["a", 2, None], {}, {"a": 1},
    {"a": "x", "b": 2}, {"b": [], "c": None}, {"x1": 1, "a": 2}, [{"a": 1}, {"a": 1}],
    [{"a": 1, "b": 2}, {"b": 2, "a": 1}],
]  # fmt: skip
PARTS: list[dict[str, Any]] = [
    {"type": "integer"}, {"type": ["string", "null"]}, {"type": "object"}, {"type": "array"}, {"type": "number"},
    {"enum": [1, "a", {"b": 2, "a": 1}]}, {"const": {"a": 1}}, {"minimum": 1}, {"exclusiveMaximum": 2},
    {"multipleOf": 0.5},
    {"minLength": 1}, {"maxLength": 7}, {"pattern": "^[a-z]+[0-9]*$"}, {"pattern": "\\p{L}"}, {"minItems": 1},
    {"maxItems": 1}, {"uniqueItems": True}, {"prefixItems": [{"type": "integer"}], "items": False},
    {"items": {"type": "integer"}}, {"contains": {"type": "integer"}}, {"contains": {"const": 1}, "minContains": 2},
    {"contains": {"type": "string"}, "maxContains": 1, "minContains": 0}, {"required": ["a"]},
    {"properties": {"a": {"type": "integer"}}}, {"properties": {"a": {}}, "additionalProperties": False},
    {"patternProperties": {"^x": {"minimum": 2}}, "additionalProperties": {"type": "integer"}},
    {"propertyNames": {"maxLength": 1}}, {"minProperties": 2}, {"maxProperties": 1},
    {"dependentRequired": {"a": ["b"]}}, {"dependentSchemas": {"b": {"required": ["c"]}}},
    {"not": {"type": "string"}}, {"if": {"type": "string"}, "then": {"minLength": 2}, "else": {"type": "object"}},
    {"$defs": {"short": {"maxLength": 2}}, "$ref": "#/$defs/short"}, {"properties": {"a": False}},
]  # fmt: skip


def drawn(dice: random.Random) -> dict[str, Any]:
    """A few keywords together, or alternatives of them."""
    one = dice.choice(PARTS) | {key: value for key, value in dice.choice(PARTS).items() if key != "$defs"}
    if "$ref" in one:
        one |= {"$defs": {"short": {"maxLength": 2}}}
    return one if dice.random() < 0.7 else {dice.choice(("anyOf", "oneOf", "allOf")): dice.sample(PARTS[:-2], 2)}


def test_the_page_and_jsonschema_say_the_same(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        seed.project(session)
    dice = random.Random(5)
    pairs = [(schema, value) for schema in PARTS for value in VALUES]
    pairs += [(drawn(dice), dice.choice(VALUES)) for _ in range(3000)]
    page = open_as("ada@example.org", "/p/entities/review")
    said = page.evaluate(CHECKED, pairs)
    known = [_unicode(schema).is_valid(value) for schema, value in pairs]
    wrong = [
        (schema, value, mine) for (schema, value), mine, right in zip(pairs, said, known, strict=True) if mine != right
    ]
    assert wrong == []
    assert 0.2 < sum(known) / len(known) < 0.8


def _unicode(schema: dict[str, Any]) -> Draft202012Validator:
    """Python's patterns know no \\p{L}; what stands for it here is letters alone."""
    text = re.sub(r"\\\\p\{L\}", r"[^\\\\W\\\\d_]", json.dumps(schema))
    return Draft202012Validator(json.loads(text))


FORMATS = [
    ("date", ["2024-02-29", "2000-02-29"], ["2023-02-29", "1900-02-29", "2024-13-01", "2024-1-1", "29-02-2024", ""]),
    ("time", ["12:00:00Z", "23:59:60+02:00", "01:02:03.5z"], ["24:00:00Z", "12:00Z", "12:00:00"]),
    (
        "date-time",
        ["2024-01-31T10:00:00Z", "1990-12-31t23:59:60.5-08:00"],
        ["2024-01-31 10:00:00Z", "2024-01-32T10:00:00Z"],
    ),
    ("duration", ["P1D", "PT5M", "P1Y2M3DT4H", "P2W"], ["P", "PT", "1D", "P1S"]),
    ("email", ["ada@example.org", "a.b+c@sub.example.org"], ["ada", "@example.org", "a b@example.org", "ada@-x.org"]),
    ("hostname", ["example.org", "a", "x-1.example"], ["-a", "a-", "a..b", "a_b", "a" * 64]),
    ("ipv4", ["1.2.3.4", "255.255.255.255"], ["256.1.1.1", "1.2.3", "01.2.3.4", "1.2.3.4.5"]),
    ("ipv6", ["::1", "2001:db8::8a2e:370:7334", "::ffff:1.2.3.4"], ["1", ":::", "12345::", "1.2.3.4"]),
    ("uuid", ["01a22c3e-e777-7989-84fa-ca08341dc734"], ["01a22c3e", "01a22c3ee777798984faca08341dc734"]),
    ("uri", ["https://example.org/a?b#c", "urn:isbn:12"], ["example.org", "//example.org", "http://a b"]),
    ("nothing known", ["anything"], []),
]


def test_formats_are_the_standards(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        seed.project(session)
    page = open_as("ada@example.org", "/p/entities/review")
    for name, good, bad in FORMATS:
        pairs = [({"format": name}, text) for text in (*good, *bad)]
        assert page.evaluate(CHECKED, pairs) == [True] * len(good) + [False] * len(bad), name


SLOW = '{"properties": {"a": {"pattern": "^(a+)+$"}, "b": {"format": "date"}}}'


@pytest.mark.timeout(60)
def test_a_pattern_that_never_ends_holds_up_nobody(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        project = seed.project(session)
        for place, (output, text) in enumerate(((f'{{"a": "{"a" * 40}!"}}', SLOW), ('{"b": "4 March"}', SLOW))):
            wanted = {"grammar": {"kind": "json_schema", "text": text}}
            seed.item(session, seed.interaction(session, project.id, output=output, parameters=wanted), priority=place)
    page = open_as("ada@example.org", "/p/entities/review")
    expect(page.locator("[data-check]")).to_have_text("not checked: its schema takes too long")
    page.keyboard.press("x")
    page.keyboard.press("Enter")
    shows(page, '{"b": "4 March"}')
    expect(page.locator("[data-check]")).to_have_text("b is no date")
    _edit(page, '{"b": "2024-03-04"}')
    expect(page.locator("[data-check]")).to_have_text("Follows its schema")
    _edit(page, '{"b": "2024-03-04", "a": "b"}')
    expect(page.locator("[data-check]")).to_have_text("a does not match ^(a+)+$")


def _edit(page: Page, text: str) -> None:
    page.keyboard.press("e")
    page.locator("[data-editor]").fill(text)
    page.keyboard.press("Escape")
