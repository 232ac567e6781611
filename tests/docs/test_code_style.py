"""The words of the sources: the terms of the glossary, and none of the names that they replaced."""

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("trainer", "orchestrator", "dashboards", "benchmarks")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))

# Whole identifiers of the glossary's left column. Names that are ordinary words of the field elsewhere are not listed.
OLD_NAMES = {
    # trainer
    "Workshop": "TrainingSession", "Stock": "ResourceCache", "StartShelf": "ReferenceCache",
    "start_logps": "cached_logps", "start_weights": "initial_weights", "at_start": "initial_*",
    "LiveModel": "PolicyModel", "SharedBase": "SharedBaseModel", "model_identity": "model_fingerprint",
    "Material": "TrainingInputs", "Course": "UpdatePlan or LearningCurve", "rate_factor": "lr_lambda",
    "Exam": "HeldOutEvaluation", "Examiner": "Evaluator", "Slices": "ShardedParameters", "Totals": "MetricSums",
    "Verdict": "StopDecision or Judgement", "GO_ON": "CONTINUE", "Ending": "RunResult",
    "EndKind": "RunStatus or AttemptStatus", "find_outcome": "load_run_result", "Patience": "CancelToken",
    "let_go": "release", "Piece": "Shard", "Strand": "CausalSegment", "strands": "causal_segments",
    "PackedPlan": "PackingPlan", "Rows": "ChunkSize", "WholeUpdate": "UpdateLogps", "Needs": "RequiredStats",
    "Normaliser": "UpdateTotals", "COMMON_RULER": "COMPARISON_METRIC", "Raw": "RawRow",
    "Drawn": "SampledRow or SampledTrial", "Bad": "InvalidRow", "obtain": "get_or_create", "Kept": "JsonlStore",
    "place_of": "checkpoint_path", "places": "list_checkpoints", "Answer": "Completion", "Answerer": "TextGenerator",
    "Written": "GeneratedText", "Dialogued": "RewardInput", "given_prompts": "load_judge_prompts",
    "Likeness": "ModelArchitecture", "tiny_like": "tiny_model_like", "is_right": "is_correct",
    "handed_over": "iterate_in_thread", "left_as_found": "restore_model_state",
    "Watch": "EarlyStopping or StepCallbacks", "trl_lacks": "unsupported_by_trl", "old_names": "PARAMETER_ALIASES",
    "meaning_of": "alias_hint",
    # spec and search
    "NoSuchLeaf": "UnknownPath", "TWINS": "EQUIVALENT_PATHS", "DOOR": "SECTION_ORDER", "Elsewhere": "StorageUrl",
    "Shape": "ModelShape", "first_sentence": "first_error", "find_files": "resolve_paths", "Goal": "Objective",
    "check_ruler": "check_fixed_evaluation", "unmatched": "mismatched_paths", "Axis": "GridAxis", "Axes": "GridIndex",
    "endless": "is_continuous", "Given": "EnqueuedTrial", "Learner": "AdaptiveSampler", "judged_by": "pruning_metric",
    "dearest": "largest_config", "why_apart": "cannot_share_base", "sharing_of": "trials_per_process",
    "of_gpu": "gpu_share",
    # study
    "NotYet": "WaitForTrial", "Known": "TrialSnapshot", "Settled": "SweepTerms", "Policy": "SamplingPolicy",
    "waits_for": "blocking_trial", "Learning": "OptunaSampler", "Evolving": "CmaEsReplay", "Staged": "StagedSampler",
    "at_random": "sample_uniform", "Outside": "OutOfSpace", "Judge": "TrialPruner", "out_of_patience": "patient_reason",
    "Held": "RunningTrial", "Told": "LoggedMetrics or RemoteFailure", "settle": "resolve_outcome",
    "Issuer": "TrialIssuer", "Remembered": "OptunaTrials", "Store": "StudyDatabase", "is_made": "study_exists",
    "masked": "hide_password", "Ledger": "SweepRepository", "Queue": "TrialQueue", "put_down": "kill",
    "is_elsewhere": "is_remote", "still_mine": "check_fencing_token", "overspent": "budget_exceeded",
    "keep_judged": "save_judgement", "learned_micro_batch": "micro_batch_limit",
    "learn_micro_batch": "set_micro_batch_limit",
    # execution, driver, tracking, judge
    "Conductor": "TrialController", "Wishes": "StopConditions", "Hands": "TrialRequests", "held_over": "paused_notices",
    "left_over": "remaining_reason", "Beginning": "start_attempt", "Job": "AttemptTask", "Hall": "SharingSession",
    "Interrupt": "SignalHandler", "SameBug": "RepeatedBug", "Retries": "RetryPolicy",
    "given_up": "out_of_memory_message", "OneEach": "DedicatedWorkerPool", "Hosts": "SharedWorkerPool",
    "Host": "SharedWorker", "Relay": "ProxyTrainable", "Rank": "RankActor", "Ranks": "MultiProcessSession",
    "Said": "RankStep", "for_slots": "session_factory", "OpenWorkshop": "SessionFactory", "Copies": "MirrorUploader",
    "COPYING": "UPLOADING", "Preparing": "DataProcess", "Ready": "TrialInputs",
    "Asked": "ClusterAddress or EndpointUsage", "farewell": "print_summary", "Afterwards": "after_trial",
    "Upkeep": "MirrorMaintenance", "take_place": "claim_mirror", "tell_sweep": "start_parent_run",
    "tell_standing": "update_description", "tell_end": "end_parent_run", "check_room": "check_disk_space",
    "NoRoom": "DiskTooSmall", "check_elsewhere": "check_remote_storage", "bring": "restore_from_mirror",
    "Contest": "JudgeTask", "Contestant": "JudgedModel", "Opinion": "Preferences", "Judged": "JudgeResult",
    "Room": "JudgeContext", "Asking": "EndpointBatch", "understand": "parse_reply", "vote_in": "parse_vote",
    "TakesCourses": "BatchReceiver", "Unreachable": "TrackingUnavailable", "OutboxHeld": "OutboxLocked",
    "View": "ProgressView",
    # dashboards
    "TrialView": "TrialCurves", "TrialCase": "TrialFrame", "end_word": "state_label", "Certainty": "Significance",
    "how_sure": "significance_text", "Insight": "SweepAnalysis", "insight": "analyze", "Edge": "BoundaryOptimum",
    "told_apart": "has_clear_effect", "Level": "FindingLevel, CheckLevel or ParamLevel", "Next": "NextRange",
    "nextaxis": "next_ranges", "Standing": "SweepProgress", "sparks": "sparkline", "Contender": "ComparedSweep",
    "Words": "Paragraph",
}  # fmt: skip

