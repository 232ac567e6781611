"""The report in a real Chromium: no error, no request, no sideways scroll, every chart drawn; and the commands."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.chromium import Chromium, browser, installed
from orchestrator.cli import main
from orchestrator.study.trial_records import Trial
from tests.support.accessibility import AXE, MISSING, hindrances
from tests.support.scripted_sweep import COMPLETE, DIVERGED, FAILED, PRUNED, Script, make_spec, run_sweep

DRAWN = "document.documentElement.dataset.drawn"
WIDE = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth"
SECTIONS = (
    "[...document.querySelectorAll('section')].filter((s) => s.getBoundingClientRect().height > 0).map((s) => s.id)"
)
EMPTY = "[...document.querySelectorAll('.chart')].filter((c) => !c.querySelector('.main-svg')).length"
CUT_TABLES = (
    "[...document.querySelectorAll('.scroll')].filter((s) => s.scrollWidth > s.clientWidth)"
    ".map((s) => `${s.scrollWidth} > ${s.clientWidth}: ${s.innerText.slice(0, 60)}`)"
)
TALL_ROWS = (
    "[...document.querySelectorAll('tr')].map((r) => [Math.round(r.getBoundingClientRect().height), r.innerText])"
    ".filter(([height]) => height > 120)"
)
ALWAYS = {"answer", "setup"}
ANY_TRIAL = ALWAYS | {"diagnosis", "curves", "collapse", "samples", "cost", "timeline", "trials"}
RICH = ANY_TRIAL | {"distance", "map", "interactions", "importance", "parallel", "length"}
PANELS = {
    "rich": RICH,
    "one": ANY_TRIAL | {"length"},
    "failed": ANY_TRIAL | {"map", "parallel"},
    "empty": ALWAYS,
    "both": (RICH - {"diagnosis", "timeline", "setup"}) | {"ranking"},
}
"""What each page shows to whoever opens it; `both` is a comparison."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    if installed() is None:
        pytest.skip("no Chromium on the PATH")
    with browser() as found:
        yield found


def rich(trial: Trial) -> Script:
    outcome = {3: PRUNED, 5: DIVERGED, 7: FAILED}.get(trial.number, COMPLETE)
    samples = ("<script>document.title='stolen'</script>", "<img src=https://example.org/x onerror=alert(1)>")
    return Script(quality=0.2 + 0.05 * trial.number, outcome=outcome, samples=samples)


WRAPPED = """[...document.querySelectorAll('th')].flatMap((cell) => {
  const letters = [], walk = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    for (let i = 0; i < walk.currentNode.data.length; i++) {
      const range = document.createRange();
      range.setStart(walk.currentNode, i); range.setEnd(walk.currentNode, i + 1);
      const box = range.getClientRects()[0];
      letters.push([walk.currentNode.data[i], box ? box.top : null]);
    }
  }
  return letters.slice(1).map(([letter, top], i) => [letters[i][0], letter, letters[i][1], top])
    .filter(([before, letter, above, top]) => above !== null && top !== null && top > above + 2)
    .map(([before, letter]) => `${before}|${letter} in ${cell.textContent}`);
})"""
"""Where headings break into lines: the characters around each break, and the heading."""
LONG_NAMES = {
    "loss.beta": {"choice": [2.0, 2.625]},
    "loss.gamma_beta_ratio": {"choice": [0.3, 0.125]},
    "training.learning_rate": {"choice": [3e-7, 1.25e-6]},
    "training.warmup_ratio": {"choice": [0.1]},
    "training.weight_decay": {"choice": [0.0]},
    "training.lr_scheduler_type": {"choice": ["constant_with_warmup"]},
    "training.gradient_checkpointing": {"choice": [True]},
}


@pytest.mark.browser
def test_tables_with_long_names_fit_the_page_and_headings_break_after_underscores_and_slashes_only(
    chromium: Chromium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path))
    further = (("eval_margins/logp_per_token", "maximize"), ("eval_logps_per_token/chosen", "maximize"))
    also = [{"metric": metric, "direction": direction} for metric, direction in further]
    spec = make_spec("long", LONG_NAMES, also=also)
    run_sweep(tmp_path, spec, rich)
    run_sweep(tmp_path, make_spec("other", LONG_NAMES), rich)
    assert main(["report", "long"]) == 0
    assert main(["compare", "long", "other", "--output", str(tmp_path / "both.html")]) == 0
    for path in (tmp_path / "long" / "report.html", tmp_path / "both.html"):
        page = chromium.page()
        page.look(path.as_uri(), width=1280, ready=DRAWN)
        page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert page.run(CUT_TABLES) == []
        breaks = page.run(WRAPPED)
        assert breaks, "the names are too short to show anything"
        assert [each for each in breaks if each[0] not in "_/ " and each[2] != " "] == []
        page.look(path.as_uri(), width=390, ready=DRAWN)
        page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert page.run(TALL_ROWS) == [], "a column of text is squeezed on a phone"
        assert page.run(WIDE) <= 0
        page.close()


@pytest.mark.browser
def test_reports_as_people_see_them(
    chromium: Chromium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATE_HOME", str(tmp_path))
    run_sweep(tmp_path, make_spec("rich", description="<b onclick=alert(1)>bold</b>"), rich)
    run_sweep(tmp_path, make_spec("one", {}), lambda _: Script())
    run_sweep(tmp_path, make_spec("failed"), lambda _: Script(outcome=FAILED))
    run_sweep(tmp_path, make_spec("empty"), lambda _: Script(), trials=0)
    for name in ("rich", "one", "failed", "empty"):
        assert main(["report", name]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / name / "report.html")
    assert main(["compare", "rich", "one", "--output", str(tmp_path / "both.html")]) == 0
    capsys.readouterr()
    assert main(["report", "rich", "--json", "--output", str(tmp_path / "other.html")]) == 0
    logged = json.loads(capsys.readouterr().out)
    assert (logged["file"], logged["best"]["trial"]) == (str(tmp_path / "other.html"), 11)
    assert {"rule", "title", "evidence", "next_step", "level"} <= set(logged["findings"][0])
    assert main(["suggest", "rich"]) == 0
    assert "# " in capsys.readouterr().out
    assert main(["suggest", "empty"]) == 3
    assert "no trial completed" in capsys.readouterr().err
    pages = {name: tmp_path / name / "report.html" for name in ("rich", "one", "failed", "empty")}
    for name, path in {**pages, "both": tmp_path / "both.html"}.items():
        for width, dark in ((390, False), (1280, True)):
            page = chromium.page()
            page.look(path.as_uri(), width=width, dark=dark, ready=DRAWN)
            assert page.seen.errors == [], name
            assert page.seen.requests == [], name
            assert page.run(WIDE) <= 0, f"{name} scrolls sideways at {width} px"
            if width == 1280:
                assert page.run(CUT_TABLES) == [], f"{name}: a table is wider than the page"
            assert page.run(EMPTY) == 0, f"{name}: a chart was not drawn"
            assert set(page.run(SECTIONS)) == PANELS[name], name
            assert page.run("document.title") == ("rich · one" if name == "both" else name)
            page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
            if AXE is not None:
                assert hindrances(page) == [], f"{name} at {width} px"
            page.close()
    if AXE is None:
        pytest.skip(MISSING)
