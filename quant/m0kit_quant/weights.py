"""Where weights come from, as the schemes see it: tensors by name, one at a time, as float32.

A checkpoint with its adapters merged is one such source, the data files of an fp32 artifact another.
"""

from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
EMBEDDING: Final = "model.embed_tokens.weight"  # its rows are looked up, not multiplied


class Weights(Protocol):
    """Tensors under the checkpoint's canonical names (those before transformers 4.52)."""

    def read(self, name: str) -> Float32:
        """The whole tensor in the checkpoint's own shape; matrices are (out, in). Not to be written to."""
        ...
