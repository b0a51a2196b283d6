"""Room `model`: a smaller copy of a model, by what it does on some text (Minitron, 2407.14679). It knows no data.

`sizes` says what can be asked for, `importance` measures, `choice` says what stays, `cut` makes the smaller parameters.
"""

from megadistill.prune.choice import Kept, choose
from megadistill.prune.cut import pruned_tensors
from megadistill.prune.importance import Importance, measure
from megadistill.prune.sizes import Sizes, pruned_config, pruned_sizes, sizes_of

__all__ = [
    "Importance",
    "Kept",
    "Sizes",
    "choose",
    "measure",
    "pruned_config",
    "pruned_sizes",
    "pruned_tensors",
    "sizes_of",
]
