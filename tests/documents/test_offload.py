"""Offload plans: every scheme, its bounds, and what terms must allow for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from cenacle.documents import Contract, all_met, failed
from cenacle.documents.base import canonical_json
from cenacle.documents.offload import PUBLIC_BASE
from cenacle.errors import DocumentError

Fields = dict[str, Any]
Scenario = Any  # of conftest, which tests cannot import

TWO = {"count": 2}
TRAINING: dict[str, Fields] = {
    "enclave": {"scheme": "enclave"},
    "measured": {"scheme": "measured"},
    "lowrank": {"scheme": "lowrank"},
    "permuted": {"scheme": "permuted"},
    "masked-training": {"scheme": "masked-training", "accelerators": TWO},
}
GRAPH = {
    "type": "graph",
    "nodes": [{"name": "output", "op": "linear", "out_features": 2}],
    "initial_weights": "b",
}


@pytest.fixture
def planned(contract_example: Fields) -> Callable[[Fields], Contract]:
    """The example contract under a plan."""

    def build(plan: Fields) -> Contract:
        return Contract.from_fields({**copy.deepcopy(contract_example), "offload": plan})

    return build


@pytest.fixture
def from_weights(contract_example: Fields) -> Callable[[Fields], Contract]:
    """The same, with a recipe that starts from an asset's weights."""

    def build(plan: Fields) -> Contract:
        fields = copy.deepcopy(contract_example)
        recipe = fields["job"]["recipe"]
        recipe["model"] = GRAPH
        recipe["data"]["assets"] = ["a"]
        return Contract.from_fields({**fields, "offload": plan})

    return build


@pytest.mark.parametrize("scheme", TRAINING)
def test_every_scheme_has_defaults_that_are_written_out(
    scheme: str, planned: Callable[[Fields], Contract]
) -> None:
    contract = planned(TRAINING[scheme])
    assert contract.offload.scheme == scheme
    again = Contract.from_canonical(contract.canonical_bytes())
    assert again == contract
    assert again.digest == contract.digest
    if scheme != "enclave":
        assert contract.to_fields()["offload"]["accelerators"]["kinds"] == ["process"]


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": "doubling", "max_rank": 16, "rounds": 2, "guard": 0.25},
        {"ranks": 4},
        {"ranks": {"conv1": 2, "conv2": 4}},
        {"noise": {"epsilon": 1.0, "delta": 1e-5, "clip": 2.5}},
    ],
)
def test_options_of_lowrank_keep_their_form(
    options: Fields, planned: Callable[[Fields], Contract]
) -> None:
    contract = planned({"scheme": "lowrank", "options": options})
    found = contract.to_fields()["offload"]["options"]
    assert canonical_json({k: found[k] for k in options}) == canonical_json(options)
    assert Contract.from_canonical(contract.canonical_bytes()) == contract


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        ({"scheme": "plain"}, "offload"),
        ({}, "offload"),
        ({"scheme": "enclave", "accelerators": TWO}, "unknown field"),
        ({"scheme": "enclave", "check": False}, "unknown field"),
        ({"scheme": "measured", "check": True}, "unknown field"),
        ({"scheme": "measured", "options": {}}, "unknown field"),
        ({"scheme": "permuted", "check": "yes"}, "check"),
        ({"scheme": "permuted", "accelerators": {"count": 0}}, "count"),
        ({"scheme": "permuted", "accelerators": {"count": 65}}, "count"),
        ({"scheme": "permuted", "accelerators": {"count": 1.5}}, "count"),
        ({"scheme": "permuted", "accelerators": {"kinds": []}}, "kinds"),
        ({"scheme": "permuted", "accelerators": {"kinds": ["tpu"]}}, "kinds"),
        ({"scheme": "permuted", "accelerators": {"kinds": ["cuda", "cuda"]}}, "named twice"),
        ({"scheme": "permuted", "options": {"rekey": 0}}, "rekey"),
        ({"scheme": "permuted", "options": {"coefficients": "integers"}}, "coefficients"),
        ({"scheme": "permuted", "options": {"seed": "0"}}, "unknown field"),
        ({"scheme": "permuted", "options": {"ranks": 2}}, "unknown field"),
        ({"scheme": "permuted", "allow_public_base": True}, "no initial_weights"),
        (
            {"scheme": "permuted", "resident": True, "options": {"coefficients": "general"}},
            "does not commute",
        ),
        ({"scheme": "lowrank", "resident": True}, "unknown field"),
        ({"scheme": "lowrank", "allow_public_base": True}, "unknown field"),
        ({"scheme": "lowrank", "options": {"ranks": 0}}, "ranks"),
        ({"scheme": "lowrank", "options": {"ranks": {"": 2}}}, "ranks"),
        ({"scheme": "lowrank", "options": {"ranks": {"conv1": 2000}}}, "ranks"),
        ({"scheme": "lowrank", "options": {"guard": 0.0}}, "guard"),
        ({"scheme": "lowrank", "options": {"guard": 1.5}}, "guard"),
        ({"scheme": "lowrank", "options": {"rounds": 17}}, "rounds"),
        ({"scheme": "lowrank", "options": {"noise": {"epsilon": 1.0}}}, "noise"),
        (
            {"scheme": "lowrank", "options": {"noise": {"epsilon": 0, "delta": 0.1, "clip": 1}}},
            "epsilon",
        ),
        ({"scheme": "masked-training"}, "two accelerators"),
        ({"scheme": "masked-training", "accelerators": {"count": 3}}, "two accelerators"),
        ({"scheme": "masked"}, "masked is for inference"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(
    plan: Fields, problem: str, planned: Callable[[Fields], Contract]
) -> None:
    with pytest.raises(DocumentError) as caught:
        planned(plan)
    assert problem in caught.value.what


def test_only_sgd_can_be_checked_where_accelerators_carry_it_out(
    contract_example: Fields,
) -> None:
    adam = {"type": "adam", "learning_rate": 0.01}
    sgd = {"type": "sgd", "learning_rate": 0.1, "momentum": 0.9}

    def made(optimizer: Fields, **plan: Any) -> Contract:
        contract_example["job"]["recipe"]["optimizer"] = optimizer
        contract_example["offload"] = {"scheme": "permuted", "resident": True, **plan}
        return Contract.from_fields(contract_example)

    with pytest.raises(DocumentError, match="cannot check adam"):
        made(adam)
    for contract in (made(adam, check=False), made(sgd), made(sgd, check=False)):
        assert Contract.from_canonical(contract.canonical_bytes()) == contract


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        ({"scheme": "measured"}, None),
        ({"scheme": "permuted"}, None),
        ({"scheme": "permuted", "allow_public_base": True}, None),
        ({"scheme": "lowrank", "options": {"ranks": 4}}, None),
        ({"scheme": "masked-training", "accelerators": {"count": 2}}, None),
        ({"scheme": "masked"}, "use another scheme"),
        ({"scheme": "permuted", "resident": True}, "leave resident out"),
        ({"scheme": "lowrank", "options": {"ranks": {"first": 4}}}, "one number for ranks"),
    ],
)
def test_which_plans_a_program_can_have(
    program_contract_example: Fields, plan: Fields, problem: str | None
) -> None:
    program_contract_example["offload"] = plan
    if problem is None:
        contract = Contract.from_fields(program_contract_example)
        assert Contract.from_canonical(contract.canonical_bytes()) == contract
        return
    with pytest.raises(DocumentError, match=problem):
        Contract.from_fields(program_contract_example)


