"""Signed heads in the C2SP formats, and every way to forge one."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.broker import merkle
from cenacle.broker.log import (
    LogEntryProof,
    TransparencyLog,
    TreeHead,
    key_id,
    open_note,
    parse_and_verify_head,
    sign_head,
    sign_note,
    verify_consistency,
)
from cenacle.broker.store import Store
from cenacle.crypto.memory import SecretBytes
from cenacle.crypto.signing import SigningKey, VerifyKey
from cenacle.errors import InputError, ProofError, SignatureError

ORIGIN = "hospitals.example/broker"
KEY = SigningKey.from_seed(SecretBytes(bytes(range(32))))
OTHER = SigningKey.from_seed(SecretBytes(bytes(32)))
HEAD = TreeHead(ORIGIN, 7, merkle.leaf_hash(b"root"), "2027-01-31T12:00:00Z")
SIGNED = sign_head(HEAD, KEY)

# https://pkg.go.dev/golang.org/x/mod/sumdb/note
GO_SEED = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
GO_TEXT = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
)
GO_NOTE = (
    f"{GO_TEXT}\n\u2014 PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2p"
    "ZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
# https://c2sp.org/signed-note
C2SP_KEY = base64.b64decode("AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k")[1:]
C2SP_NOTE = (
    "This is an example message.\n\n\u2014 example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXpp"
    "zi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
)


def test_the_note_of_the_go_implementation() -> None:
    key = SigningKey.from_seed(SecretBytes(GO_SEED))
    assert key_id("PeterNeumann", key.verify_key).hex() == "c74f20a3"
    assert sign_note(GO_TEXT, "PeterNeumann", key) == GO_NOTE
    assert open_note(GO_NOTE, "PeterNeumann", key.verify_key) == GO_TEXT


def test_the_note_of_the_specification() -> None:
    key = VerifyKey(C2SP_KEY)
    assert key_id("example.com/foo", key).hex() == "530d903a"
    assert open_note(C2SP_NOTE, "example.com/foo", key) == "This is an example message.\n"


def test_a_head_returns_as_it_was_signed() -> None:
    assert parse_and_verify_head(SIGNED, ORIGIN, KEY.verify_key) == HEAD
    lines = SIGNED.split("\n")
    assert lines[:5] == [
        ORIGIN,
        "7",
        base64.b64encode(HEAD.root).decode(),
        f"timestamp {HEAD.timestamp}",
        "",
    ]


def test_signatures_of_witnesses_are_ignored() -> None:
    witness = sign_note(HEAD.note_text(), "witness.example/w1", OTHER).split("\n")[-2]
    assert parse_and_verify_head(f"{SIGNED}{witness}\n", ORIGIN, KEY.verify_key) == HEAD


ALTERED = {
    "another size": SIGNED.replace("\n7\n", "\n8\n"),
    "another time": SIGNED.replace("12:00:00", "12:00:01"),
    "another origin": SIGNED.replace(f"{ORIGIN}\n", f"{ORIGIN}2\n", 1),
    "no signature": SIGNED[: SIGNED.index("\u2014")],
    "no blank line": SIGNED.replace("\n\n", "\n"),
    "truncated": SIGNED[:-5],
    "no final newline": SIGNED[:-1],
    "carriage returns": SIGNED.replace("\n", "\r\n"),
    "a tab": SIGNED.replace("\n7\n", "\n7\t\n"),
    "a lone surrogate": SIGNED.replace("\n7\n", "\n7\ud800\n"),
    "empty": "",
    "newlines": "\n\n\n",
    "huge": SIGNED + "x" * 100_000,
    "a hyphen for the dash": SIGNED.replace("\u2014", "-"),
    "signed by another key": sign_note(HEAD.note_text(), ORIGIN, OTHER),
    "another's signature under the right key id": (
        HEAD.note_text()
        + f"\n\u2014 {ORIGIN} "
        + base64.b64encode(
            key_id(ORIGIN, KEY.verify_key) + OTHER.sign(HEAD.note_text().encode())
        ).decode()
        + "\n"
    ),
    "a good and a wrong signature": SIGNED
    + f"\u2014 {ORIGIN} "
    + base64.b64encode(key_id(ORIGIN, KEY.verify_key) + bytes(64)).decode()
    + "\n",
    "too many signatures": SIGNED + (SIGNED.split("\n")[-2] + "\n") * 16,
    "short signature": HEAD.note_text() + f"\n\u2014 {ORIGIN} AAAA\n",
    "not base64": HEAD.note_text() + f"\n\u2014 {ORIGIN} ????\n",
}


@pytest.mark.parametrize("note", ALTERED.values(), ids=ALTERED.keys())
def test_altered_heads_are_refused(note: str) -> None:
    with pytest.raises((ProofError, SignatureError)):
        parse_and_verify_head(note, ORIGIN, KEY.verify_key)


ROOT = base64.b64encode(HEAD.root).decode()
EMPTY = base64.b64encode(merkle.EMPTY_ROOT).decode()


@pytest.mark.parametrize(
    "text",
    [
        f"{ORIGIN}\n7\n{ROOT}\n",
        f"{ORIGIN}\n7\n{ROOT}\ntimestamp 2027-01-31T12:00:00Z\nmore\n",
        f"{ORIGIN}\n7\n{ROOT}\ntime 2027-01-31T12:00:00Z\n",
        f"{ORIGIN}\n7\n{ROOT}\ntimestamp yesterday\n",
        f"{ORIGIN}\n7\n{ROOT}\ntimestamp 2027-02-31T12:00:00Z\n",
        f"{ORIGIN}\n07\n{ROOT}\ntimestamp 2027-01-31T12:00:00Z\n",
        f"{ORIGIN}\n-7\n{ROOT}\ntimestamp 2027-01-31T12:00:00Z\n",
        f"{ORIGIN}\n+7\n{ROOT}\ntimestamp 2027-01-31T12:00:00Z\n",
        f"{ORIGIN}\n\u0667\n{ROOT}\ntimestamp 2027-01-31T12:00:00Z\n",
        f"{ORIGIN}\n7 \n{ROOT}\ntimestamp 2027-01-31T12:00:00Z\n",
        f"{ORIGIN}\n{2**63}\n{ROOT}\ntimestamp 2027-01-31T12:00:00Z\n",
        f"{ORIGIN}\n{'9' * 5000}\n{ROOT}\ntimestamp 2027-01-31T12:00:00Z\n",
        f"{ORIGIN}\n7\n{ROOT[:-4]}\ntimestamp 2027-01-31T12:00:00Z\n",
        f"{ORIGIN}\n7\n{ROOT.rstrip('=')}\ntimestamp 2027-01-31T12:00:00Z\n",
        f"{ORIGIN}\n7\n\ntimestamp 2027-01-31T12:00:00Z\n",
        f"{ORIGIN}\n0\n{ROOT}\ntimestamp 2027-01-31T12:00:00Z\n",
        f"other.example/log\n7\n{ROOT}\ntimestamp 2027-01-31T12:00:00Z\n",
        f"\n{ORIGIN}\n7\n{ROOT}\ntimestamp 2027-01-31T12:00:00Z\n",
    ],
)
def test_signed_nonsense_is_refused(text: str) -> None:
    """Even the right key cannot make a head of something else."""
    with pytest.raises(ProofError):
        parse_and_verify_head(sign_note(text, ORIGIN, KEY), ORIGIN, KEY.verify_key)


def test_the_empty_log_has_a_head() -> None:
    head = TreeHead(ORIGIN, 0, merkle.EMPTY_ROOT, HEAD.timestamp)
    assert parse_and_verify_head(sign_head(head, KEY), ORIGIN, KEY.verify_key) == head


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SIGNED) - 1), st.characters())
def test_no_character_can_be_changed(at: int, character: str) -> None:
    altered = SIGNED[:at] + character + SIGNED[at + 1 :]
    if altered != SIGNED:
        with pytest.raises((ProofError, SignatureError)):
            parse_and_verify_head(altered, ORIGIN, KEY.verify_key)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_is_refused_in_words(text: str) -> None:
    with pytest.raises((ProofError, SignatureError)):
        parse_and_verify_head(text, ORIGIN, KEY.verify_key)


@pytest.mark.parametrize("origin", ["", "a b", "a+b", "a\nb", "a\u00a0b", "a\x00", "x" * 256])
def test_origins_that_c2sp_forbids(origin: str) -> None:
    with pytest.raises(InputError):
        TransparencyLog(origin, KEY)
    with pytest.raises(InputError):
        sign_head(TreeHead(origin, 0, merkle.EMPTY_ROOT, HEAD.timestamp), KEY)


PROOF = LogEntryProof(3, 7, (bytes(32), bytes(32), bytes(32)))


def test_an_entry_proof_crosses_json() -> None:
    assert LogEntryProof.from_dict(json.loads(json.dumps(PROOF.to_dict()))) == PROOF


@pytest.mark.parametrize(
    "change",
    [
        {"index": 7},
        {"index": -1},
        {"index": True},
        {"index": 3.0},
        {"index": "3"},
        {"index": None},
        {"size": 0},
        {"size": "7"},
        {"path": "AAAA"},
        {"path": None},
        {"path": ["AAAA"]},
        {"path": [None]},
        {"path": ["!" * 44]},
        {"path": [PROOF.to_dict()["path"][0]] * 64},
        {"more": 1},
    ],
)
def test_malformed_entry_proofs_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProofError):
        LogEntryProof.from_dict({**PROOF.to_dict(), **change})


@pytest.mark.parametrize("fields", [None, [], "x", 1, {}])
def test_what_is_no_entry_proof_is_refused(fields: Any) -> None:
    with pytest.raises(ProofError):
        LogEntryProof.from_dict(fields)


def test_a_log_over_a_store(sqlite_store: Store) -> None:
    """Heads signed as the log grows prove each entry and each other."""
    log = TransparencyLog(ORIGIN, KEY, lambda: datetime(2027, 1, 31, 12, tzinfo=UTC))
    bodies = [b'{"kind":"note","n":%d}' % n for n in range(20)]
    heads = []
    for body in bodies:
        index, text, proof = sqlite_store.run(
            lambda tx, body=body: (  # type: ignore[misc]
                index := tx.append_entry("note", body),
                log.signed_head(tx),
                log.entry_proof(tx, index),
            )
        )
        head = parse_and_verify_head(text, ORIGIN, KEY.verify_key)
        assert head.size == index + 1
        assert head.timestamp == "2027-01-31T12:00:00Z"
        proof.verify(body, head)
        heads.append(head)
    with sqlite_store.read() as tx:
        assert parse_and_verify_head(log.signed_head(tx), ORIGIN, KEY.verify_key) == heads[-1]
        for earlier in heads:
            path = tx.consistency_path(earlier.size)
            verify_consistency(earlier, heads[-1], path)
            for index in range(earlier.size):
                log.entry_proof(tx, index, earlier.size).verify(bodies[index], earlier)
        with pytest.raises(ProofError):
            log.entry_proof(tx, 3).verify(bodies[4], heads[-1])
        with pytest.raises(ProofError, match="another tree head"):
            log.entry_proof(tx, 3, 10).verify(bodies[3], heads[-1])
        with pytest.raises(InputError):
            log.entry_proof(tx, 3, 21)


def test_heads_of_two_logs_are_never_consistent() -> None:
    with pytest.raises(ProofError, match="different logs"):
        verify_consistency(HEAD, TreeHead("other.example", 7, HEAD.root, HEAD.timestamp), ())


def test_a_shrinking_log_is_refused() -> None:
    """A broker restored from an old copy cannot show a head to who saw a newer one."""
    old = TreeHead(ORIGIN, 5, merkle.leaf_hash(b"old"), HEAD.timestamp)
    with pytest.raises(ProofError, match="shorter"):
        verify_consistency(HEAD, old, ())
