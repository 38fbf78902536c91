from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from cenacle.documents import Document, Receipt, Statement
from cenacle.documents.receipt import PREDICATE_TYPE, OutputRecord
from cenacle.errors import DocumentError


@pytest.fixture
def statement(examples: dict[str, Document]) -> Statement:
    document = examples["statement"]
    assert isinstance(document, Statement)
    return document


def test_is_an_in_toto_statement(statement: Statement) -> None:
    """Names and values of the in-toto attestation specification, Statement v1."""
    fields = statement.to_fields()
    assert fields.keys() == {"_type", "subject", "predicateType", "predicate"}
    assert fields["_type"] == "https://in-toto.io/Statement/v1"
    assert fields["predicateType"] == PREDICATE_TYPE
    assert re.fullmatch(r"https://[a-z.]+/[a-z]+/v\d+", PREDICATE_TYPE)
    assert isinstance(fields["predicate"], dict)
    assert fields["subject"]
    for subject, output in zip(fields["subject"], statement.predicate.outputs, strict=True):
        assert subject.keys() == {"name", "digest"}
        assert subject["name"] == output.name
        assert subject["digest"] == {"sha256": output.content.removeprefix("sha256:")}
        assert re.fullmatch("[0-9a-f]{64}", subject["digest"]["sha256"])
    assert Statement.media_type == "application/vnd.in-toto+json"


def test_passes_the_validator_of_in_toto(statement: Statement) -> None:
    reason = "in-toto-attestation is not installed"
    module = pytest.importorskip("in_toto_attestation.v1.statement", reason=reason)
    descriptor = pytest.importorskip("in_toto_attestation.v1.resource_descriptor", reason=reason)
    fields = statement.to_fields()
    subjects = [
        descriptor.ResourceDescriptor(name=subject["name"], digest=subject["digest"]).pb
        for subject in fields["subject"]
    ]
    theirs = module.Statement(subjects, fields["predicateType"], fields["predicate"])
    theirs.validate()
    assert theirs.pb.type == fields["_type"]


def test_names_are_those_of_in_toto_alone(statement: Statement) -> None:
    fields = statement.to_fields()
    fields["type"] = fields.pop("_type")
    with pytest.raises(DocumentError, match="type: unknown field"):
        Statement.from_fields(fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_type", "https://in-toto.io/Statement/v0.1"),
        ("predicateType", "https://slsa.dev/provenance/v1"),
        ("subject", []),
        ("predicate", {}),
        ("predicate", None),
    ],
)
def test_refuses_other_statements(statement: Statement, name: str, value: Any) -> None:
    with pytest.raises(DocumentError, match=name.removeprefix("_")):
        Statement.from_fields({**statement.to_fields(), name: value})


@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(lambda s: s[::-1], id="another order"),
        pytest.param(lambda s: s[:1], id="one left out"),
        pytest.param(lambda s: [*s, s[0]], id="one doubled"),
        pytest.param(lambda s: [{**s[0], "name": "other"}, s[1]], id="another name"),
        pytest.param(lambda s: [{**s[0], "digest": s[1]["digest"]}, s[1]], id="another digest"),
        pytest.param(lambda s: [{**s[0], "digest": {}}, s[1]], id="no digest"),
        pytest.param(
            lambda s: [{**s[0], "digest": {**s[0]["digest"], "sha1": "0" * 40}}, s[1]],
            id="one digest more",
        ),
        pytest.param(lambda s: [{**s[0], "digest": {"sha256": "AB" * 32}}, s[1]], id="capitals"),
        pytest.param(lambda s: [{**s[0], "uri": "file:x"}, s[1]], id="unknown field"),
    ],
)
def test_the_subjects_are_the_outputs(statement: Statement, alter: Any) -> None:
    fields = copy.deepcopy(statement.to_fields())
    fields["subject"] = alter(fields["subject"])
    with pytest.raises(DocumentError):
        Statement.from_fields(fields)


def test_is_made_from_the_receipt(statement: Statement) -> None:
    assert Statement.of(statement.predicate) == statement
    other = statement.predicate.model_copy(update={"outputs": statement.predicate.outputs[:1]})
    assert len(Statement.of(other).subject) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inputs", {}),
        ("outputs", []),
        ("measurements", {}),
        ("protection", "strong"),
        ("resumed", -1),
        ("privacy", ""),
        ("finished", "later"),
        ("contract", "study-7"),
    ],
)
def test_a_receipt_is_complete(statement: Statement, field: str, value: Any) -> None:
    with pytest.raises(DocumentError, match=field):
        Receipt.from_fields({**statement.predicate.to_fields(), field: value})


def test_an_output_key_is_bound_to_contract_name_and_file() -> None:
    contexts = {
        OutputRecord.wrapping_context(*args)
        for args in (("c", "n", "h"), ("d", "n", "h"), ("c", "m", "h"), ("c", "n", "i"))
    }
    assert len(contexts) == 4
