"""Which of the trained weights weight decay shrinks."""

import re

from torch import Tensor

from .sharding import shape_of

# Of a weight's name: biases end so, whatever stands before and behind it, and a norm's weight stands below the norm.
NEVER = re.compile(r"bias[^.]*$|norm\.weight$", re.IGNORECASE)


def is_decayed(name: str, weight: Tensor) -> bool:
    """Whether AdamW's weight decay shrinks this weight: matrices, as in transformers, and no vectors, norms and biases.
    Where these are stacked (the biases of gpt_oss' experts, the norms of cohere's heads), they are a matrix by shape
    alone. `name`: as in named_parameters."""
    return len(shape_of(weight)) > 1 and not NEVER.search(name)
