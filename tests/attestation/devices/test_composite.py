"""Composite evidence: a CPU and its GPUs, and every way to put parts together wrongly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import cbor2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenacle.attestation.accelerator_evidence import AcceleratorAttester
from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.composite import (
    CompositeAttester,
    CompositePolicy,
    CompositeVerifier,
    judge_composite,
    members_of,
)
from cenacle.attestation.nitro import NitroPolicy, NitroVerifier, judge_nitro
from cenacle.attestation.nitro_device import NitroAttester
from cenacle.attestation.nvidia import NvidiaPolicy, NvidiaVerifier, judge_nvidia
from cenacle.attestation.nvidia_driver import NvidiaAttester
from cenacle.attestation.registry import Attester, Shown, Verifier, VerifierSet
from cenacle.attestation.simulated import SimulatedVerifier
from cenacle.documents.base import b64, unb64
from cenacle.documents.clauses import Clause, all_met, failed
from cenacle.errors import DocumentError, EvidenceError, InputError, UnavailableError

NOW = datetime(2027, 2, 1, 10, 0, 0, tzinfo=UTC)
BOUND = bytes(range(64))
STATED = {"program": "sha256:" + "ab" * 32}


class Hypervisor:
    """Answers as the security module of a test enclave."""

    def __init__(self, enclave: Any) -> None:
        self.enclave = enclave

    def exchange(self, request: bytes) -> bytes:
        self.enclave.user_data = cbor2.loads(request)["Attestation"]["user_data"]
        return cbor2.dumps({"Attestation": {"document": self.enclave.document()}})


class GpuAttester(AcceleratorAttester):
    kind = "nvidia"

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        body: dict[str, Any] = self.gpu.body(nonce=NvidiaVerifier().part_binding(bound))
        return body


class VmVerifier(Verifier):
    """A confidential machine, for which a Nitro enclave's evidence stands in."""

    kind = "tdx"

    def __init__(self, roots: list[bytes]) -> None:
        self._inner = NitroVerifier(roots)

    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        inner = Evidence(kind="nitro", body=evidence.body)
        claims, bound = self._inner.inspect(inner, now)
        return Shown(claims.model_copy(update={"kind": self.kind}), bound)


class VmAttester(NitroAttester):
    kind = "tdx"


@dataclass
class Machine:
    """A machine with GPUs; a test changes a part before or after evidence is made."""

    enclave: Any
    gpus: list[Any]
    bound: bytes = BOUND
    layers: tuple[str, ...] = ()
    measurements: Mapping[str, str] = field(default_factory=lambda: STATED)
    made: Evidence | None = None

    def attester(self) -> CompositeAttester:
        return CompositeAttester(
            VmAttester(Hypervisor(self.enclave)), [GpuAttester(gpu) for gpu in self.gpus]
        )

    def evidence(self) -> Evidence:
        return self.attester().attest(self.bound, self.measurements, self.layers, NOW)

    def verifier(self) -> CompositeVerifier:
        return CompositeVerifier(
            [VmVerifier(self.enclave.roots), NvidiaVerifier(self.gpus[0].roots)]
        )

    def authenticate(self, evidence: Evidence | None = None) -> Claims:
        shown = self.evidence() if evidence is None else evidence
        return self.verifier().authenticate(shown, BOUND, NOW)


@pytest.fixture
def machine(enclave: Any, make_gpu: Any) -> Machine:
    return Machine(enclave, [make_gpu(serial=f"48B0{index}") for index in range(3)])


def altered(evidence: Evidence, change: Callable[[dict[str, Any]], object]) -> Evidence:
    body = copy.deepcopy(evidence.body)
    change(body)
    return Evidence(kind="composite", body=body)


def test_claims(machine: Machine) -> None:
    claims = machine.authenticate()
    assert claims.measurements == {
        "pcr0": "sha384:" + "10" * 48,
        "pcr1": "sha384:" + "11" * 48,
        "pcr2": "sha384:" + "12" * 48,
        "pcr8": "sha384:" + "18" * 48,
        "gpu.measurement-1": "sha384:" + "00" * 48,
        "gpu.measurement-2": "sha384:" + "22" * 48,
        "gpu.measurement-3": "sha384:" + "23" * 48,
        **STATED,
    }
    assert (claims.kind, claims.protection, claims.issued) == ("composite", "tee", NOW)
    assert [member.kind for member in members_of(claims)] == ["tdx", *["nvidia"] * 3]
    assert members_of(claims)[3].properties["device"] == "GH100:48B02"


