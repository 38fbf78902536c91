from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from cenacle.documents import Contract, ProgramJob, RecipeJob
from cenacle.documents.protection import EVIDENCE_KINDS, at_least, protection_of
from cenacle.errors import DocumentError

Fields = dict[str, Any]
OTHER = "sha256:" + "0" * 64


def put(*path: Any, value: Any) -> Callable[[Fields], None]:
    def change(fields: Fields) -> None:
        place: Any = fields
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[Fields], None]:
    def change(fields: Fields) -> None:
        place: Any = fields
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


def output(**changes: Any) -> Callable[[Fields], None]:
    return lambda fields: fields["outputs"][0].update(changes)


def payment(**changes: Any) -> Callable[[Fields], None]:
    return lambda fields: fields["payments"][0].update(changes)


REFERENCE = ("enclave", "reference")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        # names that do not resolve
        (put("assets", "a", "owner", value="stranger"), "assets name stranger, not listed"),
        (output(recipient="stranger"), "outputs name stranger, not listed under parties"),
        (put("approval", value="stranger"), "approval name stranger"),
        (
            put("approval", value={"any_of": ["clinic", {"all_of": ["clinic", "stranger"]}]}),
            "approval name stranger",
        ),
        (put("vetoes", value=["stranger"]), "vetoes name stranger"),
        (payment(payer="stranger"), "payments name stranger"),
        (payment(payee="stranger"), "payments name stranger"),
        (drop("parties", "clinic"), "clinic, not listed under parties"),
        (drop("assets", "b"), "the job uses b, not listed under assets"),
        (put("job", "recipe", "data", "assets", value=["a", "c"]), "the job uses c"),
        (put("job", "recipe", "data", "assets", value=["a"]), "does not use b; remove"),
        (put("parties", value={}), "parties"),
        (put("assets", value={}), "assets"),
        # one thing under two names
        (
            lambda f: f["assets"]["b"].update(digest=f["assets"]["a"]["digest"]),
            "one asset stands under two aliases",
        ),
        (
            lambda f: f["parties"].update(again=f["parties"]["clinic"]),
            "one party stands under two names",
        ),
        (output(name="report"), "two outputs have the same name"),
        (put("approval", value={"all_of": ["clinic", "clinic"]}), "each counts once"),
        # outputs
        (put("outputs", value=[]), "outputs"),
        (
            output(kind="table"),
            "output model is a table, but a recipe makes only model and metrics",
        ),
        (output(kind="file"), "output model is a file, but a recipe makes only model and metrics"),
        (output(kind="weights"), "outputs.0.kind"),
        (output(name="../model"), "outputs.0.name"),
        (output(name="model/x"), "outputs.0.name"),
        # the enclave
        (put(*REFERENCE, value={}), "reference"),
        (put(*REFERENCE, "tpm", value={}), "reference.tpm"),
        (put(*REFERENCE, "tpm", "package", value=[]), "package"),
        (put(*REFERENCE, "tpm", "package", value=["x"]), "package"),
        (put(*REFERENCE, "tpm", "Package", value=[OTHER]), "Package"),
        (put(*REFERENCE, "tpm", "program", value=[OTHER]), "program, but that one follows from"),
        (put(*REFERENCE, "snp", "program", value=[OTHER]), "values of snp list program"),
        (put(*REFERENCE, "nonsense", value={"package": [OTHER]}), "nonsense"),
        (put(*REFERENCE, "nvidia", value={"package": [OTHER]}), "nvidia"),
        (put("enclave", "layers", value=["Seccomp"]), "layers"),
        (put("enclave", "skip", value=True), "unknown field"),
        # the rest
        (put("offload", value={"scheme": "plain"}), "scheme"),
        (payment(amount=-1), "amount"),
        (payment(amount=12.5), "amount"),
        (payment(currency="euro"), "currency"),
        (put("purpose", value=""), "purpose"),
        (put("expires", value="soon"), "expires"),
        (put("replaces", value="the last one"), "replaces"),
        (put("broker", value="localhost"), "broker"),
        (put("job", "type", value="script"), "job"),
        (drop("job", "type"), "job"),
        (put("job", "checkpoint_every", value=-1), "checkpoint_every"),
        (put("job", "entry", value="main:run"), "unknown field"),
    ],
)
def test_refuses(contract_example: Fields, change: Callable[[Fields], None], problem: str) -> None:
    assert Contract.from_fields(copy.deepcopy(contract_example))
    change(contract_example)
    with pytest.raises(DocumentError) as caught:
        Contract.from_fields(contract_example)
    assert problem in caught.value.what


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (put("job", "program", value="absent"), "the job uses absent, not listed under assets"),
        (drop("assets", "trainer"), "the job uses trainer"),
        (put("job", "parameters", value=[]), "parameters"),
        (put("job", "parameters", "seed", value=2**60), "too large to be an exact number"),
        *(
            (put("job", "entry", value=entry), "entry")
            for entry in (
                "",
                "run",
                "main:",
                ":run",
                "main:run:run",
                "main:run.x",
                "main..x:run",
                ".main:run",
                "main.:run",
                "1main:run",
                "ma in:run",
                "main:run\n",
                "mäin:run",
                "main:rün",
                "os/path:run",
                "m" * 200 + ":run",
            )
        ),
    ],
)
def test_refuses_programs(
    program_contract_example: Fields, change: Callable[[Fields], None], problem: str
) -> None:
    change(program_contract_example)
    with pytest.raises(DocumentError) as caught:
        Contract.from_fields(program_contract_example)
    assert problem in caught.value.what


