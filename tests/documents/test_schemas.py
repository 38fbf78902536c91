"""The JSON Schemas under docs/schemas, against documents that the models accept or refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from cenacle.documents import Document, Envelope
from cenacle.documents.base import Frozen

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"


def schema_of(document: Frozen) -> Any:
    name = type(document).__name__
    kebab = "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")
    return json.loads((SCHEMAS / f"{kebab}.json").read_text("utf-8"))


def test_every_document_has_its_schema(example: tuple[str, Document]) -> None:
    _, document = example
    schema = schema_of(document)
    names = {info.alias or name for name, info in type(document).model_fields.items()}
    assert set(schema["properties"]) == names
    assert schema["additionalProperties"] is False
    assert schema["x-media-type"] == type(document).media_type


def test_the_schema_accepts_a_real_example(example: tuple[str, Document]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    _, document = example
    schema, fields = schema_of(document), document.to_fields()
    validator = jsonschema.Draft202012Validator
    validator.check_schema(schema)
    validator(schema).validate(fields)
    for name in fields:
        for altered in (
            {**fields, name: object},
            {**fields, name + "x": fields[name]},
        ):
            with pytest.raises(jsonschema.ValidationError):
                validator(schema).validate(altered)


def test_the_schema_refuses_what_the_model_refuses(contract_example: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads((SCHEMAS / "contract.json").read_text("utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(contract_example)
    for path, value in (
        (("parties", "Not A Name"), "sha256:" + "0" * 64),
        (("assets", "a", "digest"), "sha256:00"),
        (("job", "recipe", "epochs"), 0),
        (("job", "recipe", "unknown"), 1),
        (("enclave", "reference", "psychic"), {"package": ["sha256:" + "0" * 64]}),
        (("approval",), {"none_of": ["clinic"]}),
        (("outputs",), []),
    ):
        altered = copy.deepcopy(contract_example)
        place = altered
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(altered)


def test_the_schema_of_an_envelope(examples: dict[str, Document], signer: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads((SCHEMAS / "envelope.json").read_text("utf-8"))
    for document in examples.values():
        fields = Envelope.sign(document, signer("clinic")).to_fields()
        jsonschema.Draft202012Validator(schema).validate(fields)
