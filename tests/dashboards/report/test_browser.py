"""The report in a real Chromium: no error, no request, no sideways scroll, every chart drawn; and the commands."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.chromium import Chromium, browser, installed
from orchestrator.cli import main
from orchestrator.study.trial_records import Trial
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
ALWAYS = {"answer", "setup"}
ANY_TRIAL = ALWAYS | {"diagnosis", "curves", "collapse", "samples", "cost", "timeline", "trials"}
RICH = ANY_TRIAL | {"map", "importance", "parallel", "length"}
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
