"""`make house`: the figures of the source that tests/docs holds, the import contracts and the words, in one table."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from tests.docs.test_house import LARGEST_FOLDER, LONGEST_MODULE, MODULES, ROOT, SHORTEST_MEDIAN, lines

WORDS = Path(__file__).parent / "test_code_style.py"
"""The test that names the words which must not return."""


def figures() -> list[tuple[str, str, str]]:
    """What is measured, what was found, what is allowed."""
    named = [module for module in MODULES if module.name != "__init__.py"]
    sizes = {module: lines(module) for module in named}
    largest = max(sizes, key=lambda module: sizes[module])
    folder, held = Counter(module.parent for module in named).most_common(1)[0]
    names = Counter(module.name for module in named if module.name != "__main__.py")
    twice = sorted(name for name, count in names.items() if count > 1)
    return [
        ("modules", f"{len(MODULES)}, of them {len(MODULES) - len(named)} __init__.py", ""),
        ("lines", f"{sum(map(lines, MODULES)):,}", ""),
        ("median module, lines", f"{median(sizes.values()):g}", f"at least {SHORTEST_MEDIAN}"),
        ("largest module, lines", f"{sizes[largest]}: {largest.relative_to(ROOT)}", f"at most {LONGEST_MODULE}"),
        ("largest folder, modules", f"{held}: {folder.relative_to(ROOT)}", f"at most {LARGEST_FOLDER}"),
        ("names that occur twice", ", ".join(twice) or "none", "none"),
        (
            "import contracts",
            last_line([str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]),
            "0 broken",
        ),
        ("words that must not return", words(), "passed"),
    ]


def words() -> str:
    if not WORDS.is_file():
        return f"not checked: no {WORDS.name}"
    return last_line([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", str(WORDS)])


def last_line(command: list[str]) -> str:
    """What the command says last; its exit code too where that is not 0."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    line = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""])[-1].strip()
    return line if done.returncode == 0 else f"{line} (exit {done.returncode})"


def main() -> None:
    table = Table("", "found", "allowed", box=None)
    for row in figures():
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
