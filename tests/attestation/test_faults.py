"""What other verifiers got wrong, each as an attack that must fail here.

The example's evidence is accepted; every case changes one thing, and the refusal says which.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

import cenacle
from cenacle.attestation import (
    Claims,
    Evidence,
    InstallationKey,
    Shown,
    SimulatedAttester,
    SimulatedVerifier,
    Verifier,
    VerifierSet,
    report_data,
)
from cenacle.attestation.registry import MAX_AGE
from cenacle.attestation.verifiers import hardware_verifiers
from cenacle.crypto import SigningKey
from cenacle.documents.protection import EVIDENCE_KINDS
from cenacle.errors import CenacleError, EvidenceError

Attested = Any  # of conftest, which tests cannot import
Alter = Callable[..., Evidence]

OTHER = "sha256:" + "0" * 64
CONTRACT = "sha256:" + (b"contract".hex() * 64)[:64]


def test_the_example_is_accepted(attested: Attested) -> None:
    claims = attested.verify()
    assert isinstance(claims, Claims)
    assert claims.protection == "simulated"
    assert claims.measurements == {
        **attested.measurements,
        "installation": attested.key.measurement,
    }
    assert claims.layers == ("seccomp",)
    assert claims.issued == attested.issued


Fault = Callable[[Attested, Alter], object]


def _remeasured(a: Attested, alter: Alter) -> object:
    measurements = {**a.measurements, "package": OTHER}
    return a.verify(alter(a.evidence(), stated={"measurements": measurements}))


def _signed_by_another(a: Attested, _: Alter) -> object:
    reference = a.reference()
    a.key = InstallationKey(SigningKey.generate())
    return a.verify(reference=reference)


def _another_installation_s_signature(a: Attested, alter: Alter) -> object:
    genuine = a.evidence()
    a.key = InstallationKey(SigningKey.generate())
    return a.verify(alter(genuine, signature=a.evidence().body["signature"]))


def _changed_package(a: Attested, _: Alter) -> object:
    a.measurements["package"] = OTHER
    return a.verify()


def _dropped(name: str) -> Fault:
    def fault(a: Attested, _: Alter) -> object:
        del a.measurements[name]
        return a.verify()

    return fault


def _added(name: str) -> Fault:
    def fault(a: Attested, _: Alter) -> object:
        a.measurements[name] = OTHER
        return a.verify()

    return fault


def _reference(**changes: Any) -> Fault:
    return lambda a, _: a.verify(reference={**a.reference(), **changes})


def _bound_to(nonce: bytes, contract: str, hpke: bytes, signing: bytes) -> Fault:
    return lambda a, _: a.verify(bound=report_data(nonce, contract, hpke, signing))


def _aged(by: timedelta) -> Fault:
    def fault(a: Attested, _: Alter) -> object:
        a.now = a.issued + by
        return a.verify()

    return fault


SECOND = timedelta(seconds=1)

FAULTS = [
    # a verifier that checked the signature and not the measurement
    pytest.param("package", _changed_package, id="another package, truthfully signed"),
    pytest.param("installation", _signed_by_another, id="another installation"),
    # one that checked the measurement and not the signature
    pytest.param("another nonce", _remeasured, id="a measurement changed after signing"),
    pytest.param("not signed", _another_installation_s_signature, id="another's signature"),
    pytest.param(
        "not signed",
        lambda a, alter: a.verify(alter(a.evidence(), signature="")),
        id="an empty signature",
    ),
    pytest.param(
        "not signed",
        lambda a, alter: a.verify(
            Evidence(
                kind="simulated",
                body={k: v for k, v in a.evidence().body.items() if k != "signature"},
            )
        ),
        id="no signature",
    ),
    pytest.param(
        "another nonce",
        lambda a, alter: a.verify(alter(a.evidence(), stated={"layers": ["tee"]})),
        id="layers added after signing",
    ),
    pytest.param(
        "not signed",
        lambda a, alter: a.verify(alter(a.evidence(), issued="2027-02-01T10:00:01Z")),
        id="a later time after signing",
    ),
    pytest.param(
        "another nonce",
        lambda a, alter: a.verify(alter(a.evidence(), stated={"issued": "2027-02-01T10:00:01Z"})),
        id="a statement of a later time",
    ),
    pytest.param(
        "another nonce",
        lambda a, alter: a.verify(
            Evidence(
                kind="simulated",
                body={k: v for k, v in a.evidence().body.items() if k != "statement"},
            )
        ),
        id="a statement left out",
    ),
    # an empty expected digest that meant "skip"
    pytest.param("package", _reference(package=()), id="an empty list of references"),
    pytest.param("package", _reference(package=("",)), id="an empty digest"),
    pytest.param("package", _reference(package=("sha256:",)), id="a digest without digits"),
    pytest.param("package", _reference(package=("*",)), id="a wildcard"),
    pytest.param("package", lambda a, _: a.verify(reference={}), id="no references at all"),
    # unused reference values that passed silently
    pytest.param("kernel", _reference(kernel=(OTHER,)), id="a reference that nothing shows"),
    pytest.param("program", _dropped("program"), id="a measurement left out"),
    # a policy reading a field that does not exist
    pytest.param("packages", _reference(packages=(OTHER,)), id="a misspelled reference"),
    # a measurement that nobody approved
    pytest.param("extra", _added("extra"), id="a measurement without a reference"),
    pytest.param(
        "only simulated hardware can take",
        _added("installation"),
        id="evidence that states its own installation",
    ),
    # a nonce that nobody checked, evidence that was relayed
    pytest.param(
        "another nonce", _bound_to(b"m" * 32, CONTRACT, b"hpke", b"signing"), id="a replayed nonce"
    ),
    pytest.param(
        "another nonce", _bound_to(b"n" * 32, OTHER, b"hpke", b"signing"), id="another contract"
    ),
    pytest.param(
        "another nonce",
        _bound_to(b"n" * 32, CONTRACT, b"HPKE", b"signing"),
        id="another enclave's HPKE key",
    ),
    pytest.param(
        "another nonce",
        _bound_to(b"n" * 32, CONTRACT, b"hpke", b"SIGNING"),
        id="another enclave's signing key",
    ),
    pytest.param("another nonce", lambda a, _: a.verify(bound=bytes(64)), id="zeros"),
    pytest.param("wrong length", lambda a, _: a.verify(bound=b""), id="nothing to be bound to"),
    pytest.param("wrong length", lambda a, _: a.verify(bound=a.bound[:63]), id="63 bytes"),
    # a token valid for a month
    pytest.param("not fresh", _aged(timedelta(days=30)), id="a month old"),
    pytest.param("not fresh", _aged(MAX_AGE + SECOND), id="a second too old"),
    pytest.param("not fresh", _aged(-MAX_AGE - SECOND), id="a second too far in the future"),
]


@pytest.mark.parametrize(("said", "fault"), FAULTS)
def test_refused(attested: Attested, altered: Alter, said: str, fault: Fault) -> None:
    with pytest.raises(EvidenceError) as caught:
        fault(attested, altered)
    assert said in caught.value.what
    assert caught.value.expected or caught.value.found


@pytest.mark.parametrize("age", [-MAX_AGE, -SECOND, timedelta(0), SECOND, MAX_AGE])
def test_fresh_enough(attested: Attested, age: timedelta) -> None:
    attested.now = attested.issued + age
    assert attested.verify()


def test_any_of_several_references_is_enough(attested: Attested) -> None:
    reference = {**attested.reference()}
    reference["package"] = (OTHER, *reference["package"])
    assert attested.verify(reference=reference)


def test_every_wrong_measurement_is_named(attested: Attested) -> None:
    attested.measurements["package"] = OTHER
    reference = {**attested.reference(), "kernel": (OTHER,)}
    attested.measurements["extra"] = OTHER
    with pytest.raises(EvidenceError) as caught:
        attested.verify(reference=reference)
    for name in ("package", "kernel", "extra"):
        assert f"measurement {name}" in caught.value.what
    assert "program" not in caught.value.what
    assert caught.value.remedy


# --- an exit code ignored, a bool forgotten --------------------------------------------------


def test_nothing_that_verifies_returns_a_truth_value() -> None:
    for kind in (Verifier, SimulatedVerifier):
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            returned = inspect.signature(method).return_annotation
            assert returned != "bool", f"{kind.__name__}.{name}"
    assert inspect.signature(Verifier.verify).return_annotation == "Claims"
    assert inspect.signature(Verifier.authenticate).return_annotation == "Claims"


# --- a mock in the shipped package -----------------------------------------------------------


def test_the_package_ships_no_verifier_but_the_known_ones() -> None:
    for module in pkgutil.walk_packages(cenacle.__path__, "cenacle."):
        if "migrations" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    shipped = {kind for kind in _subclasses(Verifier) if kind.__module__.startswith("cenacle.")}
    by_kind = {made.kind: made for made in (type(verifier) for verifier in hardware_verifiers())}
    assert set(by_kind) == set(EVIDENCE_KINDS) - {"simulated"}
    # The base of devices' verifiers, and what a monitor of IMA lists goes on with.
    helpers = {"AcceleratorVerifier", "_Step"}
    assert {k.__name__ for k in shipped - {SimulatedVerifier, *by_kind.values()}} == helpers


def _subclasses(kind: type[Any]) -> set[type[Any]]:
    return {found for sub in kind.__subclasses__() for found in {sub, *_subclasses(sub)}}


class Careless(Verifier):
    """A verifier that believes everything, as a test might define one."""

    kind = "snp"

    def inspect(self, evidence: Evidence, now: Any) -> Shown:
        claims = Claims(
            kind="snp", protection="tee", measurements=dict(evidence.body), layers=(), issued=now
        )
        return Shown(claims, bytes(64))


def test_evidence_that_shows_nothing_where_nothing_is_demanded(attested: Attested) -> None:
    class Empty(Careless):
        def inspect(self, evidence: Evidence, now: Any) -> Shown:
            claims = super().inspect(evidence, now).claims
            return Shown(claims.model_copy(update={"measurements": {}}), bytes(64))

    evidence = Evidence(kind="snp", body={"package": OTHER})
    with pytest.raises(EvidenceError, match="proves nothing"):
        Empty().verify(evidence, {}, bytes(64), attested.now)
    with pytest.raises(EvidenceError, match="package"):
        Empty().verify(evidence, {"package": (OTHER,)}, bytes(64), attested.now)
    assert Careless().verify(evidence, {"package": (OTHER,)}, bytes(64), attested.now)


# --- simulated evidence in production --------------------------------------------------------


class Renamed(SimulatedVerifier):
    """Still simulated, whatever it is derived from."""


@pytest.mark.parametrize("verifier", [SimulatedVerifier(), Renamed()])
@pytest.mark.parametrize("others", [(), (Careless(),)])
def test_a_production_set_refuses_simulated_verifiers(
    verifier: Verifier, others: tuple[Verifier, ...]
) -> None:
    for listed in ((verifier, *others), (*others, verifier)):
        with pytest.raises(EvidenceError, match="production"):
            VerifierSet.of_production(*listed)
        with pytest.raises(EvidenceError, match="production"):
            VerifierSet(listed, production=True)


def test_nothing_can_be_added_later(attested: Attested) -> None:
    production = VerifierSet.of_production(Careless())
    for name in ("production", "_verifiers", "kinds", "for_kind", "extra", "add"):
        with pytest.raises(AttributeError):
            setattr(production, name, {"simulated": SimulatedVerifier()})
        with pytest.raises(AttributeError):
            delattr(production, name)
    public = {name for name in dir(production) if not name.startswith("_")}
    assert public == {"for_kind", "kinds", "of_development", "of_production", "production"}
    with pytest.raises(TypeError):
        production._verifiers["simulated"] = SimulatedVerifier()  # type: ignore[index]
    assert production.kinds == ("snp",)
    with pytest.raises(EvidenceError, match="no verifier") as caught:
        production.for_kind(attested.evidence().kind)
    assert caught.value.expected == "snp"


def test_an_empty_production_set_believes_nothing() -> None:
    production = VerifierSet.of_production()
    for kind in ("simulated", "snp", "", "SNP"):
        with pytest.raises(EvidenceError, match="no verifier") as caught:
            production.for_kind(kind)
        assert "none" in str(caught.value.expected)


def test_a_development_set_finds_by_kind() -> None:
    simulated, careless = SimulatedVerifier(), Careless()
    development = VerifierSet.of_development(simulated, careless)
    assert development.kinds == ("simulated", "snp")
    assert development.for_kind("simulated") is simulated
    assert development.for_kind("snp") is careless
    assert not development.production
    with pytest.raises(EvidenceError, match="no verifier"):
        development.for_kind("tdx")


def test_two_verifiers_of_one_kind_are_refused() -> None:
    with pytest.raises(EvidenceError, match="two verifiers"):
        VerifierSet.of_development(SimulatedVerifier(), Renamed())


def test_a_verifier_of_an_unknown_kind_is_refused() -> None:
    class Unknown(Careless):
        kind = "psychic"

    with pytest.raises(CenacleError, match="unknown"):
        VerifierSet.of_production(Unknown())


def test_attester_and_verifier_agree_on_their_kind() -> None:
    assert SimulatedAttester.kind == SimulatedVerifier.kind == "simulated"