@pytest.mark.parametrize(
    "change",
    [
        put("approval", value="clinic"),
        put("vetoes", value=[]),
        put("payments", value=[]),
        put("replaces", value=OTHER),
        lambda fields: fields["outputs"].append(
            {"name": "model-2", "kind": "model", "recipient": "hospital-a"}
        ),
        put(*REFERENCE, value={"simulated": {"package": [OTHER]}}),
        put("purpose", value="Forschung — größere Kohorte"),
    ],
)
def test_accepts(contract_example: Fields, change: Callable[[Fields], None]) -> None:
    change(contract_example)
    contract = Contract.from_fields(contract_example)
    assert Contract.from_canonical(contract.canonical_bytes()) == contract
    assert isinstance(contract.job, RecipeJob)


@pytest.mark.parametrize("kind", ["model", "metrics", "table", "file"])
def test_a_program_may_make_any_output(program_contract_example: Fields, kind: str) -> None:
    program_contract_example["outputs"][0]["kind"] = kind
    contract = Contract.from_fields(program_contract_example)
    assert isinstance(contract.job, ProgramJob)
    assert contract.job.entry == "main:run"


def test_the_program_of_a_recipe_is_its_digest(contract_example: Fields) -> None:
    job = Contract.from_fields(contract_example).job
    contract_example["job"]["recipe"]["epochs"] += 1
    other = Contract.from_fields(contract_example).job
    assert isinstance(job, RecipeJob)
    assert isinstance(other, RecipeJob)
    assert job.program_digest() == job.recipe.digest != other.program_digest()


def test_payments_to_a_party(contract_example: Fields) -> None:
    own = {"payer": "clinic", "payee": "clinic", "amount": 9, "currency": "EUR"}
    contract_example["payments"] += [
        own,
        {"payer": "hospital-b", "payee": "hospital-a", "amount": 50, "currency": "EUR"},
        {"payer": "hospital-b", "payee": "hospital-a", "amount": 7, "currency": "USD"},
    ]
    contract = Contract.from_fields(contract_example)
    assert contract.payment_to("hospital-a", "EUR") == 1300
    assert contract.payment_to("hospital-a", "USD") == 7
    assert contract.payment_to("clinic", "EUR") == 1250  # its own 9 do not count
    assert contract.payment_to("stranger", "EUR") == 0


