from __future__ import annotations

import inspect
import json
import pickle
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle import errors
from cenacle.errors import CenacleError, RefusedError

KINDS = [getattr(errors, name) for name in errors.__all__]
EXIT_CODES = {
    "CenacleError": 1,
    "InputError": 2,
    "DocumentError": 2,
    "DataError": 2,
    "VerificationError": 3,
    "SignatureError": 3,
    "SealError": 3,
    "EvidenceError": 3,
    "ProofError": 3,
    "IntegrityError": 3,
    "RefusedError": 4,
    "ConflictError": 5,
    "UnavailableError": 6,
    "AcceleratorError": 6,
    "EnclaveError": 7,
}


def test_every_error_of_the_module_is_public_and_has_its_exit_code() -> None:
    defined = {
        name
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, Exception)
    }
    assert defined == set(errors.__all__) == set(EXIT_CODES)
    assert {kind.__name__: kind.exit_code for kind in KINDS} == EXIT_CODES


def test_the_tree_at_the_top_of_the_module_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"^    ([│├└─ ]*)([A-Z]\w+Error|CenacleError)", line):
            depth = len(match[1]) // 4
            path = [*path[:depth], match[2]]
            drawn[match[2]] = path[-2] if depth else "Exception"
    assert drawn == {kind.__name__: kind.__bases__[0].__name__ for kind in KINDS}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "it broke"),
        ({"found": 3}, "it broke; found 3"),
        ({"expected": "4"}, "it broke; expected 4"),
        ({"remedy": "use 4"}, "it broke. Use 4"),
        (
            {"found": "x", "expected": "y", "remedy": "`cenacle log` tells"},
            "it broke; found x; expected y. `cenacle log` tells",
        ),
        ({"found": "", "remedy": ""}, "it broke; found . "),
        ({"found": 0, "expected": False}, "it broke; found 0; expected False"),
    ],
)
def test_diagnostics(fields: dict[str, Any], text: str) -> None:
    error = CenacleError("it broke", **fields)
    assert error.diagnostics() == str(error) == text


@pytest.mark.parametrize("kind", KINDS)
def test_crosses_a_boundary_unchanged(kind: type[CenacleError]) -> None:
    error = kind("it broke", found=1, expected="two", remedy="do this")
    if isinstance(error, RefusedError):
        error.clauses = [{"name": "purpose", "verdict": "failed"}]
    wire = json.loads(json.dumps(error.to_dict()))
    for again in (CenacleError.from_dict(wire), pickle.loads(pickle.dumps(error))):
        assert type(again) is kind
        assert again.to_dict() == error.to_dict()
        assert str(again) == str(error)
        assert again.exit_code == error.exit_code


@pytest.mark.parametrize(
    "name", ["Exception", "SystemExit", "os.system", "", None, 7, ["SealError"], "__import__"]
)
def test_unknown_classes_become_the_base(name: Any) -> None:
    error = CenacleError.from_dict({"error": name, "what": "x"})
    assert type(error) is CenacleError


def test_clauses_of_the_wrong_form_are_dropped() -> None:
    for clauses in (None, "no", 3, {"a": 1}):
        error = CenacleError.from_dict({"error": "RefusedError", "what": "x", "clauses": clauses})
        assert isinstance(error, RefusedError)
        assert error.clauses == []
    error = CenacleError.from_dict(
        {"error": "RefusedError", "what": "x", "clauses": [1, {"name": "a"}, None]}
    )
    assert isinstance(error, RefusedError)
    assert error.clauses == [{"name": "a"}]


def test_does_not_share_the_caller_s_list() -> None:
    clauses = [{"name": "a"}]
    error = RefusedError("x", clauses=clauses)
    clauses.clear()
    assert error.clauses == [{"name": "a"}]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
names = st.sampled_from(["error", "what", "found", "expected", "remedy", "clauses"])


@given(st.dictionaries(names, json_values))
@settings(max_examples=200)
def test_any_answer_of_a_hostile_broker_becomes_an_error(fields: dict[str, Any]) -> None:
    error = CenacleError.from_dict(fields)
    assert isinstance(str(error), str)
    assert type(CenacleError.from_dict(error.to_dict())) is type(error)


@given(st.sampled_from(sorted(EXIT_CODES)), st.dictionaries(names, json_values))
def test_any_fields_under_a_known_name_become_that_error(name: str, fields: dict[str, Any]) -> None:
    assert type(CenacleError.from_dict({**fields, "error": name})).__name__ == name
