"""Recipe jobs whose algebra goes to accelerator processes outside the enclave's sandbox."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cenacle.cli.offload import read_profile
from cenacle.documents.offload_profile import PROFILE_FILE
from cenacle.documents.privacy import PrivacyRecord
from cenacle.enclave.channel import Message, Progress
from cenacle.enclave.launcher import RunningEnclave
from cenacle.enclave.sandbox import SandboxPlan, plan
from cenacle.errors import EnclaveError, RefusedError
from tests.support.house import House, Outcome, Sealed, patient_rows, recipe_job
from tests.support.processes import descendants

pytest.importorskip("torch", reason="recipes need torch (pip: cenacle[train])")
pytestmark = pytest.mark.processes

OUTPUTS = {"model": "model", "metrics": "metrics"}
TWO = ("process", "process")
BOTH = ["measured", pytest.param("permuted", marks=pytest.mark.slow)]  # it compiles kernels
SCHEMES = ["enclave", "measured", "lowrank", "permuted", "masked-training"]


@pytest.fixture(scope="module")
def open_plan(house: House) -> SandboxPlan:
    """All layers that work here, with accelerators."""
    return plan(house.plan.layers, accelerators=True)


@pytest.fixture(scope="module")
def records(house: House) -> dict[str, Sealed]:
    """Two hospitals' tables, whose owners allow these schemes."""
    sealed = {}
    for seed, alias in enumerate(("a", "b"), 1):
        source = house.folder / f"records-{alias}.csv"
        source.write_text(patient_rows(60, seed=seed))
        sealed[alias] = house.seal(f"hospital-{alias}", source, offload=SCHEMES)
    return sealed


def _plan_of(scheme: str, **fields: Any) -> dict[str, Any]:
    return {"scheme": scheme, "accelerators": {"count": 2, "kinds": ["process"]}, **fields}


def _agree(
    house: House, records: dict[str, Sealed], chosen: SandboxPlan, offload: dict[str, Any]
) -> str:
    # Two models, so that the accelerators serve two sessions; ten steps each.
    job = recipe_job(
        ["a", "b"],
        epochs=2,
        every=3,
        model={"type": "mlp", "hidden": [32]},
        compare_alone=True,
    )
    enclave = house.enclave(chosen)
    return house.agree(house.contract(records, job, OUTPUTS, enclave=enclave, offload=offload))


def _workers() -> list[int]:
    """The accelerators that this process started."""
    found = []
    for pid in sorted(descendants(os.getpid())):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"cenacle.accelerators.worker" in command:
            found.append(pid)
    return found


@pytest.fixture(scope="module")
def finished(house: House, records: dict[str, Sealed], open_plan: SandboxPlan) -> Outcome:
    """A job under the scheme that can be compared bit for bit: it blinds nothing."""
    digest = _agree(house, records, open_plan, _plan_of("measured"))
    return house.run(digest, records, chosen=open_plan, accelerators=TWO)


