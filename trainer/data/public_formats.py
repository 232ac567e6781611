"""Generate Python programs that convert public data sets of other formats into preference pairs.

Such rows are not converted implicitly: which answer is chosen, and how ties are treated, is the user's decision.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from textwrap import dedent

from trainer.config.trial import FileSource, GeneratedSource, HubSource, Source

_BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, slots=True)
class Conversion:
    """How a row of one format becomes a pair. `code` is the body of `pair(row)`; it returns None to drop the row."""

    columns: frozenset[str]
    """Columns by which the format is recognized."""
    code: str
    needs: str = ""
    """Modules that the code imports, separated by spaces."""


_CONVERSIONS = (
    Conversion(  # SHP
        frozenset({"history", "human_ref_A", "human_ref_B", "labels"}),
        """\
        a, b = row["human_ref_A"], row["human_ref_B"]
        chosen, rejected = (a, b) if row["labels"] == 1 else (b, a)
        return {"prompt": row["history"], "chosen": chosen, "rejected": rejected}
""",
    ),
    Conversion(  # PKU-SafeRLHF
        frozenset({"prompt", "response_0", "response_1", "better_response_id"}),
        """\
        better = row["better_response_id"]  # or safer_response_id
        return {
            "prompt": row["prompt"],
            "chosen": row[f"response_{better}"],
            "rejected": row[f"response_{1 - better}"],
        }
""",
    ),
    Conversion(  # HelpSteer3
        frozenset({"context", "response1", "response2", "overall_preference"}),
        """\
        if row["overall_preference"] == 0:
            return None
        a, b = row["response1"], row["response2"]
        chosen, rejected = (a, b) if row["overall_preference"] < 0 else (b, a)
        return {"prompt": row["context"], "chosen": chosen, "rejected": rejected}
""",
    ),
    Conversion(  # HelpSteer2; markers separate the turns of its longer prompts
        frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
        """\
        if row["preference_strength"] == 0:
            return None
        a, b = row["response_1"], row["response_2"]
        chosen, rejected = (a, b) if row["preference_strength"] < 0 else (b, a)
        parts = re.split(r"\\s*<extra_id_1>(User|Assistant)\\s*", "<extra_id_1>User\\n" + row["prompt"])[1:]
        prompt = [{"role": role.lower(), "content": text} for role, text in zip(parts[::2], parts[1::2])]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
""",
        "re",
    ),
    Conversion(  # Nectar; its prompts are in HH-RLHF's form
        frozenset({"prompt", "answers"}),
        """\
        best, *_, worst = sorted(row["answers"], key=lambda answer: answer["rank"])
        if best["rank"] == worst["rank"]:
            return None
        return {"prompt": row["prompt"], "chosen": best["answer"], "rejected": worst["answer"]}
""",
    ),
)


def conversion(source: Source, present: Collection[str]) -> str:
    """Return a Python program that writes the rows of `source` as pairs; "" if the format is not known.

    Args:
        source: The source of the rows.
        present: Names of its columns.
    """
    found = next((each for each in _CONVERSIONS if each.columns <= set(present)), None)
    loading = _loading(source)
    if found is None or not loading:
        return ""
    modules = "".join(f"    import {name}\n" for name in ("json", *found.needs.split()))
    return dedent(
        f"{modules}\n    from datasets import load_dataset\n\n\n"
        f"    def pair(row):\n{found.code}\n\n"
        f"    rows = {loading}\n"
        "    pairs = [made for row in rows if (made := pair(row))]\n"
        '    with open("pairs.jsonl", "w") as file:\n'
        '        file.writelines(json.dumps(made) + "\\n" for made in pairs)\n'
        '    print(f"{len(pairs)} pairs, {len(rows) - len(pairs)} rows without a preference left out")\n'
    )


def _loading(source: Source) -> str:
    match source:
        case FileSource():
            builder = next((b for suffix, b in _BUILDERS.items() if source.path.lower().endswith(suffix)), None)
            if builder is None:
                return ""
            return f'load_dataset("{builder}", data_files={json.dumps(source.path)}, split="train")'
        case HubSource():
            names = ", ".join(json.dumps(name) for name in (source.dataset, source.subset) if name)
            revision = f", revision={json.dumps(source.revision)}" if source.revision else ""
            return f"load_dataset({names}, split={json.dumps(source.split)}{revision})"
        case GeneratedSource():
            return ""