def test_gpus_that_differ_are_told_apart(machine: Machine) -> None:
    machine.gpus[1].measurements[2] = b"\x99" * 48
    del machine.gpus[2].measurements[3]
    measurements = machine.authenticate().measurements
    assert {name: value[7:9] for name, value in measurements.items() if "gpu" in name} == {
        "gpu.measurement-1": "00",
        "gpu0.measurement-2": "22",
        "gpu1.measurement-2": "99",
        "gpu2.measurement-2": "22",
        "gpu0.measurement-3": "23",
        "gpu1.measurement-3": "23",
    }


def test_a_cpu_alone(machine: Machine) -> None:
    machine.gpus, gpus = [], machine.gpus
    evidence = machine.evidence()
    machine.gpus = gpus
    assert len(members_of(machine.authenticate(evidence))) == 1


def swap(items: list[Any], first: int, second: int) -> None:
    items[first], items[second] = items[second], items[first]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param(lambda b: b["accelerators"].pop(), "the CPU .*not belong", id="omitted"),
        pytest.param(lambda b: b["accelerators"].clear(), "the CPU .*not belong", id="all-omitted"),
        pytest.param(lambda b: swap(b["accelerators"], 0, 1), "the CPU .*not belong", id="swapped"),
        pytest.param(
            lambda b: b["accelerators"].append(b["accelerators"][0]), "not belong", id="one-more"
        ),
        pytest.param(
            lambda b: b["accelerators"].__setitem__(1, b["accelerators"][0]),
            "not belong",
            id="twice",
        ),
        pytest.param(lambda b: b.update(bound=b64(bytes(64))), "not belong", id="other-bound"),
        pytest.param(lambda b: b.update(bound=b64(bytes(63))), "another number", id="short-bound"),
        pytest.param(lambda b: b.update(bound="%"), "malformed", id="no-bound"),
        pytest.param(lambda b: b.pop("cpu"), "malformed", id="no-cpu"),
        pytest.param(lambda b: b.update(more=1), "malformed", id="more"),
        pytest.param(
            lambda b: b.update(accelerators=b["accelerators"] * 11), "malformed", id="too-many"
        ),
        pytest.param(
            lambda b: b["accelerators"][0].update(kind="amd"), "no verifier|not belong", id="kind"
        ),
        pytest.param(lambda b: b["cpu"].update(kind="snp"), "no verifier", id="cpu-kind"),
        pytest.param(
            lambda b: b["cpu"].update(kind="nitro"), "of a whole machine", id="enclave-as-machine"
        ),
        pytest.param(
            lambda b: b.update(cpu=b["accelerators"][0]), "of a whole machine", id="gpu-as-cpu"
        ),
        pytest.param(
            lambda b: b["cpu"]["body"].update(statement=b["statement"]),
            "of its own",
            id="statement",
        ),
        pytest.param(
            lambda b: b.update(statement={**b["statement"], "layers": ["x"]}),
            "bound to another nonce",
            id="other-statement",
        ),
        pytest.param(lambda b: b.pop("statement"), "bound to another nonce", id="no-statement"),
    ],
)
def test_parts_put_together_wrongly(
    machine: Machine, change: Callable[[dict[str, Any]], object], why: str
) -> None:
    with pytest.raises(EvidenceError, match=why):
        machine.authenticate(altered(machine.evidence(), change))


def test_a_second_cpu_is_no_accelerator(machine: Machine) -> None:
    class Second(GpuAttester):
        kind = "tdx"

        def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
            return VmAttester(Hypervisor(machine.enclave)).collect(bound, now)

    attester = CompositeAttester(VmAttester(Hypervisor(machine.enclave)), [Second(None)])
    with pytest.raises(EvidenceError, match="no accelerator's"):
        machine.authenticate(attester.attest(BOUND, STATED, (), NOW))


def test_a_gpu_of_another_machine(machine: Machine, make_gpu: Any) -> None:
    ours = machine.evidence()
    machine.gpus[1] = make_gpu(serial="other")
    theirs = machine.evidence()
    mixed = altered(
        ours, lambda b: b["accelerators"].__setitem__(1, theirs.body["accelerators"][1])
    )
    with pytest.raises(EvidenceError, match=r"the CPU .*not belong"):
        machine.authenticate(mixed)


def test_the_host_asks_a_gpu_for_the_same_nonce(machine: Machine, make_gpu: Any) -> None:
    """The nonce is no secret: a genuine GPU that the host chose signs it. The CPU does not."""
    evidence = machine.evidence()
    nonce = unb64(evidence.body["accelerators"][1]["body"]["report"])[4:36]
    relayed = {"kind": "nvidia", "body": make_gpu(serial="host").body(nonce=nonce)}
    mixed = altered(evidence, lambda b: b["accelerators"].__setitem__(1, relayed))
    with pytest.raises(EvidenceError, match=r"the CPU .*not belong"):
        machine.authenticate(mixed)