def test_permuted_needs_a_word_for_weights_that_come_from_somewhere(
    from_weights: Callable[[Fields], Contract],
) -> None:
    with pytest.raises(DocumentError, match="allow_public_base: true"):
        from_weights({"scheme": "permuted"})
    allowed = from_weights({"scheme": "permuted", "allow_public_base": True})
    assert allowed.offload_permission == PUBLIC_BASE
    # Other schemes show weights in plain, or hide them from everyone.
    assert from_weights({"scheme": "lowrank"}).offload_permission == "lowrank"


# ------------------------------------------------------------------ terms


@pytest.mark.parametrize("allowed", [*TRAINING, "masked", PUBLIC_BASE])
@pytest.mark.parametrize("scheme", TRAINING)
def test_terms_allow_exactly_the_schemes_that_they_name(
    scheme: str, allowed: str, scenario: type[Scenario]
) -> None:
    example = scenario()
    example.terms["offload"] = [allowed]
    example.contract["offload"] = TRAINING[scheme]
    clauses = example.clauses()
    assert all_met(clauses) == (scheme == allowed)
    assert [clause.name for clause in failed(clauses)] in ([], ["offload"])


def test_terms_that_allow_permuted_do_not_allow_it_over_a_public_base(
    scenario: type[Scenario],
) -> None:
    example = scenario()
    example.job["recipe"]["model"] = GRAPH
    example.job["recipe"]["data"]["assets"] = ["a"]
    example.contract["offload"] = {"scheme": "permuted", "allow_public_base": True}
    digest = example.build()[0].job.program_digest()
    example.terms["recipes"] = [digest]
    for offload, met in ((["permuted"], False), ([PUBLIC_BASE], True)):
        example.terms["offload"] = offload
        (clause,) = (c for c in example.clauses() if c.name == "offload")
        assert (clause.verdict == "met") == met
        assert clause.found == PUBLIC_BASE
