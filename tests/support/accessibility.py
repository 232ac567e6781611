"""axe-core in a page: what hinders people who do not see it well, or who use no mouse."""

from importlib.util import find_spec
from pathlib import Path

from docs.chromium import PAINTED, Page

_PACKAGE = find_spec("axe_playwright_python")
"""Of the `test` extra, for its axe.min.js; Playwright, on which it depends, is not used."""
AXE = None if _PACKAGE is None or _PACKAGE.origin is None else Path(_PACKAGE.origin).with_name("axe.min.js")
MISSING = "axe-core is not installed: pip install -c constraints.txt '.[test]'"
_RUN = """(async () => {
  const rules = { "duplicate-id": { enabled: true } };
  const found = await axe.run({ exclude: [[".main-svg"]] }, { resultTypes: ["violations"], rules });
  return found.violations.flatMap((rule) => rule.nodes.map((node) => {
    const why = node.failureSummary.replaceAll(/\\s+/g, " ");
    return `${node.impact}: ${rule.id} at ${node.target.join(" ")}: ${why} ${node.html.slice(0, 200)}`;
  }));
})()"""
"""Rules of WCAG 2.2 A and AA and of good practice. Charts are drawings with a name; what is inside is no text."""


def hindrances(page: Page) -> list[str]:
    """What axe finds in the page as it is shown now, of any impact: rule, place and reason of each finding."""
    assert AXE is not None, MISSING
    page.run(PAINTED)
    if not page.run("'axe' in window"):
        page.run(f"{AXE.read_text(encoding='utf-8')}; true")
    return page.run(_RUN)
