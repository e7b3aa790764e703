"""Where the trained checkpoint that comes with the package lies, with its adapters and its evaluation set."""

from pathlib import Path
from typing import Final

SMALL: Final = Path(__file__).parents[1] / "data" / "small"