# --- protection ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "demanded", "enough"),
    [
        ("simulated", "simulated", True),
        ("simulated", "measured", False),
        ("simulated", "tee", False),
        ("measured", "simulated", True),
        ("measured", "measured", True),
        ("measured", "tee", False),
        ("tee", "simulated", True),
        ("tee", "measured", True),
        ("tee", "tee", True),
    ],
)
def test_protections_are_ordered(found: Any, demanded: Any, enough: bool) -> None:
    assert at_least(found, demanded) is enough


def test_every_kind_has_a_protection() -> None:
    assert {kind: protection_of(kind) for kind in EVIDENCE_KINDS} == dict(EVIDENCE_KINDS)
    for kind in ("", "SNP", "none", "tee", "snp "):
        with pytest.raises(DocumentError, match="unknown"):
            protection_of(kind)


@pytest.mark.parametrize(
    ("kinds", "weakest"),
    [
        (["snp"], "tee"),
        (["snp", "tdx"], "tee"),
        (["snp", "tpm"], "measured"),
        (["tpm", "snp"], "measured"),
        (["snp", "tpm", "simulated"], "simulated"),
    ],
)
def test_the_weakest_accepted_kind_counts(
    contract_example: Fields, kinds: list[str], weakest: str
) -> None:
    contract_example["enclave"]["reference"] = {kind: {"package": [OTHER]} for kind in kinds}
    assert Contract.from_fields(contract_example).enclave.weakest == weakest


# --- privacy plans ------------------------------------------------------------------------


PLAN: Fields = {
    "epsilon": 1.0,
    "delta": 1e-5,
    "clipping_norm": 1.0,
    "noise_multiplier": 2.0,
    "sampling_probability": 0.1,
    "metrics_noise": 3.0,
}


def _private(fields: Fields) -> Fields:
    fields["privacy"] = dict(PLAN)
    fields["job"]["recipe"]["data"]["standardize"] = False
    fields["job"]["recipe"]["holdout"] = {"stratified": False}
    return fields


def test_a_contract_with_a_privacy_plan(contract_example: Fields) -> None:
    assert Contract.from_fields(copy.deepcopy(contract_example)).privacy_events == ()
    contract = Contract.from_fields(_private(contract_example))
    training, counting = contract.privacy_events
    assert (training.steps, training.noise_multiplier) == (200, 2.0)
    assert (counting.steps, counting.noise_multiplier) == (1, 3.0)
    assert contract.protects("a")
    assert not contract.protects("trainer")
    assert Contract.from_yaml(contract.to_yaml().encode()).digest == contract.digest


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (put("privacy", "noise_multiplier", value=None), "cenacle draft"),
        (drop("privacy", "metrics_noise"), "metrics are exact"),
        (put("job", "recipe", "data", "standardize", value=True), "standardize"),
        (put("offload", value={"scheme": "permuted", "check": False}), "set check: true"),
        (put("offload", value={"scheme": "permuted", "resident": True}), "leave resident out"),
        (
            put("offload", value={"scheme": "masked-training", "accelerators": {"count": 2}}),
            "cannot be kept under offload masked-training",
        ),
        (put("privacy", "epsilon", value=0.0), "epsilon"),
    ],
)
def test_a_plan_that_could_not_be_kept(
    contract_example: Fields, change: Callable[[Fields], None], problem: str
) -> None:
    fields = _private(contract_example)
    change(fields)
    with pytest.raises(DocumentError, match=problem):
        Contract.from_fields(fields)


@pytest.mark.parametrize("scheme", ["enclave", "measured", "lowrank", "permuted"])
def test_a_plan_that_is_kept_with_accelerators(contract_example: Fields, scheme: str) -> None:
    fields = _private(contract_example)
    fields["offload"] = {"scheme": scheme}
    contract = Contract.from_fields(fields)
    assert contract.offload.scheme == scheme
    assert contract.privacy is not None


def test_a_program_has_no_privacy_plan(program_contract_example: Fields) -> None:
    program_contract_example["privacy"] = dict(PLAN)
    with pytest.raises(DocumentError, match="a privacy plan is for recipes"):
        Contract.from_fields(program_contract_example)