def test_one_device_shown_twice_by_the_machine_itself(machine: Machine) -> None:
    machine.gpus[2] = machine.gpus[0]
    with pytest.raises(EvidenceError, match=r"one accelerator twice.*accelerator 2: GH100:48B00"):
        machine.authenticate()


def test_a_part_that_is_not_accepted_says_why(machine: Machine) -> None:
    machine.gpus[1].signer = "other"
    with pytest.raises(EvidenceError, match=r"accelerator 1 \(nvidia\) is not accepted: .*signed"):
        machine.authenticate()
    machine.gpus[1].signer = "gpu"
    machine.enclave.pcrs[0] = bytes(48)
    with pytest.raises(EvidenceError, match=r"the CPU \(tdx\) is not accepted: .*debug mode"):
        machine.authenticate()


def test_other_report_data_and_old_evidence(machine: Machine) -> None:
    evidence = machine.evidence()
    with pytest.raises(EvidenceError, match="bound to another nonce"):
        machine.verifier().authenticate(evidence, bytes(64), NOW)
    with pytest.raises(EvidenceError, match="not fresh"):
        machine.verifier().authenticate(evidence, BOUND, NOW + timedelta(minutes=6))


def test_a_cpus_own_evidence_is_not_composite(machine: Machine) -> None:
    alone = VmAttester(Hypervisor(machine.enclave)).attest(BOUND, STATED, (), NOW)
    part = {"kind": "tdx", "body": {"document": alone.body["document"]}}
    forged = {"cpu": part, "accelerators": [], "bound": b64(BOUND)}
    with pytest.raises(EvidenceError, match=r"the CPU .*not belong"):
        machine.authenticate(Evidence(kind="composite", body=forged))
    inside = machine.evidence().body["cpu"]
    with pytest.raises(EvidenceError, match="bound to another nonce"):
        VmVerifier(machine.enclave.roots).authenticate(
            Evidence(kind="tdx", body=inside["body"]), BOUND, NOW
        )


class Weak(Verifier):
    """A CPU kind that measures and protects nothing, for its protection alone."""

    kind = "tpm"

    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        claims = Claims(
            kind=self.kind,
            protection=self.protection,
            measurements={"pcr4": "sha256:" + "44" * 32},
            layers=(),
            issued=now,
        )
        return Shown(claims, unb64(evidence.body["bound"]))


class WeakAttester(Attester):
    kind = "tpm"

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        return {"bound": b64(bound)}


def test_protection_is_that_of_the_weakest(machine: Machine) -> None:
    attester = CompositeAttester(WeakAttester(), [GpuAttester(machine.gpus[0])])
    verifier = CompositeVerifier([Weak(), NvidiaVerifier(machine.gpus[0].roots)])
    claims = verifier.authenticate(attester.attest(BOUND, STATED, (), NOW), BOUND, NOW)
    assert claims.protection == "measured"
    assert verifier.protection == "tee"  # at best


