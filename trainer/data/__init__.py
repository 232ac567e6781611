"""Preference data to token pairs: `prepare` is the way in."""

from trainer.data.data_report import DataReport
from trainer.data.pair_dataset import Pair, PairSet
from trainer.data.preparation import Prepared, prepare
from trainer.data.tokenization import TokenizerError, load_tokenizer
from trainer.data.validation import BadData, Finding, Severity, UnreadableData

__all__ = [
    "BadData",
    "DataReport",
    "Finding",
    "Pair",
    "PairSet",
    "Prepared",
    "Severity",
    "TokenizerError",
    "UnreadableData",
    "load_tokenizer",
    "prepare",
]
