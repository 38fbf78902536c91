"""What a served model may tell, and contracts that serve."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.documents import Contract, OutputPolicy, ServeJob, ServingTerms
from cenacle.documents.base import sha256_digest
from cenacle.errors import DocumentError

Scenario = Any  # of conftest, which tests cannot import
Fields = dict[str, Any]

JOB: Fields = {
    "type": "serve",
    "model": "a",
    "outputs": {"form": "top-k", "k": 3, "decimals": 2},
    "tickets": "hospital-a",
}


@st.composite
def policies(draw: st.DrawFn) -> OutputPolicy:
    form = draw(st.sampled_from(["label", "top-k", "scores"]))
    fields: Fields = {"form": form}
    if form == "top-k":
        fields["k"] = draw(st.integers(1, 5))
    if form != "label" and (decimals := draw(st.none() | st.integers(0, 9))) is not None:
        fields["decimals"] = decimals
    return OutputPolicy.from_fields(fields)


@given(policies(), policies(), policies())
def test_telling_less_is_an_order(a: OutputPolicy, b: OutputPolicy, c: OutputPolicy) -> None:
    assert a.tells_at_most(a)
    if a.tells_at_most(b) and b.tells_at_most(c):
        assert a.tells_at_most(c)
    if a.tells_at_most(b) and b.tells_at_most(a):
        assert a == b


@given(policies())
def test_between_the_label_and_all_scores(policy: OutputPolicy) -> None:
    assert OutputPolicy(form="label").tells_at_most(policy)
    assert policy.tells_at_most(OutputPolicy(form="scores"))
    assert policy.in_words()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"form": "top-k"}, "k belongs to top-k"),
        ({"form": "label", "k": 1}, "k belongs to top-k"),
        ({"form": "scores", "k": 1}, "k belongs to top-k"),
        ({"form": "label", "decimals": 2}, "a label has no decimals"),
        ({"form": "top-k", "k": 0}, "k"),
        ({"form": "top-k", "k": 1001}, "k"),
        ({"form": "scores", "decimals": -1}, "decimals"),
        ({"form": "scores", "decimals": 10}, "decimals"),
        ({"form": "logits"}, "form"),
        ({}, "form"),
    ],
)
def test_policies_that_are_refused(fields: Fields, problem: str) -> None:
    with pytest.raises(DocumentError) as caught:
        OutputPolicy.from_fields(fields)
    assert problem in caught.value.what


def test_terms_are_strict_by_default() -> None:
    terms = ServingTerms()
    assert (terms.outputs.form, terms.tickets) == ("label", True)
    assert "with a ticket that the owner signed" in terms.in_words()
    assert "the label alone" in terms.in_words()


def put(*path: str, value: Any) -> Callable[[Fields], None]:
    def apply(fields: Fields) -> None:
        for key in path[:-1]:
            fields = fields[key]
        fields[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (put("job", "model", value="b"), "the job uses b, not listed under assets"),
        (put("job", "tickets", value="stranger"), "tickets name stranger"),
        (put("job", "max_batch", value=0), "max_batch"),
        (put("job", "max_wait_ms", value=-1.0), "max_wait_ms"),
        (put("job", "memory_mb", value=0), "memory_mb"),
        (put("job", "front", value="front.onnx"), "front"),
        (put("job", "program", value="a"), "unknown field"),
        (put("offload", value={"scheme": "lowrank"}), "a served model is not offloaded"),
        (
            put("outputs", value=[{"name": "model", "kind": "model", "recipient": "clinic"}]),
            "serving makes only metrics",
        ),
    ],
)
def test_contracts_that_are_refused(
    scenario: Scenario, change: Callable[[Fields], None], problem: str
) -> None:
    fields = scenario(job=copy.deepcopy(JOB)).build()[0].to_fields()
    Contract.from_fields(copy.deepcopy(fields))
    change(fields)
    with pytest.raises(DocumentError) as caught:
        Contract.from_fields(fields)
    assert problem in caught.value.what


def test_an_asset_that_is_not_served_does_not_belong(scenario: Scenario) -> None:
    fields = scenario(job=copy.deepcopy(JOB)).build()[0].to_fields()
    fields["assets"]["b"] = {"digest": "sha256:" + "1" * 64, "owner": "hospital-b"}
    with pytest.raises(DocumentError, match="does not use b; remove from assets"):
        Contract.from_fields(fields)


def test_a_privacy_plan_is_not_for_serving(scenario: Scenario) -> None:
    fields = scenario(job=copy.deepcopy(JOB)).build()[0].to_fields()
    fields["privacy"] = {
        "epsilon": 1.0,
        "delta": 1e-5,
        "clipping_norm": 1.0,
        "noise_multiplier": 2.0,
        "sampling_probability": 0.1,
    }
    with pytest.raises(DocumentError, match="a privacy plan is for training"):
        Contract.from_fields(fields)


def test_what_serving_is(scenario: Scenario) -> None:
    contract = scenario(job=copy.deepcopy(JOB)).build()[0]
    job = contract.job
    assert isinstance(job, ServeJob)
    assert contract.use == "inference"
    assert contract.offload_permission == "enclave"
    assert job.program_digest().startswith("sha256:")
    other = job.model_copy(update={"sealed_only": True})
    assert other.program_digest() != job.program_digest()
    # What the measurement is of: every field, defaults written out.
    assert sha256_digest(b"{}") != job.program_digest()
    assert Contract.from_canonical(contract.canonical_bytes()) == contract
