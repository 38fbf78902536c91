"""What a release hands out, what it charges, and who may speak for a run afterwards."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from cenacle.broker.entries import ReleaseEntry, SettlementEntry
from cenacle.broker.messages import release_context
from cenacle.broker.receipts import verify_inclusion
from cenacle.broker.release import ReleaseDesk
from cenacle.crypto import HpkePrivateKey, SigningKey
from cenacle.documents.base import unb64
from cenacle.documents.dsse import Envelope
from cenacle.errors import (
    CenacleError,
    ConflictError,
    DocumentError,
    InputError,
    RefusedError,
    SealError,
    SignatureError,
)

Refused = Callable[[Callable[[], object]], CenacleError]


def test_the_keys_are_those_that_the_owners_deposited(any_world: Any) -> None:
    world = any_world
    enclave = world.enclave(world.agree())
    keys = enclave.open(enclave.release())
    assert set(keys) == {"hospital-a", "hospital-b", "job"}
    for owner in ("hospital-a", "hospital-b"):
        assert keys[owner] == world.asset_keys[world.assets[f"{owner}-records"].digest]
    assert len(keys["job"]) == 32


def test_the_log_entry_that_comes_along_speaks_of_this_release(world: Any) -> None:
    digest = world.agree()
    enclave = world.enclave(digest)
    answer = enclave.release()
    body, head = verify_inclusion(answer.log, world.broker.identity)
    entry = ReleaseEntry.from_canonical(body)
    assert entry.contract == digest
    assert entry.run == answer.run
    assert entry.resumed == answer.resumed == 0
    assert entry.evidence == enclave.evidence.digest
    assert entry.evidence_kind == entry.protection == "simulated"
    assert entry.enclave_key == enclave.signing.verify_key.keyid
    assert entry.uses == {asset.digest: 1 for asset in world.assets.values()}
    assert entry.time == answer.started
    with world.store.read() as tx:
        assert head.size == tx.log_size() == answer.log.index + 1


def test_the_keys_open_with_the_enclaves_key_and_context_alone(world: Any) -> None:
    enclave = world.enclave(world.agree())
    answer = enclave.release()
    sealed, nonce = unb64(answer.sealed_keys), enclave.nonce
    right = release_context(enclave.contract, answer.run, nonce)
    with pytest.raises(SealError):
        HpkePrivateKey.generate().open(sealed, *right)
    with pytest.raises(SealError):
        world.broker.keys.hpke_key.open(sealed, *right)
    for wrong in (
        release_context("sha256:" + "0" * 64, answer.run, nonce),
        release_context(enclave.contract, "another", nonce),
        release_context(enclave.contract, answer.run, nonce[::-1]),
        right[:-1],
        (),
    ):
        with pytest.raises(SealError):
            enclave.hpke.open(sealed, *wrong)
    flipped = bytearray(sealed)
    flipped[-1] ^= 1
    with pytest.raises(SealError):
        enclave.hpke.open(bytes(flipped), *right)
    enclave.hpke.open(sealed, *right)


def test_the_answer_holds_no_key_in_the_clear(world: Any) -> None:
    enclave = world.enclave(world.agree())
    answer = enclave.release()
    shown = str(answer.to_fields()).encode() + unb64(answer.log.entry) + unb64(answer.sealed_keys)
    for key in enclave.open(answer).values():
        assert key not in shown
        assert key.hex().encode() not in shown


def _committed(world: Any, enclave: Any) -> tuple[Any, Any]:
    asked = world.desk.appraise(enclave.request())
    return asked, world.broker.write(lambda tx: world.desk.commit(tx, asked))


def test_releases_sealed_together_go_to_their_own_enclaves(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they share is unwrapped once and wiped; who cannot be served is refused alone."""
    opened = []
    really = HpkePrivateKey.open

    def open_and_keep(key: HpkePrivateKey, sealed: bytes, *context: bytes) -> Any:
        opened.append(really(key, sealed, *context))
        return opened[-1]

    world.agree()
    every = tuple(world.assets.values())
    own = world.deposit(every[0].owner, "own")
    contracts = [
        world.agree(world.contract(*assets, name=f"together-{number}"))
        for number, assets in enumerate([every, every, (own,), every[:1]])
    ]
    enclaves = [world.enclave(digest) for digest in contracts]
    durable = [_committed(world, enclave) for enclave in enclaves]
    rows = durable[2][1].rows[own.owner]
    altered = replace(durable[2][1], rows={own.owner: replace(rows, wrapped_key=b"x" * 1200)})
    durable[2] = (durable[2][0], altered)
    with monkeypatch.context() as patch:
        patch.setattr(HpkePrivateKey, "open", open_and_keep)
        answers = world.desk.seal_all(durable)
    assert isinstance(answers.pop(2), SealError)
    assert len(opened) == len(every)
    for secret in [*opened, *(asked.job_secret for asked, _ in durable)]:
        with pytest.raises(ValueError, match="wiped"):
            secret.view()
    del enclaves[2]
    secrets = set()
    for enclave, answer, assets in zip(enclaves, answers, [every, every, every[:1]], strict=True):
        keys = enclave.open(answer)
        secrets.add(keys.pop("job"))
        assert keys == {asset.owner: world.asset_keys[asset.digest] for asset in assets}
        for other in enclaves:
            if other is not enclave:
                with pytest.raises(SealError):
                    other.open(answer)
    assert len(secrets) == 3


