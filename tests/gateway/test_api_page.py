"""docs/api.md names every field a request takes, every scope and every error code, and no other field."""

import re
from pathlib import Path

import pytest
from starlette.routing import Route

from services.app import PUBLIC, declared_scope
from services.gateway.bodies import NEUTRAL, ChatBody, TextBody
from services.gateway.feedback import FeedbackBody
from services.gateway.metrics import Metrics
from services.gateway.routes import ROUTES
from services.gateway.tokenization import DetokenizeBody, TokenizeBody
from services.gateway.vector_bodies import ClassifyBody, EmbeddingBody, RerankBody, VectorBody

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/api.md").read_text()
IGNORED = {"metadata", "store", "service_tier", "safety_identifier"}
SHARED = set(VectorBody.__struct_fields__)
# What the gateway raises itself; `conflict` is the console's.
RAISING = [*sorted((ROOT / "services/gateway").glob("*.py")), ROOT / "services/app.py"]


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_table_of_fields_is_the_bodies() -> None:
    table = section("Chat and text completions").split("\n\n`metadata`")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    taken = {*ChatBody.__struct_fields__, *TextBody.__struct_fields__} - IGNORED - set(NEUTRAL)
    assert named == {field for field in taken if not field.startswith("prompt_cache")}


def test_the_table_of_neutral_fields_is_what_is_refused_otherwise() -> None:
    table = section("Chat and text completions").split("only where they change nothing")[1]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert named == set(NEUTRAL)


@pytest.mark.parametrize(
    ("title", "endpoint", "fields"),
    [
        ("Vectors", "embeddings", set(EmbeddingBody.__struct_fields__) - SHARED),
        ("Vectors", "classify", set(ClassifyBody.__struct_fields__) - SHARED),
        ("Vectors", "rerank", set(RerankBody.__struct_fields__) - SHARED),
        ("Tokens", "tokenize", set(TokenizeBody.__struct_fields__)),
        ("Tokens", "detokenize", set(DetokenizeBody.__struct_fields__)),
    ],
)
def test_the_smaller_endpoints_fields_are_their_bodies(title: str, endpoint: str, fields: set[str]) -> None:
    assert set(re.findall(rf"^\| {endpoint} \| `(\w+)` \|", section(title), re.MULTILINE)) == fields


def test_feedbacks_table_is_its_body() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", section("Feedback"), re.MULTILINE))
    assert named == set(FeedbackBody.__struct_fields__)


def test_every_endpoint_stands_beside_its_scope() -> None:
    rows = dict(re.findall(r"^\| (`?\w+`?) \| (`(?:GET|POST) .+?) \|$", PAGE, re.MULTILINE))
    told = {(scope.strip("`"), endpoint) for scope, row in rows.items() for endpoint in re.findall(r"`(.+?)`", row)}
    assert told == {
        ("none" if declared_scope(route) == PUBLIC else declared_scope(route), f"{method} {route.path}")
        for route in ROUTES
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }


def test_every_metric_is_explained() -> None:
    families = [family for family in Metrics().registry.collect() if not family.name.endswith("_created")]
    explained = set(re.findall(r"`((?:vllm|whet):\w+)`", section("Metrics")))
    assert {family.name for family in families} == explained


def test_every_code_the_gateway_answers_with_is_explained() -> None:
    codes = {code for file in RAISING for code in re.findall(r'code="(\w+)"', file.read_text())}
    codes |= set(re.findall(r'code = "(\w+)"', (ROOT / "services/errors.py").read_text())) - {"conflict"}
    explained = set(re.findall(r"`(\w+)`", section("Errors")))
    assert len(codes) > 15
    assert codes - explained == set()