def test_names_do_not_collide(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clever(Weak):
        def inspect(self, evidence: Evidence, now: datetime) -> Shown:
            claims, bound = super().inspect(evidence, now)
            own = {"gpu.measurement-2": "sha384:" + "22" * 48}
            return Shown(claims.model_copy(update={"measurements": own}), bound)

    attester = CompositeAttester(WeakAttester(), [GpuAttester(machine.gpus[0])])
    verifier = CompositeVerifier([Clever(), NvidiaVerifier(machine.gpus[0].roots)])
    with pytest.raises(EvidenceError, match="use one name"):
        verifier.authenticate(attester.attest(BOUND, STATED, (), NOW), BOUND, NOW)


def test_a_production_broker_takes_no_simulated_part() -> None:
    verifier = CompositeVerifier([SimulatedVerifier(), NvidiaVerifier()])
    assert verifier.protection == "simulated"
    with pytest.raises(EvidenceError, match="cannot hold a simulated verifier"):
        VerifierSet.of_production(verifier)
    with pytest.raises(EvidenceError, match="cannot hold a simulated verifier"):
        VerifierSet.of_production(CompositeVerifier([]))
    good = CompositeVerifier([NitroVerifier(), NvidiaVerifier()])
    assert VerifierSet.of_production(good).for_kind("composite") is good


def test_verifiers_that_make_no_composite() -> None:
    inner = CompositeVerifier([NitroVerifier()])
    for members in ([NitroVerifier(), NitroVerifier()], [inner, NvidiaVerifier()]):
        with pytest.raises(EvidenceError, match="one verifier for each kind"):
            CompositeVerifier(members)


def test_attesters_that_make_no_composite(machine: Machine) -> None:
    enclave = NitroAttester(Hypervisor(machine.enclave))
    for cpu in (GpuAttester(machine.gpus[0]), machine.attester(), enclave):
        with pytest.raises(InputError, match="of a whole machine"):
            CompositeAttester(cpu, [])


def test_a_gpu_that_protects_nothing_stops_the_machine(machine: Machine) -> None:
    class Library:
        def state(self) -> Any:
            raise UnavailableError("the GPU does not protect what is computed on it")

    cpu = VmAttester(Hypervisor(machine.enclave))
    attester = CompositeAttester(cpu, [NvidiaAttester(0, Library())])  # type: ignore[arg-type]
    with pytest.raises(UnavailableError, match="does not protect"):
        attester.attest(BOUND, STATED, (), NOW)


def test_an_enclave_reaches_no_device_that_it_measures(machine: Machine) -> None:
    """An SGX or Nitro enclave would be shown a GPU's evidence by the host."""
    verifier = CompositeVerifier(
        [NitroVerifier(machine.enclave.roots), NvidiaVerifier(machine.gpus[0].roots)]
    )
    evidence = altered(machine.evidence(), lambda b: b["cpu"].update(kind="nitro"))
    with pytest.raises(EvidenceError, match="of a whole machine, drivers included; found nitro"):
        verifier.authenticate(evidence, BOUND, NOW)


JSON: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=6) | st.builds(list)
)
PATHS = st.sampled_from(
    [
        ("cpu",),
        ("cpu", "kind"),
        ("cpu", "body"),
        ("cpu", "body", "document"),
        ("accelerators",),
        ("accelerators", 1),
        ("accelerators", 1, "body"),
        ("accelerators", 1, "body", "report"),
        ("accelerators", 1, "body", "certificates"),
        ("accelerators", 1, "body", "certificates", 2),
        ("bound",),
        ("statement",),
        ("statement", "measurements"),
        ("statement", "issued"),
    ]
)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(path=PATHS, value=JSON)
def test_any_other_value_anywhere_is_refused_in_words(
    machine: Machine, path: tuple[str | int, ...], value: Any
) -> None:
    machine.made = machine.made or machine.evidence()

    def change(body: Any) -> None:
        for step in path[:-1]:
            body = body[step]
        body[path[-1]] = value

    with pytest.raises(EvidenceError):
        machine.authenticate(altered(machine.made, change))


def judge(claims: Claims, fields: Mapping[str, Any]) -> list[Clause]:
    if claims.kind == "tdx":
        return judge_nitro(claims, NitroPolicy.from_fields(dict(fields)))
    return judge_nvidia(claims, NvidiaPolicy.from_fields(dict(fields)))


KINDS = ["tdx", "nvidia", "nvidia", "nvidia"]


@pytest.mark.parametrize(
    ("policy", "wrong"),
    [
        ({"kinds": KINDS}, []),
        ({"kinds": KINDS[:3]}, ["composite kinds"]),
        ({"kinds": ["tdx"]}, ["composite kinds"]),
        ({"kinds": ["nvidia", *KINDS[:3]]}, ["composite kinds"]),
        ({"kinds": KINDS, "members": {"nvidia": {"drivers": ["550.90.07"]}}}, []),
        (
            {"kinds": KINDS, "members": {"nvidia": {"devices": ["GH100:48B00", "GH100:48B01"]}}},
            ["gpu2 nvidia device"],
        ),
        (
            {"kinds": KINDS, "members": {"tdx": {"parent_roles": []}}},
            ["cpu nitro parent role"],
        ),
        ({"kinds": KINDS, "members": {"snp": {}}}, ["composite members"]),
    ],
)
def test_policy(machine: Machine, policy: dict[str, Any], wrong: list[str]) -> None:
    claims = machine.authenticate()
    clauses = judge_composite(claims, CompositePolicy.from_fields(policy), judge)
    assert [clause.name for clause in failed(clauses)] == wrong
    assert all_met(clauses) is (not wrong)


def test_every_gpu_is_judged(machine: Machine) -> None:
    machine.gpus[1].opaque[21] = b"\xaa"
    clauses = judge_composite(machine.authenticate(), CompositePolicy(kinds=tuple(KINDS)), judge)
    assert [clause.name for clause in failed(clauses)] == ["gpu1 nvidia mode"]


def test_a_policy_always_says_what_the_machine_is_made_of() -> None:
    empty: dict[str, Any] = {}
    for fields in [empty, {"kinds": []}]:
        with pytest.raises(DocumentError, match="kinds"):
            CompositePolicy.from_fields(fields)


def test_claims_of_another_kind_have_no_members(enclave: Any) -> None:
    claims = enclave.verifier().inspect(enclave.evidence(), NOW).claims
    with pytest.raises(EvidenceError, match="another kind"):
        members_of(claims)
