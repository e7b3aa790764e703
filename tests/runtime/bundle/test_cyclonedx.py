"""The list of what is installed: its form, its licences, the same again from the same."""

from email.message import Message

import pytest

from m0kit.bundle.cyclonedx import Component, document, licence_of

M0KIT = Component("m0kit", "1", "Apache-2.0", kind="application")
NUMPY = Component("numpy", "2", "BSD-3-Clause", ("ab" * 32,), file="wheels/numpy.whl")
MODEL = Component("m0", "f00d", "cc-by-nc-4.0", kind="machine-learning-model")


def test_a_document_lists_all_once_and_says_what_uses_them() -> None:
    found = document(M0KIT, [NUMPY, MODEL])
    assert (found["bomFormat"], found["specVersion"], found["version"]) == ("CycloneDX", "1.6", 1)
    assert found["metadata"]["component"]["purl"] == "pkg:pypi/m0kit@1"
    model, numpy = found["components"]
    assert "purl" not in model
    assert numpy["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert found["dependencies"] == [{"ref": "pkg:pypi/m0kit@1", "dependsOn": ["model:m0@f00d", "pkg:pypi/numpy@2"]}]


def test_the_same_parts_are_the_same_document_in_any_order_and_others_are_not() -> None:
    assert document(M0KIT, [NUMPY, MODEL]) == document(M0KIT, [MODEL, NUMPY])
    assert document(M0KIT, [NUMPY])["serialNumber"] != document(M0KIT, [MODEL])["serialNumber"]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("MIT AND Apache-2.0", {"expression": "MIT AND Apache-2.0"}),
        ("apache-2.0", {"expression": "Apache-2.0"}),
        ("MIT License", {"license": {"name": "MIT License"}}),
    ],
)
def test_a_licence_is_an_expression_or_a_name(said: str, told: dict[str, object]) -> None:
    (licence,) = Component("a", "1", said).to_dict()["licenses"]
    own = licence.get("license", licence)
    assert own.pop("acknowledgement") == "declared"
    assert licence == told


def metadata(**headers: str) -> Message:
    message = Message()
    for name, value in headers.items():
        message[name.replace("_", "-")] = value
    return message


def test_what_a_package_declares_is_an_expression_then_a_name_then_classifiers() -> None:
    osi = "License :: OSI Approved :: MIT License"
    assert licence_of(metadata(License_Expression="MIT", License="other", Classifier=osi)) == "MIT"
    assert licence_of(metadata(License="BSD", Classifier=osi)) == "BSD"
    assert licence_of(metadata(License="UNKNOWN", Classifier=osi)) == "MIT License"
    assert licence_of(metadata(License="The whole text " * 20, Classifier=osi)) == "MIT License"
    assert licence_of(metadata(Classifier="Topic :: Text")) is None
    assert "licenses" not in Component("a", "1").to_dict()
