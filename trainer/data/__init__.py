"""Preference data to token pairs: `prepare`, `Prepared`, `PairDataset`."""

from trainer.data.data_report import DataReport
from trainer.data.pair_dataset import Pair, PairDataset
from trainer.data.preparation import Prepared, prepare
from trainer.data.tokenization import TokenizerError, load_tokenizer
from trainer.data.validation import BadData, DataFinding, Severity, UnreadableData

__all__ = [
    "BadData",
    "DataFinding",
    "DataReport",
    "Pair",
    "PairDataset",
    "Prepared",
    "Severity",
    "TokenizerError",
    "UnreadableData",
    "load_tokenizer",
    "prepare",
]