# Words within identifiers (`was_told`, `StoryTeller`): old word -> the field's word.
OLD_PARTS = {
    "told": "logged, message", "said": "message, notice", "say": "log", "heard": "received", "story": "history",
    "elsewhere": "remote", "whoever": "", "leaf": "path, setting", "leaves": "params, paths", "wishes": "requests",
    "hands": "requests", "ruler": "comparison_metric", "verdict": "decision, judgement", "aside": "temporary, paused",
    "purity": "collision_prob", "shelf": "cache", "workshop": "session", "settled": "terms", "room": "space, context",
    "door": "section, loader", "house": "project", "nobody": "", "somebody": "",
}  # fmt: skip

# Words of prose: docstrings, comments, messages, pages.
OLD_WORDS = {
    r"told": "logged, reported, sent", r"said": "logged, reported", r"heard": "received", r"doors?": "section, loader",
    r"rooms?": "space, package", r"houses?": "project", r"whoever": "name the caller",
    r"go(?:es)? on|went on": "continue", r"stor(?:y|ies)": "history, log",
    r"(?:in|into|of) (?:the|its|a worker's) hands": "name the owner", r"elsewhere": "remote, in another ...",
    r"leaf|leafs": "setting", r"leaves of": "settings of", r"yours": "name the owner",
    r"somebody|nobody|somewhere": "name the process or user", r"ruler": "comparison metric",
    r"start models?": "initial model", r"start weights": "initial weights", r"verdicts?": "decision, judgement",
    r"(?<!of )courses?": "learning curve, metric history", r"wish(?:es)?": "request",
    r"given trials?": "enqueued trial", r"rule of knowing": "visibility rule", r"tokenis\w+": "tokeniz...",
    r"optimiser\w*": "optimizer", r"colours?": "color", r"normalis\w+": "normaliz...", r"goals?": "objective",
    r"settled": "fixed", r"twins?": "duplicate", r"aside": "to a temporary file, paused",
    r"voices?": "name the message", r"is worth (?:its|a|the)\b": "say what it saves",
}  # fmt: skip

# (file, word) that may stay: names on disk or in another program, and text about the words themselves.
ALLOWED = {
    # columns, keys and options
    ("orchestrator/folders.py", "aside"),
    ("orchestrator/study/database/enqueued_trials.py", "leaves"),
    ("orchestrator/judge/endpoint_client.py", "said"),
    ("trainer/objectives/pair_logps.py", "purity"),
    ("trainer/evaluation/reference_cache.py", "purity"),
    ("dashboards/diagnosis/findings.py", "leaf"),
    # examples of what not to write
    ("CONTRIBUTING.md", "told"),
    ("CONTRIBUTING.md", "story"),
    ("CONTRIBUTING.md", "house"),  # the command `make house`
    # the judge's prompt, whose text is part of the key of stored votes
    ("orchestrator/judge/endpoint_client.py", "verdict"),
    ("orchestrator/study/database/repository.py", "verdict"),
}