def test_the_secret_of_a_refused_request_is_wiped(
    world: Any, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = world.agree()
    world.enclave(digest).release()
    made: list[Any] = []
    appraise = ReleaseDesk.appraise

    def appraise_and_keep(desk: ReleaseDesk, request: Any) -> Any:
        made.append(appraise(desk, request))
        return made[-1]

    monkeypatch.setattr(ReleaseDesk, "appraise", appraise_and_keep)
    assert isinstance(refused(world.enclave(digest).release), ConflictError)
    with pytest.raises(ValueError, match="wiped"):
        made[0].job_secret.view()


def test_a_contract_has_one_open_run(world: Any, refused: Refused) -> None:
    digest = world.agree()
    world.enclave(digest).release()
    error = refused(world.enclave(digest).release)
    assert isinstance(error, ConflictError)
    assert "one open run of a contract" in str(error)


# ------------------------------------------------------------------ uses


def test_uses_run_out(any_world: Any, make_terms: Callable[..., dict[str, Any]]) -> None:
    world = any_world
    asset = world.deposit("hospital-a", "twice", terms=make_terms(uses=2))
    for number in range(2):
        enclave = world.enclave(world.agree(world.contract(asset, name=f"study-{number}")))
        enclave.release()
        assert world.uses(asset) == number + 1
    before = world.state()
    late = world.agree(world.contract(asset, name="late"))
    with pytest.raises(RefusedError, match="uses"):
        world.enclave(late).release()
    world.restart()
    with pytest.raises(RefusedError, match=r"found use 3, demanded at most 2"):
        world.enclave(late).release()
    assert world.uses(asset) == 2
    assert world.state()[2] == before[2]


def test_settled_and_abandoned_runs_stay_charged(
    world: Any, make_terms: Callable[..., dict[str, Any]]
) -> None:
    asset = world.deposit("hospital-a", "twice", terms=make_terms(uses=2))
    first = world.enclave(world.agree(world.contract(asset, name="first")))
    first.settle(first.release().run)
    digest = world.agree(world.contract(asset, name="second"))
    run = world.enclave(digest).release().run
    world.desk.abandon(world.request_of(world.actors["clinic"], "abandon", run))
    assert world.uses(asset) == 2
    with pytest.raises(RefusedError, match="uses"):
        world.enclave(digest).release()


def test_two_releases_at_once_cannot_both_take_the_last_use(
    any_world: Any, make_terms: Callable[..., dict[str, Any]]
) -> None:
    world = any_world
    asset = world.deposit("hospital-a", "scarce", terms=make_terms(uses=2))
    requests = [
        world.enclave(world.agree(world.contract(asset, name=f"study-{i}"))).request()
        for i in range(6)
    ]
    outcomes = world.race(requests)
    assert outcomes.count("uses") == 4
    assert len({run for run in outcomes if run != "uses"}) == 2
    assert world.uses(asset) == 2
    assert world.kinds().count("release") == 2


# ------------------------------------------------------------------ resuming


def test_resuming_charges_nothing_more_and_returns_the_same_secret(
    any_world: Any, make_terms: Callable[..., dict[str, Any]]
) -> None:
    world = any_world
    asset = world.deposit("hospital-a", "once", terms=make_terms(uses=1))
    digest = world.agree(world.contract(asset))
    first = world.enclave(digest)
    begun = first.release()
    first.checkpoint(begun.run, 1, "one")
    world.restart()
    world.clock.turn(hours=1)
    second = world.enclave(digest)
    resumed = second.release(resume=begun.run)
    assert (resumed.run, resumed.resumed, resumed.started) == (begun.run, 1, begun.started)
    assert resumed.checkpoint_version == 1
    assert resumed.checkpoint_digest is not None
    assert second.open(resumed) == first.open(begun)
    assert world.uses(asset) == 1
    entry = ReleaseEntry.from_canonical(unb64(resumed.log.entry))
    assert (entry.resumed, entry.uses) == (1, {asset.digest: 1})
    assert world.kinds()[-3:] == ["release", "checkpoint", "release"]


def test_resuming_fences_the_old_enclave(world: Any, refused: Refused) -> None:
    digest = world.agree()
    old, new = world.enclave(digest), world.enclave(digest)
    run = old.release().run
    old.checkpoint(run, 1)
    new.release(resume=run)
    for attempt in (lambda: old.checkpoint(run, 2), lambda: old.settle(run)):
        error = refused(attempt)
        assert isinstance(error, SignatureError)
    new.checkpoint(run, 2)
    new.settle(run)


def test_a_resumed_release_is_decided_anew(world: Any, refused: Refused) -> None:
    digest = world.agree()
    run = world.enclave(digest).release().run
    world.veto(digest, "clinic")
    error = refused(lambda: world.enclave(digest).release(resume=run))
    assert isinstance(error, RefusedError)
    assert [clause["name"] for clause in error.clauses] == ["vetoes"]


def test_only_an_open_run_of_this_contract_is_resumed(world: Any, refused: Refused) -> None:
    ours, theirs = world.agree(), world.agree(name="theirs")
    foreign = world.enclave(theirs).release().run
    enclave = world.enclave(ours)
    begun = enclave.release()
    for run in (foreign, "0" * 32, begun.run.upper()):
        error = refused(lambda run=run: world.enclave(ours).release(resume=run))  # type: ignore[misc]
        assert isinstance(error, ConflictError)
        assert "no such run of this contract" in str(error)
    enclave.settle(begun.run)
    error = refused(lambda: world.enclave(ours).release(resume=begun.run))
    assert "a run that is settled" in str(error)
    second = world.enclave(ours).release()
    world.desk.abandon(world.request_of(world.actors["hospital-a"], "abandon", second.run))
    error = refused(lambda: world.enclave(ours).release(resume=second.run))
    assert "a run that is abandoned" in str(error)


def test_the_open_run_of_a_contract(world: Any) -> None:
    digest = world.agree()
    assert world.desk.open_run(digest) is None
    enclave = world.enclave(digest)
    run = enclave.release().run
    assert world.desk.open_run(digest).id == run
    enclave.settle(run)
    assert world.desk.open_run(digest) is None


def test_who_abandons_a_run(world: Any, refused: Refused) -> None:
    world.register("stranger")
    digest = world.agree(
        parties={n: world.actors[n].party.digest for n in ("hospital-a", "hospital-b", "clinic")}
    )
    run = world.enclave(digest).release().run
    error = refused(
        lambda: world.desk.abandon(world.request_of(world.actors["stranger"], "abandon", run))
    )
    assert isinstance(error, RefusedError)
    error = refused(
        lambda: world.desk.abandon(world.request_of(world.actors["clinic"], "abandon", "nothing"))
    )
    assert isinstance(error, InputError)
    request = world.request_of(world.actors["clinic"], "abandon", run)
    world.desk.abandon(request)
    assert world.kinds()[-1] == "abandonment"
    again = world.enclave(digest).release()
    assert again.run != run
    # Replaying the request does not reach the next run, nor does it abandon twice.
    refused(lambda: world.desk.abandon(request))
    assert world.desk.open_run(digest).id == again.run


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_old_checkpoint_never_comes_back(any_world: Any, number: int) -> None:
    world = any_world
    enclave = world.enclave(world.agree())
    run = enclave.release().run
    for step in (1, 3):
        enclave.checkpoint(run, step, f"step {step}")
    before = world.state()
    with pytest.raises(ConflictError, match="not newer"):
        enclave.checkpoint(run, number, "another")
    assert world.state() == before
    enclave.checkpoint(run, 4)
    assert world.kinds().count("checkpoint") == 3


def test_checkpoints_of_an_ended_run(world: Any, refused: Refused) -> None:
    enclave = world.enclave(world.agree())
    run = enclave.release().run
    enclave.settle(run)
    assert isinstance(refused(lambda: enclave.checkpoint(run, 1)), ConflictError)


def test_a_stranger_speaks_for_no_run(world: Any, refused: Refused) -> None:
    enclave = world.enclave(world.agree())
    run = enclave.release().run
    enclave.signing = SigningKey.generate()
    for attempt in (lambda: enclave.checkpoint(run, 1), lambda: enclave.settle(run)):
        assert isinstance(refused(attempt), SignatureError)
    for attempt in (lambda: enclave.checkpoint("none", 1), lambda: enclave.settle("none")):
        assert isinstance(refused(attempt), InputError)


def test_a_signature_for_one_kind_of_statement_does_not_pass_for_another(
    world: Any, refused: Refused
) -> None:
    enclave = world.enclave(world.agree())
    run = enclave.release().run
    signed = Envelope.sign(enclave.settlement(run), enclave.signing)
    relabelled = Envelope(
        signed.payload, "application/vnd.cenacle.checkpoint+json", signed.signatures
    )
    assert isinstance(refused(lambda: world.desk.checkpoint(relabelled)), DocumentError)
    assert isinstance(refused(lambda: world.desk.settle(relabelled)), DocumentError)
    assert isinstance(refused(lambda: world.desk.checkpoint(signed)), DocumentError)


# ------------------------------------------------------------------ settling


def test_settling_twice_says_the_same(any_world: Any) -> None:
    world = any_world
    enclave = world.enclave(world.agree())
    run = enclave.release().run
    first = enclave.settle(run)
    entry = SettlementEntry.from_canonical(unb64(first.entry))
    assert (entry.run, entry.contract) == (run, enclave.contract)
    before = world.state()
    world.restart()
    again = enclave.settle(run)
    assert (again.index, again.entry) == (first.index, first.entry)
    verify_inclusion(again, world.broker.identity)
    assert world.state() == before


def test_another_account_of_a_settled_run_is_refused(world: Any, refused: Refused) -> None:
    enclave = world.enclave(world.agree())
    run = enclave.release().run
    enclave.settle(run)
    other = "sha256:" + "5" * 64
    assert isinstance(refused(lambda: enclave.settle(run, receipt=other)), ConflictError)


def test_a_settlement_of_another_contract(world: Any, refused: Refused) -> None:
    enclave = world.enclave(world.agree())
    run = enclave.release().run
    other = world.agree(name="other")
    error = refused(lambda: enclave.settle(run, contract=other))
    assert isinstance(error, InputError)


def test_an_abandoned_run_is_not_settled(world: Any, refused: Refused) -> None:
    enclave = world.enclave(world.agree())
    run = enclave.release().run
    world.desk.abandon(world.request_of(world.actors["hospital-b"], "abandon", run))
    assert isinstance(refused(lambda: enclave.settle(run)), ConflictError)


def test_a_settlement_frees_the_contract_for_its_next_run(world: Any) -> None:
    digest = world.agree()
    runs = set()
    for _ in range(3):
        enclave = world.enclave(digest)
        answer = enclave.release()
        enclave.settle(answer.run)
        runs.add(answer.run)
    assert len(runs) == 3
    assert all(world.uses(asset) == 3 for asset in world.assets.values())


# ------------------------------------------------------------------ many at once


def test_many_enclaves_at_once(any_world: Any) -> None:
    """Every one gets its own keys, and a proof in one log that all agree on."""
    world = any_world
    digests = [world.agree(name=f"study-{i}") for i in range(9)]

    def run(digest: str) -> tuple[int, bytes, str]:
        enclave = world.enclave(digest)
        answer = enclave.release()
        enclave.checkpoint(answer.run, 1)
        body, _ = verify_inclusion(answer.log, world.broker.identity)
        verify_inclusion(enclave.settle(answer.run), world.broker.identity)
        return answer.log.index, body, enclave.open(answer)["job"].hex()

    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(run, digests))
    assert len({index for index, _, _ in found}) == len({secret for _, _, secret in found}) == 9
    with world.store.read() as tx:
        for index, body, _ in found:
            assert tx.entry(index).body == body
    assert all(world.uses(asset) == 9 for asset in world.assets.values())
