"""What people already have becomes a store: other programs' log-probabilities and hidden states."""

from store.imports.build import Imported, Target, import_answers, import_rows
from store.imports.distillkit import DistillKit
from store.imports.hidden_states import HiddenStates
from store.imports.logprobs import LogProbs
from store.imports.samples import Sample, Source, natural
from store.imports.teacher import imported_pass

__all__ = [
    "DistillKit",
    "HiddenStates",
    "LogProbs",
    "Imported",
    "Sample",
    "Source",
    "Target",
    "import_answers",
    "import_rows",
    "imported_pass",
    "natural",
]