# What a newcomer searches for, and a module whose own docstrings must have it.
STRANGERS_GREP = {
    "early stopping": "orchestrator/study/pruning/early_stopping.py",
    "heartbeat": "orchestrator/study/database/driver_lease.py",
    "fencing token": "orchestrator/study/database/driver_lease.py",
    "retry": "orchestrator/execution/trial_retries.py",
    "out of memory": "orchestrator/execution/trial_retries.py",
    "win rate": "orchestrator/judge/win_rates.py",
    "learning curve": "orchestrator/study/pruning/pruning_rules.py",
    "stop request": "orchestrator/execution/user_requests.py",
    "release request": "orchestrator/execution/messages.py",
    "stop signal": "orchestrator/execution/stop_reasons.py",
}

_PROSE = re.compile("|".join(rf"(?<![\w.-])(?:{word})(?![\w-]|\.\w)" for word in OLD_WORDS), re.IGNORECASE)
_CODE = re.compile(r"`[^`]*`")
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a module names: variables, attributes, parameters, functions, classes."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=found) | ast.Attribute(attr=found) | ast.arg(arg=found):
                yield node.lineno, found
            case ast.FunctionDef(name=found) | ast.AsyncFunctionDef(name=found) | ast.ClassDef(name=found):
                yield node.lineno, found
            case ast.keyword(arg=str(found)):
                yield node.value.lineno, found
            case ast.alias(name=found, asname=other):
                yield node.lineno, other or found.rpartition(".")[2]
            case _:
                pass


def prose(text: str, tree: ast.AST) -> Iterator[tuple[int, int, str]]:
    """First line, last line and text of each comment and each string. A string of one word is a key, not prose."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.end[0], token.string
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
        id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
    }
    for node in ast.walk(tree):
        match node:
            case ast.JoinedStr(values=values):
                found = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in values)
            case ast.Constant(value=str(found)) if id(node) not in parts:
                pass
            case _:
                continue
        if " " in found.strip():
            yield node.lineno, node.end_lineno or node.lineno, found


def replacement(found: str) -> str:
    return next(new for old, new in OLD_WORDS.items() if re.fullmatch(old, found, re.IGNORECASE))


def old_prose(path: Path, first: int, last: int, text: str) -> Iterator[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for found in {match.group().lower() for match in _PROSE.finditer(_CODE.sub("", text))}:
        if (name(path), found) not in ALLOWED:
            number = next((n for n in range(first, last + 1) if found in lines[n - 1].lower()), first)
            yield f'{name(path)}:{number}: "{found}" -> {replacement(found)}'


def old_identifiers(path: Path, tree: ast.AST) -> Iterator[str]:
    for line, found in identifiers(tree):
        if found in OLD_NAMES and (name(path), found) not in ALLOWED:
            yield f"{name(path)}:{line}: {found} -> {OLD_NAMES[found]}"
        for part in {p.lower() for p in _PARTS.findall(found)} & OLD_PARTS.keys():
            if (name(path), part) not in ALLOWED:
                yield f"{name(path)}:{line}: {found}: {part} -> {OLD_PARTS[part] or 'name the thing'}"


def listed(found: Iterable[str]) -> str:
    return "\n".join(dict.fromkeys(found))


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_a_module_uses_the_words_of_the_field(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = [
        *old_identifiers(module, tree),
        *(line for where in prose(text, tree) for line in old_prose(module, *where)),
    ]
    assert listed(found) == ""


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_uses_the_words_of_the_field(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert listed(found for n, line in enumerate(lines, 1) for found in old_prose(page, n, n, line)) == ""


@pytest.mark.parametrize("sweep", SWEEPS, ids=name)
def test_the_comments_of_a_shipped_sweep_use_the_words_of_the_field(sweep: Path) -> None:
    lines = sweep.read_text(encoding="utf-8").splitlines()
    comments = [(n, line.partition("#")[2]) for n, line in enumerate(lines, 1) if "#" in line]
    assert listed(found for n, comment in comments for found in old_prose(sweep, n, n, comment)) == ""


@pytest.mark.parametrize(("phrase", "module"), STRANGERS_GREP.items())
def test_a_newcomers_search_ends_in_the_right_module(phrase: str, module: str) -> None:
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    assert any(phrase in " ".join(text.lower().split()) for text in docstrings), (
        f"no docstring of {module} has: {phrase}"
    )


def test_an_allowed_word_is_still_there() -> None:
    """What no longer needs its exception loses it."""
    unused = [
        (file, word) for file, word in sorted(ALLOWED) if word not in (ROOT / file).read_text(encoding="utf-8").lower()
    ]
    assert unused == []


def test_the_search_finds_old_words_where_they_are() -> None:
    text = '"""Who is told."""\nclass Wishes:\n    def was_told(self, key="told"):  # goes on\n        pass\n'
    tree, path = ast.parse(text), ROOT / "trainer" / "__init__.py"
    assert [line.split(": ", 1)[1] for line in old_identifiers(path, tree)] == [
        "Wishes -> StopConditions",
        "Wishes: wishes -> requests",
        "was_told: told -> logged, message",
    ]
    assert sorted(m.group().lower() for *_, found in prose(text, tree) for m in _PROSE.finditer(found)) == [
        "goes on",
        "told",
    ]