def test_a_job_runs_on_two_accelerators_and_its_receipt_tells(
    house: House, finished: Outcome
) -> None:
    found = house.verify(finished.receipt).receipt
    assert found.offload.scheme == "measured"
    assert found.offload.weights == "plaintext"
    told = found.accelerators
    assert told is not None
    assert [(one.name, one.kind) for one in told.accelerators] == [
        ("process-1", "process"),
        ("process-2", "process"),
    ]
    assert all("confined by process" in one.description for one in told.accelerators)
    assert told.dropped == ()
    assert min(told.bytes_sent, told.bytes_received, told.products) > 0
    assert told.checked == 0
    assert told.seconds_inside > 0
    costs = read_profile(finished.receipt.parent)  # both models' together, under one name
    assert [one.layer for one in costs.layers] == ["hidden1", "output"]
    assert costs.total.bytes_sent == told.bytes_sent
    assert costs.total.products == told.products
    trace = json.loads((finished.receipt.parent / PROFILE_FILE).read_text())
    tracks = {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert tracks == {"enclave", "process-1", "process-2"}
    done, total = finished.progress[-1]
    assert done == total > 0
    assert len(house.metrics(finished)["alone"]) == 2
    assert _workers() == []


def test_workers_that_are_killed_are_named_and_change_nothing(
    house: House, records: dict[str, Sealed], open_plan: SandboxPlan, finished: Outcome
) -> None:
    """One dies early, the other later: then the enclave computes alone."""

    def watch(_: RunningEnclave, message: Message) -> None:
        if message in (Progress(2, total), Progress(total // 2, total)):
            os.kill(_workers()[0], signal.SIGKILL)

    total = finished.progress[-1][1]
    digest = _agree(house, records, open_plan, _plan_of("measured"))
    outcome = house.run(digest, records, chosen=open_plan, accelerators=TWO, watch=watch)
    told = house.verify(outcome.receipt).receipt.accelerators
    assert told is not None
    assert {one.name for one in told.dropped} == {"process-1", "process-2"}
    assert all("gone" in one.reason for one in told.dropped)
    assert house.open(outcome, "model") == house.open(finished, "model")


@pytest.mark.slow
def test_a_killed_job_resumes_to_the_same_model(
    house: House, records: dict[str, Sealed], open_plan: SandboxPlan, finished: Outcome
) -> None:
    total = finished.progress[-1][1]
    digest = _agree(house, records, open_plan, _plan_of("measured"))
    out = house.path("results")

    def kill(enclave: RunningEnclave, message: Message) -> None:
        if message == Progress(total // 2, total):
            enclave.kill()

    first = house.run(digest, records, out, chosen=open_plan, accelerators=TWO, watch=kill)
    assert isinstance(first.error, EnclaveError)
    assert _workers() == []
    second = house.run(
        digest, records, out, resume=house.open_run(digest), chosen=open_plan, accelerators=TWO
    )
    found = house.verify(second.receipt).receipt
    assert found.resumed == 1
    assert house.open(second, "model") == house.open(finished, "model")


def test_a_scheme_that_the_terms_do_not_allow_gets_no_key(
    house: House, patients: dict[str, Sealed], open_plan: SandboxPlan
) -> None:
    digest = _agree(house, patients, open_plan, _plan_of("measured"))
    outcome = house.run(digest, patients, chosen=open_plan, accelerators=TWO)
    assert outcome.stages == ["attesting", "keys"]  # nothing was opened, let alone sent
    assert isinstance(outcome.error, RefusedError)
    assert {clause["name"] for clause in outcome.error.clauses} == {"offload"}
    assert house.open_run(digest) is None


def test_an_enclave_without_the_contracts_accelerators_asks_for_no_key(
    house: House, records: dict[str, Sealed], open_plan: SandboxPlan
) -> None:
    digest = _agree(house, records, open_plan, _plan_of("measured"))
    outcome = house.run(digest, records, chosen=open_plan, accelerators=("process",))
    assert outcome.stages == []
    assert isinstance(outcome.error, EnclaveError)
    assert "accelerators are not those of the contract" in outcome.error.what


def _permuted(told: Any) -> None:
    assert told.offload.weights == "obfuscated"


def _lowrank(told: Any) -> None:
    assert told.offload.weights == "plaintext"
    assert told.offload.inputs == "obfuscated"


def _masked(told: Any) -> None:
    assert (told.offload.inputs, told.offload.weights) == ("hidden", "hidden")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "look"),
    [("permuted", _permuted), ("lowrank", _lowrank), ("masked-training", _masked)],
)
def test_results_under_a_blinding_scheme_are_all_checked(
    scheme: str,
    look: Callable[[Any], None],
    house: House,
    records: dict[str, Sealed],
    open_plan: SandboxPlan,
    finished: Outcome,
) -> None:
    digest = _agree(house, records, open_plan, _plan_of(scheme))
    outcome = house.run(digest, records, chosen=open_plan, accelerators=TWO)
    found = house.verify(outcome.receipt).receipt
    told = found.accelerators
    assert told is not None
    look(found)
    assert told.dropped == ()
    assert told.checked == told.products
    accuracy = house.metrics(outcome)["pooled"]["accuracy"]
    assert accuracy == pytest.approx(house.metrics(finished)["pooled"]["accuracy"], abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["measured", "permuted"])
def test_a_private_job_is_trained_on_accelerators_and_its_receipt_has_both(
    scheme: str, house: House, open_plan: SandboxPlan
) -> None:
    budget = {"epsilon": 3.0, "delta": 1e-5}
    source = house.folder / f"private-{scheme}.csv"
    source.write_text(patient_rows(60, seed=3))
    patients = {"a": house.seal("hospital-a", source, privacy=budget, offload=SCHEMES)}
    job = recipe_job(
        ["a"],
        epochs=4,
        every=3,
        model={"type": "mlp", "hidden": [32]},
        holdout={"fraction": 0.2, "stratified": False},
    )
    job["recipe"]["data"]["standardize"] = False
    privacy = {
        **budget, "clipping_norm": 1.0, "noise_multiplier": 3.0, "sampling_probability": 0.5,
        "metrics_noise": 6.0,
    }  # fmt: skip
    contract = house.contract(
        patients, job, OUTPUTS, privacy=privacy, offload=_plan_of(scheme),
        enclave=house.enclave(open_plan),
    )  # fmt: skip
    outcome = house.run(house.agree(contract), patients, chosen=open_plan, accelerators=TWO)
    assert outcome.error is None
    found = house.verify(outcome.receipt).receipt
    told = found.accelerators
    assert told is not None
    assert told.checked == told.products > 0
    assert told.dropped == ()
    assert "accelerators see" in found.offload.note  # what the privacy plan does not cover
    assert isinstance(found.privacy, PrivacyRecord)
    assert [event.steps for event in found.privacy.events] == [8, 1]
    spent = house.client.budget(
        house.parties["hospital-a"].signing_key, "hospital-a", patients["a"].asset.digest
    ).spent
    assert spent is not None
    assert 1.0 < spent <= 3.0


_TRAINS = """
import numpy as np
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(2, 32)
        self.last = torch.nn.Linear(32, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))[:, 0]

def run(ctx):
    table = ctx.assets["table"].read(["age", "dose"])
    columns = [np.asarray(table.column(name).to_numpy(), np.float32) for name in ("age", "dose")]
    x = torch.from_numpy(np.stack(columns, 1))
    x = (x - x.mean(0)) / x.std(0)
    y = x[:, 0] - 0.5 * x[:, 1]
    model = Net()
    first = float(torch.nn.functional.mse_loss(model(x), y).detach())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with ctx.offload(model) as session:
        for step in range(40):
            loss = torch.nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ctx.progress(step + 1, 40)
        hidden = session.leakage.weights
    try:
        import socket
        socket.socket(socket.AF_UNIX)
        sockets = "can be opened"
    except PermissionError:
        sockets = "refused"
    try:
        import os
        os.memfd_create("x")
        memory = "can be made"
    except OSError:
        memory = "refused"
    ctx.output("numbers", {"first": first, "last": float(loss.detach()), "weights": hidden,
                           "sockets": sockets, "memory": memory})
"""


@pytest.mark.slow
@pytest.mark.usefixtures("program_layers")
@pytest.mark.parametrize("scheme", BOTH)
def test_a_program_trains_on_accelerators_that_it_has_no_way_to(
    scheme: str, house: House, open_plan: SandboxPlan
) -> None:
    program = house.program(_TRAINS, offload=SCHEMES)
    source = house.folder / f"of-a-program-{scheme}.csv"
    source.write_text(patient_rows(60, seed=4))
    assets = {
        "table": house.seal(
            "hospital-a", source, offload=SCHEMES, programs=[program.asset.package]
        ),
        "program": program,
    }
    job = {"type": "program", "program": "program"}
    contract = house.contract(
        assets, job, {"numbers": "metrics"}, offload=_plan_of(scheme),
        enclave=house.enclave(open_plan),
    )  # fmt: skip
    outcome = house.run(house.agree(contract), assets, chosen=open_plan, accelerators=TWO)
    assert outcome.error is None
    numbers = house.metrics(outcome, "numbers")
    assert numbers["last"] < 0.2 * numbers["first"]
    assert numbers["weights"] == ("plaintext" if scheme == "measured" else "obfuscated")
    assert (numbers["sockets"], numbers["memory"]) == ("refused", "refused")
    found = house.verify(outcome.receipt).receipt
    told = found.accelerators
    assert told is not None
    assert told.checked == (0 if scheme == "measured" else told.products)
    assert min(told.products, told.bytes_sent, told.bytes_received) > 0
    assert found.offload.scheme == scheme
    costs = read_profile(outcome.receipt.parent)
    assert [one.layer for one in costs.layers] == ["weight-1", "weight-2"]  # not the program's
    assert _workers() == []
