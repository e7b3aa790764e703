"""A list of what is installed, as CycloneDX 1.6 in JSON. Owns its form, and what is said of licences.

    document(Component("m0kit", "0.1.0"), [Component("numpy", "2.4.6", "BSD-3-Clause", ("9a…",))])

It has no date, and its serial number is of its content: what is made again from the same files is the same list.
"""

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any, Final, Literal

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

_LONGEST: Final = 100  # of a licence's name; some packages have its whole text there
_CLASSIFIER: Final = "License :: "


@dataclass(frozen=True, slots=True)
class Component:
    """A package, or a model."""

    name: str
    version: str
    licence: str | None = None  # an SPDX expression, or what it is called
    sha256: tuple[str, ...] = ()  # of its file; of all files of the release where it may be any of them
    kind: Literal["application", "library", "machine-learning-model"] = "library"
    file: str | None = None

    @property
    def ref(self) -> str:
        """One that no other component has."""
        if self.kind == "machine-learning-model":
            return f"model:{self.name}@{self.version}"
        return f"pkg:pypi/{self.name}@{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """As the schema has it."""
        found: dict[str, Any] = {"type": self.kind, "bom-ref": self.ref, "name": self.name, "version": self.version}
        if self.kind != "machine-learning-model":
            found["purl"] = self.ref
        if self.sha256:
            found["hashes"] = [{"alg": "SHA-256", "content": digest} for digest in self.sha256]
        if self.licence:
            found["licenses"] = [_licence(self.licence)]
        if self.file:
            found["properties"] = [{"name": "m0kit:file", "value": self.file}]
        return found


def document(subject: Component, components: Iterable[Component]) -> dict[str, Any]:
    """The whole list of what is installed with `subject`."""
    parts = [each.to_dict() for each in sorted(components, key=lambda each: each.ref)]
    found: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": subject.to_dict()},
        "components": parts,
        "dependencies": [{"ref": subject.ref, "dependsOn": [part["bom-ref"] for part in parts]}],
    }
    return {**found, "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(found))}"}


def licence_of(metadata: Message) -> str | None:
    """What a package declares: an expression, else its short name, else the classifiers."""
    return declared(
        metadata.get("License-Expression"), metadata.get("License"), metadata.get_all("Classifier", [])
    )  # fmt: skip


def declared(expression: str | None, name: str | None, classifiers: Sequence[str]) -> str | None:
    """The first of them that says something short."""
    if expression:
        return expression
    if name and "\n" not in name.strip() and len(name.strip()) <= _LONGEST and name.strip() != "UNKNOWN":
        return name.strip()
    named = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith(_CLASSIFIER)]
    return " and ".join(named) or None


def _licence(said: str) -> Mapping[str, Any]:
    try:
        return {"expression": canonicalize_license_expression(said), "acknowledgement": "declared"}
    except InvalidLicenseExpression:
        return {"license": {"name": said, "acknowledgement": "declared"}}
