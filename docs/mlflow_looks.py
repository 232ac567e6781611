"""What MLflow's own pages show, read and driven in a real Chromium."""

from __future__ import annotations

import json
from typing import Any

from docs.chromium import Page

CARD = "[data-testid=experiment-view-compare-runs-card]"
CLOSE = "[...document.querySelectorAll('button[aria-label=Close]')].forEach(b => b.click())"
"""MLflow opens its assistant beside every page of a new profile."""
_PANE = """
  const named = (card) => card.querySelector('[title]')?.title ?? '';
  const cards = () => [...document.querySelectorAll('CARD')];
  const scrolls = (e) => e.scrollHeight > e.clientHeight && /auto|scroll/.test(getComputedStyle(e).overflowY);
  let pane = cards()[0];
  while (pane && !scrolls(pane)) pane = pane.parentElement;
  const pause = () => new Promise((done) => setTimeout(done, 100));
  const begin = async () => { pane?.scrollTo(0, 0); await pause(); };
  const further = async () => {
    const before = pane?.scrollTop;
    pane?.scrollBy(0, 250);
    await pause();
    return pane && pane.scrollTop > before;
  };
"""
"""MLflow makes charts only where they are looked at: what is below is met by scrolling."""
_TITLES = """
(async () => {PANE
  const found = new Set();
  await begin();
  do cards().forEach((card) => found.add(named(card))); while (await further());
  await begin();
  return [...found];
})()
"""
_SHOW = """
(async () => {PANE
  const wanted = () => cards().find((card) => named(card) === TITLE);
  if (!wanted()) await begin();
  while (!wanted()) if (!(await further())) return 'not there';
  wanted().scrollIntoView({block: 'center'});
  for (let k = 0; k < 300; k++) {
    if (wanted()?.querySelector('.main-svg, .parcoords svg')) return 'drawn';
    await pause();
  }
  return 'never drawn';
})()
"""


def open_charts(page: Page, address: str, *, width: int = 1800, height: int = 1250) -> None:
    """The page of a saved view, until its first charts are drawn."""
    page.look(address, width=width, height=height, ready=f"document.querySelectorAll('{CARD} .main-svg').length")
    page.run(CLOSE)


def titles(page: Page) -> list[str]:
    """The names that MLflow gives the charts of the open sections, in order."""
    return page.run(_filled(_TITLES))


def show(page: Page, title: str) -> str:
    """Scroll to a chart and wait until it is drawn: `drawn`, `never drawn` or `not there`."""
    return page.run(_filled(_SHOW).replace("TITLE", json.dumps(title)))


def _filled(script: str) -> str:
    return script.replace("PANE", _PANE).replace("CARD", CARD)


def rows(page: Page) -> list[str]:
    """The names of the runs in the list beside the charts."""
    found: Any = page.run("[...document.querySelectorAll('[role=row] a')].map((a) => a.textContent.trim())")
    return list(dict.fromkeys(found))
