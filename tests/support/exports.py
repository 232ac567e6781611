"""Exports that are compared with their trials."""

from pathlib import Path
from typing import Any

from trainer.config.trial import TrialConfig
from trainer.data import prepare
from trainer.data.tokenization import load_tokenizer
from trainer.evaluation.export_check import compare_export
from trainer.models.model_files import Exported, export_model


def compared(
    run: Path,
    config: TrialConfig,
    cache: Path,
    to: Path,
    *,
    merge: bool = False,
    trust_remote_code: bool = False,
    **more: Any,
) -> list[str]:
    """Export the run's model into `to`, compared; what was told."""
    logged: list[str] = []

    def check(exported: Exported) -> None:
        tokenizer = load_tokenizer(config.model, config.data, cache, trust_remote_code=trust_remote_code)
        pairs = prepare(config.data, config.model, cache, tokenizer).eval
        file = run / "eval_pairs.safetensors"
        logged.append(
            str(
                compare_export(
                    exported,
                    config,
                    pairs,
                    file,
                    tokenizer,
                    report_progress=logged.append,
                    trust_remote_code=trust_remote_code,
                )
            )
        )

    how: dict[str, Any] = {"merge": merge, "model": config.model, "temporary": cache, "check": check, **more}
    export_model(run / "model", to, trust_remote_code=trust_remote_code, **how)
    return logged
