"""What people have on disk becomes examples: readers, records, an index of tokens, sources of batches."""

from sfumato.training.data.dataset import Dataset, FileSource, held_out_of, open_data
from sfumato.training.data.examples import LengthLimit
from sfumato.training.data.index import ReadingProgress
from sfumato.training.data.mixed import MixedSource
from sfumato.training.data.source import Source
from sfumato.training.data.sudoku import SudokuSource

__all__ = [
    "Dataset",
    "FileSource",
    "LengthLimit",
    "MixedSource",
    "ReadingProgress",
    "Source",
    "SudokuSource",
    "held_out_of",
    "open_data",
]
