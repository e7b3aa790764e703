"""docs/figures.md and what it is made of: each figure's tables with version, machine and date, kept as JSON beside it.

Owns both files; what is measured is `published.py`'s. A figure that was measured for this version on this machine is
not measured again.

    Page.read(Path("docs")).has("ranking", {"m0kit": "0.1.0", …})
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from m0kit.files import writing
from m0kit_parity.drawing.table import Rows, markdown

JSON: Final = "figures.json"
MARKDOWN: Final = "figures.md"
_INTRODUCTION: Final = """\
# Figures

This page is made by `make figures` (`m0kit figures`), which measures everything anew on the machine at hand;
`make figures QUICK=1` measures a little of each in some minutes. Machines are noisy and differ: below each table stand
the version, the machine and the day it is from."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure: tables, sentences that belong to the table before them, plots in files beside the page."""

    about: Mapping[str, Any]  # what it holds for: versions, machine, whether it was a quick run
    date: str
    parts: Sequence[Rows | str]
    plots: Sequence[str] = ()


@dataclass(slots=True)
class Page:
    """All figures that were measured, by name."""

    folder: Path
    figures: dict[str, Measured] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Page":
        """What is kept in a folder; nothing is no error."""
        path = folder / JSON
        kept = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        return cls(folder, {name: Measured(**figure) for name, figure in kept.items()})

    def has(self, name: str, about: Mapping[str, Any]) -> bool:
        """Whether it was measured for such a version and machine, quickly only where that is what is asked for."""
        if (kept := self.figures.get(name)) is None or not all((self.folder / plot).is_file() for plot in kept.plots):
            return False
        return about["quick"] >= kept.about["quick"] and {**kept.about, "quick": about["quick"]} == about

    def write(self, texts: Mapping[str, tuple[str, str]]) -> None:
        """Both files; `texts` are title and explanation of every figure, in order."""
        kept = {name: asdict(self.figures[name]) for name in texts if name in self.figures}
        with writing(self.folder / JSON) as file:
            file.write(json.dumps(kept, indent=1, ensure_ascii=False).encode() + b"\n")
        sections = [_INTRODUCTION]
        for name, (title, text) in texts.items():
            sections += [f"## {title}", text]
            if name in self.figures:
                sections += self._section(self.figures[name])
            else:
                sections.append("Not measured yet.")
        with writing(self.folder / MARKDOWN) as file:
            file.write("\n\n".join(sections).encode() + b"\n")

    def _section(self, figure: Measured) -> list[str]:
        parts = [part if isinstance(part, str) else markdown(part) for part in figure.parts]
        plots = [f"![plot]({plot})" for plot in figure.plots]
        return [*parts, *plots, f"*{told(figure)}*"]


def told(figure: Measured) -> str:
    """Version, machine and date in a line."""
    about = figure.about
    facts = [f"m0kit {about.get('m0kit')}", f"onnxruntime {about.get('onnxruntime')}", str(about.get("cpu"))]
    facts += [", ".join(about.get("features") or ()) or "no vector instructions known", f"{about.get('cores')} cores"]
    facts += [f"{about['memory'] / 1e9:.0f} GB"] if about.get("memory") else []
    facts += [f"{about.get('threads')} threads", figure.date, *(["a quick run"] if about.get("quick") else [])]
    return "; ".join(facts)
