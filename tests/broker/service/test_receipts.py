"""A receipt holds as a whole or not at all: whatever part is altered, verifying raises."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from cenacle.attestation.registry import VerifierSet
from cenacle.attestation.simulated import InstallationKey, SimulatedAttester, SimulatedVerifier
from cenacle.broker.receipts import (
    VerifiedReceipt,
    _check_accelerators,
    _check_serving,
    open_contract,
    read_bundle,
    verify_receipt,
)
from cenacle.crypto import SigningKey
from cenacle.documents.base import b64, canonical_json, parse_json, unb64
from cenacle.documents.dsse import Envelope
from cenacle.documents.offload import OffloadPlan
from cenacle.documents.receipt import OffloadRecord, ServingRecord, Statement
from cenacle.documents.serving import ServeJob
from cenacle.errors import CenacleError, DocumentError, EvidenceError, ProofError, RefusedError
from tests.support.nested import leaves, replaced

Fields = dict[str, Any]
OTHER = "sha256:" + "0" * 64


class Finished:
    """Two finished jobs of one broker, and one of another broker."""

    def __init__(self, world: Any, stranger: Any) -> None:
        self.world, self.stranger = world, stranger
        self.digest = world.broker.identity.digest
        self.enclave = world.enclave(world.agree())
        self.bundle: Fields = self.enclave.finish(self.enclave.release()).to_fields()
        second = world.enclave(world.agree(name="second"))
        self.second: Fields = second.finish(second.release()).to_fields()
        foreign = stranger.enclave(stranger.agree())
        self.foreign: Fields = foreign.finish(foreign.release()).to_fields()

    def verify(self, bundle: Fields) -> VerifiedReceipt:
        return verify_receipt(
            read_bundle(canonical_json(bundle)),
            broker_digest=self.digest,
            verifiers=VerifierSet.of_development(SimulatedVerifier()),
        )

    def restated(self, change: Callable[[Fields], None], signer: Any = None) -> Fields:
        """The bundle with another statement, signed by the enclave itself."""
        envelope = Envelope.from_fields(self.bundle["statement"])
        fields = parse_json(envelope.payload)
        change(fields)
        statement = Envelope(canonical_json(fields), Statement.media_type, {})
        key = signer or self.enclave.signing
        return {**self.bundle, "statement": statement.signed_by(key).to_fields()}


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, make_world: Callable[[Path], Any]
) -> Finished:
    world, stranger = (make_world(tmp_path_factory.mktemp(name)) for name in ("ours", "theirs"))
    made = Finished(world, stranger)
    world.close()
    stranger.close()
    return made


def test_a_genuine_receipt_verifies(finished: Finished) -> None:
    verified = finished.verify(finished.bundle)
    assert verified.receipt.contract == finished.enclave.contract
    assert verified.opened.signed == {"hospital-a", "hospital-b"}
    assert set(verified.opened.parties) == {"hospital-a", "hospital-b", "clinic"}
    assert verified.claims.protection == "simulated"
    assert verified.head.origin == "test/broker"
    finished.verify(finished.second)


def test_a_receipt_of_a_resumed_run_verifies(make_world: Any, tmp_path: Path) -> None:
    world = make_world(tmp_path)
    digest = world.agree()
    run = world.enclave(digest).release().run
    world.clock.turn(hours=2)
    enclave = world.enclave(digest)
    bundle = enclave.finish(enclave.release(resume=run))
    verified = verify_receipt(
        bundle, broker_digest=world.broker.identity.digest, verifiers=world.broker.verifiers
    )
    assert verified.receipt.resumed == 1
    assert verified.receipt.started < verified.receipt.finished
    world.close()


def test_a_verifier_that_accepts_no_simulation(finished: Finished) -> None:
    bundle = read_bundle(canonical_json(finished.bundle))
    with pytest.raises(EvidenceError, match="no verifier"):
        verify_receipt(bundle, broker_digest=finished.digest, verifiers=VerifierSet.of_production())


def test_another_broker_than_was_pinned(finished: Finished) -> None:
    with pytest.raises(ProofError, match="another broker"):
        finished.verify(finished.foreign)
    with pytest.raises(ProofError, match="another broker"):
        verify_receipt(
            read_bundle(canonical_json(finished.bundle)),
            broker_digest=OTHER,
            verifiers=VerifierSet.of_development(SimulatedVerifier()),
        )


# ------------------------------------------------------------------ parts from elsewhere


@pytest.mark.parametrize("source", ["second", "foreign"])
@pytest.mark.parametrize(
    "part",
    ["statement", "binding", "settlement", "evidence", "contract", "parties", "assets", "broker"],
)
def test_each_part_of_another_receipt(finished: Finished, part: str, source: str) -> None:
    other = getattr(finished, source)
    if other[part] == finished.bundle[part]:
        # The second job has the same parties, assets and broker.
        assert (source, part) in {("second", p) for p in ("parties", "assets", "broker")}
        return
    with pytest.raises(CenacleError):
        finished.verify({**finished.bundle, part: other[part]})


@pytest.mark.parametrize(
    "part", ["statement", "binding", "settlement", "evidence", "contract", "parties", "assets"]
)
def test_each_part_missing(finished: Finished, part: str) -> None:
    bundle = {name: value for name, value in finished.bundle.items() if name != part}
    with pytest.raises(DocumentError, match="missing"):
        finished.verify(bundle)


def test_a_surplus_field(finished: Finished) -> None:
    with pytest.raises(DocumentError):
        finished.verify({**finished.bundle, "note": "trust me"})


# ------------------------------------------------------------------ signatures and documents


def _no_statement_signature(f: Finished) -> Fields:
    return {**f.bundle, "statement": {**f.bundle["statement"], "signatures": []}}


def _statement_by_another_key(f: Finished) -> Fields:
    return f.restated(lambda _: None, SigningKey.generate())


def _enclave_key_exchanged_everywhere(f: Finished) -> Fields:
    thief = SigningKey.generate()
    binding = {**f.bundle["binding"], "signing_key": b64(thief.verify_key.raw)}
    return {**f.restated(lambda _: None, thief), "binding": binding}


def _new_evidence_by_the_thief(f: Finished) -> Fields:
    """Everything the thief can make anew: key, evidence of his own installation, statement."""
    thief = f.world.enclave(f.enclave.contract)
    thief.attester = SimulatedAttester(InstallationKey(SigningKey.generate()))
    evidence = thief.attest(f.enclave.nonce)

    def change(fields: Fields) -> None:
        fields["predicate"]["evidence"] = evidence.digest

    return {
        **f.restated(change, thief.signing),
        "evidence": evidence.to_fields(),
        "binding": {
            "nonce": b64(f.enclave.nonce),
            "hpke_key": b64(thief.hpke.public_key.raw),
            "signing_key": b64(thief.signing.verify_key.raw),
        },
    }


def _contract_signature_missing(f: Finished) -> Fields:
    contract = copy.deepcopy(f.bundle["contract"])
    contract["signatures"].pop()
    return {**f.bundle, "contract": contract}


def _contract_not_signed(f: Finished) -> Fields:
    return {**f.bundle, "contract": {**f.bundle["contract"], "signatures": []}}


def _contract_signed_by_a_stranger(f: Finished) -> Fields:
    envelope = Envelope.from_fields(f.bundle["contract"]).signed_by(SigningKey.generate())
    return {**f.bundle, "contract": envelope.to_fields()}


def _contract_signature_garbled(f: Finished) -> Fields:
    envelope = Envelope.from_fields(f.bundle["contract"])
    keyid = next(iter(envelope.signatures))
    return {**f.bundle, "contract": envelope.with_signature(keyid, bytes(64)).to_fields()}


def _a_party_missing(f: Finished) -> Fields:
    return {**f.bundle, "parties": f.bundle["parties"][1:]}


def _a_party_twice(f: Finished) -> Fields:
    return {**f.bundle, "parties": [*f.bundle["parties"], f.bundle["parties"][0]]}


def _a_party_too_many(f: Finished) -> Fields:
    extra = type(f.world.actors["clinic"])("extra").envelope.to_fields()
    return {**f.bundle, "parties": [*f.bundle["parties"], extra]}


def _an_impostor(f: Finished) -> Fields:
    impostor = type(f.world.actors["clinic"])("clinic").envelope.to_fields()
    parties = [
        impostor if parse_json(unb64(p["payload"]))["name"] == "clinic" else p
        for p in f.bundle["parties"]
    ]
    return {**f.bundle, "parties": parties}


def _a_manifest_missing(f: Finished) -> Fields:
    assets = {k: v for k, v in f.bundle["assets"].items() if k != "hospital-a"}
    return {**f.bundle, "assets": assets}


def _a_manifest_too_many(f: Finished) -> Fields:
    return {**f.bundle, "assets": {**f.bundle["assets"], "x": f.bundle["assets"]["hospital-a"]}}


def _manifests_swapped(f: Finished) -> Fields:
    one, two = f.bundle["assets"]["hospital-a"], f.bundle["assets"]["hospital-b"]
    return {**f.bundle, "assets": {"hospital-a": two, "hospital-b": one}}


def _a_manifest_not_signed(f: Finished) -> Fields:
    assets = copy.deepcopy(f.bundle["assets"])
    assets["hospital-a"]["signatures"] = []
    return {**f.bundle, "assets": assets}


# ------------------------------------------------------------------ the log


def _path_of_the_settlement_cut(f: Finished) -> Fields:
    settlement = copy.deepcopy(f.bundle["settlement"])
    settlement["path"].pop()
    return {**f.bundle, "settlement": settlement}


def _index_of_the_settlement(f: Finished) -> Fields:
    settlement = {**f.bundle["settlement"], "index": f.bundle["settlement"]["index"] - 1}
    return {**f.bundle, "settlement": settlement}


def _head_of_another_log(f: Finished) -> Fields:
    settlement = {**f.bundle["settlement"], "head": f.foreign["settlement"]["head"]}
    return {**f.bundle, "settlement": settlement}


def _head_of_another_size(f: Finished) -> Fields:
    settlement = {**f.bundle["settlement"], "head": f.second["settlement"]["head"]}
    return {**f.bundle, "settlement": settlement}


def _head_signature_missing(f: Finished) -> Fields:
    head = f.bundle["settlement"]["head"].split("\n\n")[0] + "\n\n"
    return {**f.bundle, "settlement": {**f.bundle["settlement"], "head": head}}


def _settlement_replaced_by_the_release(f: Finished) -> Fields:
    statement = Envelope.from_fields(f.bundle["statement"]).peek(Statement)
    return {**f.bundle, "settlement": statement.predicate.release.to_fields()}


def _settlement_entry_altered(f: Finished) -> Fields:
    entry = parse_json(unb64(f.bundle["settlement"]["entry"]))
    entry["receipt"] = OTHER
    settlement = {**f.bundle["settlement"], "entry": b64(canonical_json(entry))}
    return {**f.bundle, "settlement": settlement}


@pytest.mark.parametrize(
    "tamper",
    [
        _no_statement_signature,
        _statement_by_another_key,
        _enclave_key_exchanged_everywhere,
        _new_evidence_by_the_thief,
        _contract_signature_missing,
        _contract_not_signed,
        _contract_signed_by_a_stranger,
        _contract_signature_garbled,
        _a_party_missing,
        _a_party_twice,
        _a_party_too_many,
        _an_impostor,
        _a_manifest_missing,
        _a_manifest_too_many,
        _manifests_swapped,
        _a_manifest_not_signed,
        _path_of_the_settlement_cut,
        _index_of_the_settlement,
        _head_of_another_log,
        _head_of_another_size,
        _head_signature_missing,
        _settlement_replaced_by_the_release,
        _settlement_entry_altered,
    ],
)
def test_a_receipt_that_was_tampered_with(
    finished: Finished, tamper: Callable[[Finished], Fields]
) -> None:
    with pytest.raises(CenacleError) as caught:
        finished.verify(tamper(finished))
    assert not isinstance(caught.value, AssertionError)


def test_a_contract_that_lacks_an_approval_is_refused_by_name(finished: Finished) -> None:
    with pytest.raises(RefusedError) as caught:
        finished.verify(_contract_signature_missing(finished))
    assert "approval" in {clause["name"] for clause in caught.value.clauses}


# ------------------------------------------------------------------ what the enclave states


@pytest.mark.parametrize(
    "path",
    [
        ("contract",),
        ("run",),
        ("broker",),
        ("evidence_kind",),
        ("evidence",),
        ("protection",),
        ("measurements", "package"),
        ("layers",),
        ("inputs", "hospital-a", "asset"),
        ("inputs", "hospital-a", "content"),
        ("inputs", "hospital-a", "owner"),
        ("outputs", 0, "name"),
        ("outputs", 0, "kind"),
        ("outputs", 0, "recipient"),
        ("offload", "scheme"),
        ("resumed",),
        ("started",),
        ("release", "index"),
        ("release", "entry"),
        ("release", "head"),
    ],
)
def test_a_lying_enclave(finished: Finished, path: tuple[Any, ...]) -> None:
    """Even signed by the right enclave, a statement must agree with evidence, log and contract.

    The settlement names the digest of the statement that was made, so each of these would fail
    there at the latest; but a broker that colludes must not help either.
    """
    lies = {
        "contract": OTHER,
        "broker": OTHER,
        "evidence": OTHER,
        "evidence_kind": "tpm",
        "protection": "tee",
        "package": OTHER,
        "layers": ["seccomp"],
        "asset": OTHER,
        "content": OTHER,
        "kind": "metrics",
        "resumed": 1,
        "started": "2027-01-31T11:59:59Z",
        "index": 0,
        "head": finished.second["settlement"]["head"],
        "entry": finished.second["settlement"]["entry"],
    }

    def change(fields: Fields) -> None:
        place = fields["predicate"]
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = lies.get(path[-1], "hospital-b")
        fields["subject"] = [
            {"name": o["name"], "digest": {"sha256": o["content"].removeprefix("sha256:")}}
            for o in fields["predicate"]["outputs"]
        ]

    with pytest.raises(CenacleError) as caught:
        finished.verify(finished.restated(change))
    assert "settlement" not in caught.value.what


_USED = {
    "accelerators": [
        {"name": f"process-{n}", "kind": "process", "description": "process, cpu"} for n in (1, 2)
    ],
    "dropped": [],
    "bytes_sent": 10,
    "bytes_received": 10,
    "products": 7,
    "checked": 7,
    "seconds_inside": 1.5,
    "seconds_outside": 0.5,
    "kept_inside": [],
}


def test_accelerators_that_the_contract_does_not_have(finished: Finished) -> None:
    def change(fields: Fields) -> None:
        fields["predicate"]["accelerators"] = _USED

    with pytest.raises(ProofError, match="accelerators are not the contract's"):
        finished.verify(finished.restated(change))


@pytest.mark.parametrize(
    ("plan", "used", "problem"),
    [
        ({"scheme": "permuted"}, {}, None),
        ({"scheme": "permuted"}, {"products": 0, "checked": 0}, None),
        ({"scheme": "permuted", "check": False}, {"checked": 0}, None),
        ({"scheme": "measured"}, {"checked": 0}, None),
        ({"scheme": "measured"}, {}, "not checked as the contract says"),
        ({"scheme": "permuted"}, {"checked": 6}, "not checked as the contract says"),
        ({"scheme": "permuted", "check": False}, {}, "not checked as the contract says"),
        ({"scheme": "permuted"}, None, "accelerators are not the contract's"),
        ({"scheme": "enclave"}, {}, "accelerators are not the contract's"),
        ({"scheme": "permuted", "count": 3}, {}, "accelerators are not the contract's"),
        ({"scheme": "permuted", "kinds": ("cuda",)}, {}, "accelerators are not the contract's"),
    ],
)
def test_what_a_receipt_says_of_accelerators_fits_the_plan(
    plan: Fields, used: Fields | None, problem: str | None
) -> None:
    fields = dict(plan)
    if plan["scheme"] != "enclave":
        fields["accelerators"] = {
            "count": fields.pop("count", 2),
            "kinds": fields.pop("kinds", ("process",)),
        }
    contract: Any = SimpleNamespace(
        offload=TypeAdapter(OffloadPlan).validate_python(fields), privacy=None
    )
    record = None if used is None else OffloadRecord.from_fields({**_USED, **used})
    receipt: Any = SimpleNamespace(accelerators=record)
    if problem is None:
        _check_accelerators(receipt, contract)
    else:
        with pytest.raises(ProofError, match=problem):
            _check_accelerators(receipt, contract)


@pytest.mark.parametrize(
    "change",
    [
        {"checked": 8},
        {"accelerators": []},
        {"accelerators": [_USED["accelerators"][0]] * 2},  # type: ignore[index]
        {"dropped": [{"name": "process-3", "layer": "conv1", "reason": "it lied"}]},
        {"dropped": [{"name": "process-1", "layer": "conv1", "reason": "it lied"}] * 2},
        {"bytes_sent": -1},
        {"seconds_outside": -0.5},
    ],
)
def test_an_account_that_contradicts_itself_is_no_account(change: Fields) -> None:
    assert OffloadRecord.from_fields(_USED)
    with pytest.raises(DocumentError):
        OffloadRecord.from_fields({**_USED, **change})


_SERVED = {"queries": 5, "rows": 9, "sealed": 5, "refused": 2}


def test_a_count_of_queries_where_nothing_is_served(finished: Finished) -> None:
    def change(fields: Fields) -> None:
        fields["predicate"]["serving"] = _SERVED

    with pytest.raises(ProofError, match="count of queries is not the contract's"):
        finished.verify(finished.restated(change))


@pytest.mark.parametrize(
    ("job", "counted", "problem"),
    [
        ({}, {}, None),
        ({}, {"sealed": 0}, None),
        ({}, None, "count of queries is not the contract's"),
        ({"sealed_only": True}, {}, None),
        ({"sealed_only": True}, {"sealed": 4}, "answered in plain"),
    ],
)
def test_what_a_receipt_says_of_queries_fits_the_job(
    job: Fields, counted: Fields | None, problem: str | None
) -> None:
    fields = {"model": "net", "outputs": {"form": "label"}, **job}
    contract: Any = SimpleNamespace(job=ServeJob.from_fields({"type": "serve", **fields}))
    record = None if counted is None else ServingRecord.from_fields({**_SERVED, **counted})
    receipt: Any = SimpleNamespace(serving=record)
    if problem is None:
        _check_serving(receipt, contract)
    else:
        with pytest.raises(ProofError, match=problem):
            _check_serving(receipt, contract)


@pytest.mark.parametrize(
    "change", [{"sealed": 6}, {"rows": 4}, {"queries": -1}, {"refused": 0.5}, {"more": 1}], ids=str
)
def test_a_count_that_contradicts_itself_is_no_count(change: Fields) -> None:
    with pytest.raises(DocumentError):
        ServingRecord.from_fields({**_SERVED, **change})


def test_outputs_that_are_not_the_settled_ones(make_world: Any, tmp_path: Path) -> None:
    """The log's account of what left must be the receipt's."""
    world = make_world(tmp_path)
    enclave = world.enclave(world.agree())
    settle = enclave.settle

    def otherwise(run: str, **changes: Any) -> Any:
        changes["outputs"] = [{**changes["outputs"][0], "content": OTHER}]
        return settle(run, **changes)

    enclave.settle = otherwise
    bundle = enclave.finish(enclave.release())
    with pytest.raises(ProofError, match="settlement is of another set of outputs"):
        verify_receipt(
            bundle, broker_digest=world.broker.identity.digest, verifiers=world.broker.verifiers
        )
    world.close()


# ------------------------------------------------------------------ fuzzing


# The address and the certificate are no part of a broker's identity: its keys are.
_NOT_BOUND = {("broker", "url"), ("broker", "tls_certificate")}


def _same_octets(path: tuple[Any, ...], value: Any, place: Any) -> bool:
    """Whether base64 was only written in another way that DSSE allows (padding, alphabet)."""
    if path[-1] not in {"payload", "sig"}:
        return False
    try:
        standard = value.replace("-", "+").replace("_", "/")
        return base64.b64decode(standard) == base64.b64decode(place)
    except (AttributeError, TypeError, ValueError):
        return False


def _mutation(draw: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, str) and value:
        at = draw(st.integers(0, len(value) - 1))
        letter = draw(st.sampled_from("Aa0/+=-. \n\x00\u00e9\ud800Zz9f"))
        return draw(
            st.sampled_from(
                [value[:at] + letter + value[at + 1 :], value[:at], value + letter, value[at:]]
            )
        )
    if isinstance(value, int):
        return value + draw(st.sampled_from([-1, 1, 2**40, -(2**70)]))
    return draw(st.sampled_from([None, "", 0, [], {}]))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_mutation_of_a_value_passes(finished: Finished, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(leaves(finished.bundle)))
    place: Any = finished.bundle
    for step in path:
        place = place[step]
    value = _mutation(data.draw, place)
    text = json.dumps(replaced(finished.bundle, path, value)).encode()
    if value == place or path in _NOT_BOUND or _same_octets(path, value, place):
        return
    with pytest.raises(CenacleError):
        verify_receipt(
            read_bundle(text),
            broker_digest=finished.digest,
            verifiers=VerifierSet.of_development(SimulatedVerifier()),
        )


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_mutation_of_a_signed_document_passes(finished: Finished, data: st.DataObject) -> None:
    """Inside the payloads, where the envelope's form stays good."""
    where = data.draw(
        st.sampled_from([("statement",), ("contract",), ("parties", 0), ("assets", "hospital-a")])
    )
    envelope: Any = finished.bundle
    for step in where:
        envelope = envelope[step]
    fields = parse_json(unb64(envelope["payload"]))
    path = data.draw(st.sampled_from(leaves(fields)))
    place: Any = fields
    for step in path:
        place = place[step]
    value = _mutation(data.draw, place)
    if value == place:
        return
    payload = json.dumps(replaced(fields, path, value), separators=(",", ":"), sort_keys=True)
    altered = replaced(finished.bundle, (*where, "payload"), b64(payload.encode()))
    with pytest.raises(CenacleError):
        finished.verify(altered)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_mutation_of_the_bytes_passes(finished: Finished, data: st.DataObject) -> None:
    """Flipped, cut, doubled or deleted: the file is refused, and never by an accident."""
    raw = bytearray(canonical_json(finished.bundle))
    at = data.draw(st.integers(0, len(raw) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "delete", "double"]))
    if how == "flip":
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del raw[at:]
    elif how == "delete":
        del raw[at : at + data.draw(st.integers(1, 200))]
    else:
        raw[at:at] = raw[at : at + data.draw(st.integers(1, 200))]
    try:
        bundle = read_bundle(bytes(raw))
    except CenacleError:
        return
    fields = bundle.to_fields()
    for _, name in _NOT_BOUND:
        fields["broker"][name] = finished.bundle["broker"].get(name)
    if fields == finished.bundle:
        return
    with pytest.raises(CenacleError):
        verify_receipt(
            bundle,
            broker_digest=finished.digest,
            verifiers=VerifierSet.of_development(SimulatedVerifier()),
        )


@pytest.mark.parametrize(
    "raw", [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"a":1,"a":2}', b"NaN", b"1e999"]
)
def test_files_that_are_no_receipts(raw: bytes) -> None:
    with pytest.raises(DocumentError):
        read_bundle(raw)


# ------------------------------------------------------------------ contracts that came along


def test_open_contract_believes_nobody(finished: Finished) -> None:
    """The same checks protect a party that reviews what a broker sends it."""
    bundle = finished.bundle
    parts = (bundle["contract"], tuple(bundle["parties"]), bundle["assets"])
    opened = open_contract(finished.enclave.contract, *parts)
    assert opened.signed == {"hospital-a", "hospital-b"}
    with pytest.raises(ProofError, match="another contract"):
        open_contract(OTHER, *parts)
    second = (finished.second["contract"], *parts[1:])
    with pytest.raises(ProofError, match="another contract"):
        open_contract(finished.enclave.contract, *second)
