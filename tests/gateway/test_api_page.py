"""docs/api.md names every field a completion takes, and no other."""

import re
from pathlib import Path

from services.gateway.bodies import NEUTRAL, ChatBody, TextBody

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()
IGNORED = {"metadata", "store", "service_tier", "safety_identifier"}


def test_the_table_of_fields_is_the_bodies() -> None:
    table = PAGE.split("## Chat and text completions")[1].split("\n\n`metadata`")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    taken = {*ChatBody.__struct_fields__, *TextBody.__struct_fields__} - IGNORED - set(NEUTRAL)
    assert named == {field for field in taken if not field.startswith("prompt_cache")}
