"""axe-core in a page: what keeps people with other eyes, ears or hands from using it.

`vendor/axe.min.js` is the unchanged file of the npm package axe-core 4.14.1 (MPL-2.0, `vendor/axe.LICENSE.txt`). It is
run through the browser's debugger, which the page's content policy does not bind.
"""

from functools import cache
from pathlib import Path

from playwright.sync_api import Page

VENDOR = Path(__file__).parent / "vendor"
GRAVE = ("serious", "critical")
ASK = """
async ([impacts, rules]) => {
  const runOnly = rules.length ? { runOnly: { type: "rule", values: rules } } : {};
  // What is preloaded, style sheets, only experimental rules read.
  const options = { resultTypes: ["violations"], preload: false, ...runOnly };
  const { violations } = await axe.run(document, options);
  return violations.filter((one) => impacts.includes(one.impact)).flatMap((one) => one.nodes.map(
    (node) => `${one.impact} ${one.id} at ${node.target.join(" ")}: ${node.any[0]?.message ?? one.help}`));
}
"""


@cache
def source() -> str:
    """The script, read once."""
    return (VENDOR / "axe.min.js").read_text()


def grave(page: Page, *rules: str) -> list[str]:
    """The serious and critical findings on the page as it stands, in words; none when it is fine.

    With `rules` only what these of axe's rules find.
    """
    if not page.evaluate("typeof window.axe === 'object'"):
        page.evaluate(source())
    found: list[str] = page.evaluate(ASK, [list(GRAVE), list(rules)])
    return found
