"""Where the trained checkpoint that comes with the package lies, with its adapters and its evaluation set.

Owns also where small-massive lies: in the repository and not in the package, whose wheel it would double.
"""

import shutil
from pathlib import Path
from typing import Final

from m0kit.errors import CheckpointError

SMALL: Final = Path(__file__).parents[1] / "data" / "small"
MASSIVE: Final = Path(__file__).parents[2] / "checkpoints" / "small-massive"


def copy_massive(folder: Path) -> None:
    """Copy the checkpoint small-massive into a folder that is there. Raises CheckpointError outside the repository."""
    if not (MASSIVE / "base").is_dir():
        raise CheckpointError(
            "small-massive is not a part of the installed package: it would double its size. Run this command in a "
            "clone of the repository, or make the checkpoint in a quarter of an hour: python -m "
            "m0kit_parity.small.massive --out OUT --work FOLDER"
        )
    shutil.copytree(MASSIVE / "base", folder, dirs_exist_ok=True)
