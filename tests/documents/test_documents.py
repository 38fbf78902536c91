"""Every document: unknown fields, defaults, canonical form, stable digests."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cenacle.documents
from cenacle.attestation import Evidence
from cenacle.documents import Document, Party, Terms
from cenacle.documents.base import canonical_json, sha256_digest
from cenacle.errors import CenacleError, DocumentError
from tests.support.nested import Place, at, leaves, replaced

VECTORS = Path(__file__).parents[1] / "vectors" / "documents"


def paths(value: Any, here: Place = ()) -> list[Place]:
    """The place of every mapping inside ``value``."""
    found = [here] if isinstance(value, dict) else []
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            found += paths(item, (*here, key))
    return found


# Where anything may stand: what a program or an evidence kind defines, and signed envelopes.
FREE_FORM = {"layout", "parameters", "body"}
ENVELOPES = {"statement", "evidence", "contract", "parties", "assets", "broker"}


def test_every_public_document_has_an_example(examples: dict[str, Document]) -> None:
    public = {
        kind
        for name in cenacle.documents.__all__
        if inspect.isclass(kind := getattr(cenacle.documents, name))
        and issubclass(kind, Document)
        and kind is not Document
    }
    assert {type(document) for document in examples.values()} == public | {Evidence}


def test_media_types_differ(examples: dict[str, Document]) -> None:
    kinds = {type(document) for document in examples.values()}
    assert len({kind.media_type for kind in kinds}) == len(kinds)


def test_unknown_fields_are_refused_everywhere(example: tuple[str, Document]) -> None:
    name, document = example
    fields = document.to_fields()
    for path in paths(fields):
        altered = copy.deepcopy(fields)
        at(altered, path)["unknown"] = 1
        if FREE_FORM & set(path) or (name == "receipt-bundle" and ENVELOPES & set(path[:-1])):
            continue
        if name == "receipt-bundle" and path and path[0] in ENVELOPES - {"assets"}:
            continue
        with pytest.raises(DocumentError, match="unknown"):
            type(document).from_fields(altered)


def test_every_missing_field_is_refused_or_has_its_default(example: tuple[str, Document]) -> None:
    _, document = example
    kind = type(document)
    for name, info in kind.model_fields.items():
        altered = {k: v for k, v in document.to_fields().items() if k != (info.alias or name)}
        if info.is_required():
            with pytest.raises(DocumentError, match="missing"):
                kind.from_fields(altered)
        else:
            with contextlib.suppress(DocumentError):  # the default may contradict the rest
                shown = getattr(kind.from_fields(altered), name)
                assert shown == info.get_default(call_default_factory=True, validated_data={})


def test_defaults_are_written_out() -> None:
    written = Terms.from_fields({"expires": "2027-12-31"}).to_fields()
    assert written == {
        "kind": "terms",
        "version": 1,
        "protection": "tee",
        "programs": [],
        "recipes": [],
        "offload": ["enclave"],
        "privacy": {"epsilon": 0.0, "delta": 0.0},
        "outputs": [],
        "purposes": [],
        "uses": 1,
        "expires": "2027-12-31T23:59:59Z",
        "approval": "owner",
    }


def test_round_trips(example: tuple[str, Document]) -> None:
    _, document = example
    kind = type(document)
    for again in (
        kind.from_yaml(document.to_yaml()),
        kind.from_fields(document.to_fields()),
        kind.from_canonical(document.canonical_bytes()),
        kind.from_yaml(json.dumps(document.to_fields(), indent=2)),
    ):
        assert again == document
        assert again.digest == document.digest


def test_only_the_canonical_spelling_is_read(example: tuple[str, Document]) -> None:
    _, document = example
    kind, data, fields = type(document), document.canonical_bytes(), document.to_fields()
    reversed_fields = dict(reversed(list(fields.items())))
    for other in (
        b" " + data,
        data + b"\n",
        json.dumps(fields, sort_keys=True, ensure_ascii=False).encode(),
        json.dumps(reversed_fields, separators=(",", ":"), ensure_ascii=False).encode(),
        b"\xef\xbb\xbf" + data,
    ):
        with pytest.raises(DocumentError):
            kind.from_canonical(other)
    spelled = data.replace(b'"version":1', b'"version":1.0').replace(b'"type":"', b'"t\\u0079pe":"')
    if spelled != data:
        with pytest.raises(DocumentError):
            kind.from_canonical(spelled)


def test_a_default_left_out_is_not_canonical() -> None:
    terms = Terms.from_fields({"expires": "2027-12-31"})
    fields = terms.to_fields()
    for name in fields.keys() - {"expires"}:
        left_out = {k: v for k, v in fields.items() if k != name}
        with pytest.raises(DocumentError, match="canonical"):
            Terms.from_canonical(canonical_json(left_out))


def test_kinds_and_versions_do_not_mix(examples: dict[str, Document]) -> None:
    for document in examples.values():
        fields = document.to_fields()
        for other in {type(d) for d in examples.values()} - {type(document)}:
            with pytest.raises(DocumentError):
                other.from_fields(fields)
        if "version" in fields:
            for version in (0, 2, "1", 1.5, None):
                with pytest.raises(DocumentError, match="version"):
                    type(document).from_fields({**fields, "version": version})


def test_every_value_moves_the_digest(example: tuple[str, Document]) -> None:
    """Each leaf of the document, changed where another value is allowed."""
    _, document = example
    kind, fields = type(document), document.to_fields()
    moved = 0
    for path in leaves(fields):
        value = at(fields, path)
        for other in _others(value):
            altered = replaced(fields, path, other)
            with contextlib.suppress(DocumentError):
                assert kind.from_fields(altered).digest != document.digest
                moved += 1
                break
    assert moved >= 2


def _others(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, 0.5]
    if value is None:
        return []
    return [value[:-1] + ("0" if value[-1:] != "0" else "1"), value + "x", "2030-01-01"]


# --- golden digests --------------------------------------------------------------------------


def test_the_format_has_not_changed(example: tuple[str, Document]) -> None:
    """Signed documents outlive this program: a change here needs a new version number."""
    name, document = example
    vector = json.loads((VECTORS / f"{name}.json").read_text("utf-8"))
    assert document.canonical_bytes().decode() == vector["canonical"]
    assert document.digest == vector["digest"]
    assert type(document).media_type == vector["mediaType"]
    again = type(document).from_canonical(vector["canonical"].encode())
    assert again == document


def test_the_vectors_hold_by_themselves() -> None:
    files = sorted(VECTORS.glob("*.json"))
    assert len(files) == 13
    for file in files:
        vector = json.loads(file.read_text("utf-8"))
        assert sha256_digest(vector["canonical"].encode()) == vector["digest"]


# --- particular documents --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("signing_key", "", "wrong length"),
        ("signing_key", "AAAA", "wrong length"),
        ("signing_key", "A" * 43 + "=", "small order"),
        ("signing_key", "not base64", "base64"),
        ("hpke_key", "AAAA", "wrong length"),
        ("hpke_key", "A" * 1620 + "AA==", "malformed|wrong length"),
        ("hpke_suite", "X25519", "hpke_suite"),
        ("name", "Hospital", "name"),
        ("created", "now", "time"),
    ],
)
def test_a_party_s_keys_are_usable(
    examples: dict[str, Document], field: str, value: str, problem: str
) -> None:
    with pytest.raises(DocumentError, match=problem):
        Party.from_fields({**examples["party"].to_fields(), field: value})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"type": "program"}, "sealed as a package"),
        ({"content": "package"}, "sealed as a package"),
        ({"type": "program", "content": "package"}, "digest of its package"),
        ({"package": "sha256:" + "0" * 64}, "digest of its package"),
        ({"type": "weights"}, "type"),
        ({"content": "folder"}, "content"),
        ({"layout": {"rows": 2**60}}, "too large"),
    ],
)
def test_an_asset_is_consistent(
    examples: dict[str, Document], changes: dict[str, Any], problem: str
) -> None:
    asset = examples["asset"]
    with pytest.raises(DocumentError, match=problem):
        type(asset).from_fields({**asset.to_fields(), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"uses": -1},
        {"uses": 1.5},
        {"uses": "2"},
        {"privacy": {"epsilon": -0.1, "delta": 0.0}},
        {"privacy": {"epsilon": 1.0, "delta": 1.0}},
        {"privacy": {"epsilon": 1.0}},
        {"privacy": "unlimited"},
        {"privacy": None},
        {"protection": "none"},
        {"protection": ["tee"]},
        {"offload": "enclave"},
        {"outputs": ["weights"]},
        {"recipients": ["*"]},
        {"recipients": ["clinic@sha256:12"]},
        {"recipients": ["Clinic"]},
        {"recipes": ["*"]},
        {"recipes": ["sha256:00"]},
        {"programs": ["trainer"]},
        {"price": {"amount": -1, "currency": "EUR"}},
        {"price": {"amount": 1.5, "currency": "EUR"}},
        {"price": {"amount": 1, "currency": "eur"}},
        {"price": 5},
        {"approval": "none"},
        {"expires": None},
        {"purposes": [""]},
    ],
)
def test_terms_are_strict(changes: dict[str, Any]) -> None:
    with pytest.raises(DocumentError, match=next(iter(changes))):
        Terms.from_fields({"expires": "2027-12-31", **changes})


def test_wrapping_is_bound_to_the_very_terms(examples: dict[str, Document]) -> None:
    asset = examples["asset"]
    assert isinstance(asset, cenacle.documents.Asset)
    other = type(asset).from_fields(
        {**asset.to_fields(), "terms": {**asset.terms.to_fields(), "uses": 99}}
    )
    assert asset.wrapping_context() != other.wrapping_context()


# --- fuzz ------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)


@given(st.data())
@settings(max_examples=300)
def test_mutated_documents(examples: dict[str, Document], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(examples)))
    document = examples[name]
    fields = document.to_fields()
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(leaves(fields)))
        inner = data.draw(st.integers(1, len(path)))
        place = at(fields, path[: inner - 1])
        place[path[inner - 1]] = data.draw(values)
    try:
        parsed = type(document).from_fields(fields)
    except CenacleError:
        return
    assert type(document).from_canonical(parsed.canonical_bytes()) == parsed
    assert type(document).from_yaml(parsed.to_yaml()) == parsed


@given(st.data())
@settings(max_examples=200)
def test_mutated_bytes(examples: dict[str, Document], data: st.DataObject) -> None:
    document = examples[data.draw(st.sampled_from(sorted(examples)))]
    altered = bytearray(document.canonical_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
    for parse in (type(document).from_canonical, type(document).from_yaml):
        with contextlib.suppress(CenacleError):
            assert isinstance(parse(bytes(altered)), Document)
