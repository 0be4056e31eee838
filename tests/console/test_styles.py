"""One style sheet, several authors: no rule says again what another says."""

import re
from collections import Counter

from services.console.views import WEB


def rules() -> list[tuple[str, str]]:
    """Where a rule stands (the at-rules around it), and what it is for."""
    sheet = re.sub(r"/\*.*?\*/", "", (WEB / "static" / "app.css").read_text(), flags=re.DOTALL)
    found, around, said = [], [], ""
    for character in sheet:
        if character == "{":
            if not said.strip().startswith("@"):
                found.append((" ".join(around), " ".join(said.split())))
            around.append(said.strip())
            said = ""
        elif character in "};":
            if character == "}":
                around.pop()
            said = ""
        else:
            said += character
    assert around == [], "a brace is not closed"
    return found


def test_no_rule_is_there_twice() -> None:
    """The second would quietly win on pages its author never looked at."""
    assert [rule for rule, times in Counter(rules()).items() if times > 1] == []
