"""Each demand, broken one at a time, through the whole path of a release.

A refusal names exactly what failed, with what was found and demanded, and leaves no trace: no
log entry, no charge, no run, and the nonce can still be used.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from cenacle.attestation.registry import VerifierSet
from cenacle.attestation.simulated import InstallationKey, SimulatedAttester, SimulatedVerifier
from cenacle.broker.release import ReleaseDesk
from cenacle.broker.service import Broker
from cenacle.crypto import SigningKey
from cenacle.documents.base import b64, format_time, sha256_digest
from cenacle.errors import (
    CenacleError,
    ConflictError,
    EvidenceError,
    InputError,
    RefusedError,
)

Refused = Callable[[Callable[[], object]], CenacleError]
OTHER = sha256_digest(b"other")


def named(error: CenacleError) -> set[str]:
    assert isinstance(error, RefusedError)
    for clause in error.clauses:
        assert clause["found"]
        assert clause["demanded"]
        assert clause["verdict"] == "failed"
        assert clause["name"] in str(error)
        assert clause["found"] in str(error)
    return {f"{c['subject'].split(' of ')[0]}: {c['name']}" for c in error.clauses}


def yesterday(world: Any) -> str:
    return format_time(world.clock() - timedelta(days=1))


@pytest.mark.parametrize(
    ("changes", "clause"),
    [
        ({"protection": "tee"}, "protection"),
        ({"protection": "measured"}, "protection"),
        ({"recipes": []}, "recipe"),
        ({"recipes": ["logistic", OTHER]}, "recipe"),
        ({"offload": []}, "offload"),
        ({"privacy": {"epsilon": 8.0, "delta": 1e-6}}, "privacy"),
        ({"recipients": []}, "recipients"),
        ({"recipients": ["hospital-b"]}, "recipients"),
        ({"recipients": [f"clinic@{OTHER}"]}, "recipients"),
        ({"outputs": []}, "outputs"),
        ({"outputs": ["metrics"]}, "outputs"),
        ({"purposes": []}, "purpose"),
        ({"purposes": ["marketing"]}, "purpose"),
        ({"uses": 0}, "uses"),
        ({"price": {"amount": 1, "currency": "EUR"}}, "price"),
    ],
)
def test_each_field_of_terms(
    world: Any,
    make_terms: Callable[..., dict[str, Any]],
    refused: Refused,
    changes: dict[str, Any],
    clause: str,
) -> None:
    asset = world.deposit("hospital-a", "strict", terms=make_terms(**changes))
    digest = world.agree(world.contract(asset, world.assets["hospital-b-records"]))
    enclave = world.enclave(digest)
    assert named(refused(enclave.release)) == {f"asset hospital-a: {clause}"}


@pytest.mark.parametrize(
    "scheme", ["enclave", "measured", "lowrank", "permuted", "masked-training"]
)
def test_keys_leave_only_for_a_scheme_that_every_owner_allows(
    scheme: str, world: Any, make_terms: Callable[..., dict[str, Any]], refused: Refused
) -> None:
    """Without keys nothing is opened in the enclave, so nothing can be sent to accelerators."""
    schemes = ("enclave", "measured", "lowrank", "permuted", "masked-training", "masked")
    others = [name for name in schemes if name != scheme]
    willing = world.deposit("hospital-a", "willing", terms=make_terms(offload=[scheme]))
    strict = world.deposit("hospital-b", "strict", terms=make_terms(offload=others))
    plan: dict[str, Any] = {"scheme": scheme}
    if scheme == "masked-training":
        plan["accelerators"] = {"count": 2}
    digest = world.agree(world.contract(willing, strict, offload=plan))
    assert named(refused(world.enclave(digest).release)) == {"asset hospital-b: offload"}
    allowed = world.agree(world.contract(willing, offload=plan))
    world.enclave(allowed).release()


def test_absent_terms_allow_nothing(
    world: Any, make_terms: Callable[..., dict[str, Any]], refused: Refused
) -> None:
    asset = world.deposit("hospital-a", "silent", terms={"expires": make_terms()["expires"]})
    digest = world.agree(world.contract(asset))
    assert named(refused(world.enclave(digest).release)) == {
        f"asset hospital-a: {name}"
        for name in ("protection", "recipe", "privacy", "recipients", "outputs", "purpose")
    }


def test_terms_that_expired(
    world: Any, make_terms: Callable[..., dict[str, Any]], refused: Refused
) -> None:
    soon = format_time(world.clock() + timedelta(minutes=1))
    asset = world.deposit("hospital-a", "brief", terms=make_terms(expires=soon))
    digest = world.agree(world.contract(asset))
    world.clock.turn(seconds=61)
    assert named(refused(world.enclave(digest).release)) == {"asset hospital-a: expires"}
    world.clock.turn(seconds=-1)  # to the very second, it holds
    world.enclave(digest).release()


def test_the_owners_signature_is_needed_though_the_contract_does_not_ask_for_it(
    world: Any, refused: Refused
) -> None:
    digest = world.propose(world.contract(approval="hospital-b"))
    world.sign(digest, "hospital-b")
    assert named(refused(world.enclave(digest).release)) == {"asset hospital-a: approval"}


@pytest.mark.parametrize(
    ("payments", "met"),
    [
        ([], False),
        ([("clinic", "hospital-a", 99, "EUR")], False),
        ([("clinic", "hospital-a", 100, "USD")], False),
        ([("clinic", "hospital-b", 100, "EUR")], False),
        ([("hospital-a", "hospital-a", 100, "EUR")], False),
        ([("clinic", "hospital-a", 60, "EUR"), ("hospital-b", "hospital-a", 40, "EUR")], True),
    ],
)
def test_the_price(
    world: Any,
    make_terms: Callable[..., dict[str, Any]],
    refused: Refused,
    payments: list[tuple[str, str, int, str]],
    met: bool,
) -> None:
    price = make_terms(price={"amount": 100, "currency": "EUR"})
    asset = world.deposit("hospital-a", "paid", terms=price)
    listed = [
        {"payer": payer, "payee": payee, "amount": amount, "currency": currency}
        for payer, payee, amount, currency in payments
    ]
    enclave = world.enclave(world.agree(world.contract(asset, payments=listed)))
    if met:
        enclave.release()
    else:
        assert named(refused(enclave.release)) == {"asset hospital-a: price"}


def _unsigned(world: Any) -> str:
    digest: str = world.propose(world.contract())
    world.sign(digest, "hospital-a")
    return digest


def _vetoed(world: Any) -> str:
    digest: str = world.agree()
    world.veto(digest, "clinic", "consent was withdrawn")
    return digest


def _expired(world: Any) -> str:
    digest: str = world.agree(expires=format_time(world.clock() + timedelta(seconds=1)))
    world.clock.turn(seconds=2)
    return digest


def _replaced_asset(world: Any) -> str:
    digest: str = world.agree()
    old = world.assets["hospital-b-records"]
    world.deposit("hospital-b", "newer", replaces=old.digest)
    return digest


def _replaced_contract(world: Any) -> str:
    digest: str = world.agree()
    world.agree(name="newer", replaces=digest)
    return digest


def _wrong_owner(world: Any) -> str:
    refs = {
        name: {"digest": world.assets[f"{name}-records"].digest, "owner": name}
        for name in ("hospital-a", "hospital-b")
    }
    refs["hospital-b"]["owner"] = "clinic"
    digest: str = world.propose(world.contract(assets=refs))
    world.sign(digest, "hospital-a", "hospital-b")
    return digest


@pytest.mark.parametrize(
    ("prepare", "clauses"),
    [
        (_unsigned, {"contract: approval", "asset hospital-b: approval"}),
        (_vetoed, {"contract: vetoes"}),
        (_expired, {"contract: expires"}),
        (_replaced_asset, {"asset hospital-b: current"}),
        (_replaced_contract, {"contract: current"}),
        (_wrong_owner, {"asset hospital-b: identity"}),
    ],
)
def test_each_demand_of_the_contract(
    world: Any, refused: Refused, prepare: Callable[[Any], str], clauses: set[str]
) -> None:
    digest = prepare(world)
    assert named(refused(world.enclave(digest).release)) == clauses


@pytest.mark.parametrize("name", ["interpreter", "package", "sandbox", "program"])
def test_each_measurement_that_changed(world: Any, refused: Refused, name: str) -> None:
    enclave = world.enclave(world.agree())
    enclave.measurements[name] = OTHER
    assert named(refused(enclave.release)) == {f"contract: measurement {name}"}


@pytest.mark.parametrize("name", ["interpreter", "package", "sandbox", "program"])
def test_each_measurement_that_is_not_shown(world: Any, refused: Refused, name: str) -> None:
    enclave = world.enclave(world.agree())
    del enclave.measurements[name]
    assert named(refused(enclave.release)) == {f"contract: measurement {name}"}


def test_a_measurement_without_a_reference(world: Any, refused: Refused) -> None:
    enclave = world.enclave(world.agree())
    enclave.measurements["plug-in"] = OTHER
    assert named(refused(enclave.release)) == {"contract: measurement plug-in"}


def test_another_installation(world: Any, refused: Refused) -> None:
    other = SimulatedAttester(InstallationKey(SigningKey.generate()))
    enclave = world.enclave(world.agree(), attester=other)
    assert named(refused(enclave.release)) == {"contract: measurement installation"}


@pytest.mark.parametrize("missing", ["no-core-dumps", "seccomp"])
def test_a_layer_that_was_not_active(world: Any, refused: Refused, missing: str) -> None:
    enclave = world.enclave(world.agree())
    enclave.layers = tuple(layer for layer in enclave.layers if layer != missing)
    assert named(refused(enclave.release)) == {"contract: layers"}


def test_an_evidence_kind_that_the_contract_does_not_list(world: Any, refused: Refused) -> None:
    software = world.reference()["simulated"]
    digest = world.agree(enclave={"reference": {"tpm": software}})
    assert named(refused(world.enclave(digest).release)) == {
        "contract: evidence",
        *(f"contract: measurement {name}" for name in software),
    }


def test_all_that_failed_is_named_at_once(world: Any, refused: Refused) -> None:
    digest = _unsigned(world)
    enclave = world.enclave(digest)
    enclave.measurements["package"] = OTHER
    enclave.layers = ()
    assert named(refused(enclave.release)) == {
        "contract: approval",
        "contract: measurement package",
        "contract: layers",
        "asset hospital-b: approval",
    }
    # Evidence that is not accepted does not hide the others either.
    evidence = enclave.attest(b"x" * 40).to_fields()
    assert named(refused(lambda: enclave.release(evidence=evidence))) == {
        "contract: approval",
        "contract: evidence",
        "asset hospital-b: approval",
    }


def test_a_refused_request_may_be_repeated_with_its_nonce_once_it_is_right(world: Any) -> None:
    digest = world.propose(world.contract())
    world.sign(digest, "hospital-a")
    enclave = world.enclave(digest)
    request = enclave.request()
    with pytest.raises(RefusedError):
        world.desk.release(request)
    world.sign(digest, "hospital-b")
    answer = world.desk.release(request)
    assert enclave.open(answer)["hospital-a"]
    with pytest.raises(EvidenceError, match="shown before"):
        world.desk.release(request)


# ------------------------------------------------------------------ evidence


def test_evidence_of_another_contract(world: Any, refused: Refused) -> None:
    ours, theirs = world.agree(), world.agree(name="theirs")
    enclave = world.enclave(ours)
    nonce = world.desk.nonce(ours)
    evidence = enclave.attest(nonce, contract=theirs).to_fields()
    error = refused(lambda: enclave.release(nonce=b64(nonce), evidence=evidence))
    assert named(error) == {"contract: evidence"}
    assert "bound to another nonce, contract or enclave key" in str(error)


@pytest.mark.parametrize("key", ["hpke", "signing"])
def test_evidence_with_another_enclaves_key(world: Any, refused: Refused, key: str) -> None:
    digest = world.agree()
    enclave, thief = world.enclave(digest), world.enclave(digest)
    stolen = {
        "hpke": {"hpke_key": b64(thief.hpke.public_key.raw)},
        "signing": {"signing_key": b64(thief.signing.verify_key.raw)},
    }
    error = refused(lambda: enclave.release(**stolen[key]))
    assert named(error) == {"contract: evidence"}
    assert "bound to another nonce, contract or enclave key" in str(error)


def test_evidence_for_another_nonce(world: Any, refused: Refused) -> None:
    digest = world.agree()
    enclave = world.enclave(digest)
    evidence = enclave.attest(world.desk.nonce(digest)).to_fields()
    error = refused(lambda: enclave.release(evidence=evidence))
    assert "bound to another nonce, contract or enclave key" in str(error)


def test_evidence_that_was_altered(world: Any, refused: Refused) -> None:
    enclave = world.enclave(world.agree())
    body = enclave.attest(b"").body
    evidence = enclave.request().evidence
    statement = evidence["body"]["statement"]
    measured = {**statement["measurements"], "package": OTHER}
    signed, bound = "not signed by the installation", "bound to another nonce"
    for name, value, said in (
        ("issued", "2027-01-31T12:00:01Z", signed),
        ("installation_key", b64(SigningKey.generate().verify_key.raw), signed),
        ("signature", body["signature"], signed),
        ("statement", {**statement, "layers": ["seccomp", "landlock", "x"]}, bound),
        ("statement", {**statement, "issued": "2027-01-31T12:00:01Z"}, bound),
        ("statement", {**statement, "measurements": measured}, bound),
    ):
        altered = {**evidence, "body": {**evidence["body"], name: value}}
        request = {"nonce": b64(enclave.nonce), "evidence": altered}
        error = refused(lambda request=request: enclave.release(**request))  # type: ignore[misc]
        assert named(error) == {"contract: evidence"}, name
        assert said in str(error), name


def test_evidence_that_is_old(world: Any, refused: Refused) -> None:
    digest = world.agree()
    enclave = world.enclave(digest)
    nonce = world.desk.nonce(digest)
    world.clock.turn(minutes=-4)
    old = enclave.attest(nonce).to_fields()
    world.clock.turn(minutes=8)
    enclave.nonce = nonce
    error = refused(lambda: enclave.release(nonce=b64(nonce), evidence=old))
    assert "not fresh" in str(error)


def test_evidence_of_a_kind_without_a_verifier(world: Any, refused: Refused) -> None:
    digest = world.agree(
        enclave={
            "reference": {**world.reference(), "tpm": world.reference()["simulated"]},
        }
    )
    enclave = world.enclave(digest)
    body = enclave.request().evidence["body"]
    error = refused(lambda: enclave.release(evidence={"version": 1, "kind": "tpm", "body": body}))
    assert named(error) == {"contract: evidence"}
    assert "no verifier" in str(error)


# ------------------------------------------------------------------ production


def test_a_production_broker_refuses_simulated_evidence(world: Any, refused: Refused) -> None:
    digest = world.agree()
    production = Broker.production(world.store, world.broker.keys)
    production.clock = world.clock
    assert production.verifiers.production
    assert production.verifiers.kinds == ()
    world.desk = ReleaseDesk(production)
    error = refused(world.enclave(digest).release)
    assert named(error) == {"contract: evidence"}
    assert "no verifier" in str(error)


def test_nothing_turns_a_production_broker_into_another(world: Any) -> None:
    keys = world.broker.keys
    with pytest.raises(EvidenceError, match="production broker cannot hold a simulated"):
        Broker.production(world.store, keys, SimulatedVerifier())
    with pytest.raises(EvidenceError):
        VerifierSet((SimulatedVerifier(),), production=True)
    production = Broker.production(world.store, keys)
    with pytest.raises(AttributeError):
        production.verifiers.extra = SimulatedVerifier()
    assert not hasattr(production.verifiers, "add")


# ------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"contract": OTHER}, InputError),
        ({"hpke_key": b64(b"short")}, InputError),
        ({"signing_key": b64(b"short")}, InputError),
        ({"signing_key": b64(bytes(32))}, InputError),
        ({"evidence": {}}, InputError),
        ({"evidence": {"version": 1, "kind": "simulated", "body": {}}}, InputError),
        ({"evidence": {"version": 1, "kind": "simulated", "body": {"x": 1}}}, RefusedError),
        ({"nonce": b64(b"")}, RefusedError),
        ({"resume": "no-such-run"}, ConflictError),
    ],
)
def test_a_malformed_request(
    world: Any, refused: Refused, changes: dict[str, Any], kind: type[CenacleError]
) -> None:
    enclave = world.enclave(world.agree())
    assert isinstance(refused(lambda: enclave.release(**changes)), kind)


@pytest.mark.parametrize("name", ["", "x", OTHER[:-1], OTHER.upper(), OTHER + "\n", "\x00"])
def test_what_is_no_digest_has_no_nonce(world: Any, name: str) -> None:
    with pytest.raises(InputError, match="named by its digest"):
        world.desk.nonce(name)


def test_a_nonce_of_a_contract_that_nobody_proposed_is_of_no_use(
    world: Any, refused: Refused
) -> None:
    enclave = world.enclave(world.agree())
    enclave.contract = OTHER
    error = refused(lambda: enclave.release())
    assert isinstance(error, InputError)
    assert "not known to this broker" in str(error)
