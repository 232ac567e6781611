"""Preference data to token pairs: `prepare` is the way in."""

from trainer.data.check import BadData, Finding, Severity, UnreadableData
from trainer.data.pairs import Pair, PairSet
from trainer.data.prepare import Prepared, prepare
from trainer.data.summary import DataReport
from trainer.data.tokenizer import TokenizerError, load_tokenizer

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
