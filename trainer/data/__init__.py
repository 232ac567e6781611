"""Preference data to token pairs: `prepare`, `Prepared`, `PairDataset`."""

from trainer.data.data_findings import BadData, UnreadableData
from trainer.data.data_report import DataReport
from trainer.data.pair_dataset import PairDataset, check_rows
from trainer.data.preparation import Prepared, ScoreGaps, prepare, score_gaps
from trainer.data.tokenization import TokenizerError, load_tokenizer

__all__ = [
    "BadData",
    "DataReport",
    "PairDataset",
    "Prepared",
    "ScoreGaps",
    "TokenizerError",
    "UnreadableData",
    "check_rows",
    "load_tokenizer",
    "prepare",
    "score_gaps",
]
