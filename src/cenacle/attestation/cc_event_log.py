"""The CC event log of a trust domain, replayed to its RTMRs and judged event by event.

UEFI 2.10, section 38.4.1: measurement register 1 is RTMR 0 (firmware configuration), 2 is
RTMR 1 (what the firmware loads: boot loader, kernel, its command line), 3 is RTMR 2 (what the boot
loader loads), 4 is RTMR 3 (the application's own). Register 0, MRTD, is not extended. The log
is that of :mod:`cenacle.attestation.event_log`, with SHA-384.

An RTMR of exact value fixes order and number of all events. :class:`EventRules` fix *which*
events there may be, for registers that differ from boot to boot. They are weaker: order and
repetition are free, so a rule must name only events that are harmless wherever they come.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from cenacle.attestation.boot_claims import boot_properties
from cenacle.attestation.event_log import CC_REGISTERS, Event, EventLog, parse_event_log
from cenacle.documents.base import Frozen
from cenacle.documents.clauses import Clause, check
from cenacle.errors import EvidenceError

__all__ = ["EventRules", "compact_log", "events_of", "judge_events", "replay_rtmrs"]

_ALGORITHM: Final = "sha384"
_SHOWN: Final = 200
_GRUB_LABELS: Final = (b"grub_cmd: ", b"kernel_cmdline: ", b"module_cmdline: ")

EventName = Annotated[str, StringConstraints(pattern=r"^(?:EV_[A-Z0-9_]+|0x[0-9a-f]{8})$")]
Sha384 = Annotated[str, StringConstraints(pattern=r"^sha384:[0-9a-f]{96}$")]


class EventRules(Frozen):
    """Which events may have been extended into some RTMRs.

    Attributes:
        registers: the RTMRs (0 to 3) that are judged by events instead of by value.
        allowed: event type to the digests that an event of this type may have. Every event in
            the registers must be allowed; a type that is not named allows none. Digests decide:
            the type is a label beside them, which no register proves.
        required: digests that must be there (of any type), e.g. of the kernel.
    """

    registers: Annotated[tuple[Literal[0, 1, 2, 3], ...], Field(min_length=1)]
    allowed: Annotated[
        dict[EventName, Annotated[tuple[Sha384, ...], Field(min_length=1)]], Field(min_length=1)
    ]
    required: tuple[Sha384, ...] = ()

    @model_validator(mode="after")
    def _the_required_are_allowed(self) -> Self:
        allowed = {digest for digests in self.allowed.values() for digest in digests}
        if missing := set(self.required) - allowed:
            raise ValueError(f"required but not allowed: {', '.join(sorted(missing))[:200]}")
        return self


def compact_log(raw: bytes) -> bytes:
    """A log without the padding of the table that holds it.

    Raises:
        EvidenceError: it is not exactly understood.
    """
    return parse_event_log(raw, CC_REGISTERS).to_bytes()


def replay_rtmrs(log: EventLog) -> tuple[bytes, bytes, bytes, bytes]:
    """The four RTMRs after all events of a CC event log; zeros where none was extended.

    Raises:
        EvidenceError: the log has no SHA-384 digests.
    """
    after = log.replay(_ALGORITHM)
    zero, one, two, three = (after.get(register, bytes(48)) for register in CC_REGISTERS)
    return zero, one, two, three


def events_of(raw: bytes, rtmrs: tuple[bytes, bytes, bytes, bytes]) -> dict[str, Any]:
    """What a log and each of its events say, once it is shown to be the log of the quote.

    Args:
        rtmrs: the quote's RTMR 0 to 3.

    Returns:
        ``events``, and ``secure_boot`` if an event proves it. For each event that
        was extended: ``register`` (0 to 3) and ``digest``, which are genuine; ``type``, a label
        that the host could have changed; ``says``, only where the digest is the hash of that.

    Raises:
        EvidenceError: the log is not exactly understood, or does not replay to the RTMRs.
    """
    log = parse_event_log(raw, CC_REGISTERS)
    log.check_data()
    for number, (found, expected) in enumerate(zip(replay_rtmrs(log), rtmrs, strict=True)):
        if found != expected:
            raise EvidenceError(
                f"the event log is not that of the quote: RTMR {number} differs",
                found=found.hex()[:24],
                expected=expected.hex()[:24],
                remedy="send the log and a quote that were taken together",
            )
    shown: dict[str, Any] = {"events": [_claim(event) for event in log.events if event.extends]}
    state = boot_properties(log, _ALGORITHM).get("secure_boot")
    return shown if state is None else {**shown, "secure_boot": state}


def _claim(event: Event) -> dict[str, Any]:
    claim = {
        "register": event.register - CC_REGISTERS.start,
        "type": event.type_name,
        "digest": f"{_ALGORITHM}:{event.digests[_ALGORITHM].hex()}",
    }
    said = _said(event)
    return claim if said is None else {**claim, "says": said}


def _said(event: Event) -> str | None:
    """What was hashed, where the log holds it; GRUB logs a label before what it hashed."""
    for label in (b"", *_GRUB_LABELS):
        content = event.data.removeprefix(label)
        if label:
            content = content.rstrip(b"\0")
        if event.data.startswith(label) and event.hashes(content):
            return _text(content)
    return None


def _text(content: bytes) -> str:
    """Printable ASCII as it is, anything else in hexadecimal; shortened."""
    if content.isascii() and (text := content.decode("ascii")).isprintable():
        return text[:_SHOWN]
    return content[: _SHOWN // 2].hex()


def judge_events(events: Any, rules: EventRules) -> list[Clause]:
    """One clause that every event is allowed, and one that the required are there.

    Args:
        events: the ``events`` that :func:`events_of` returned; ``None`` fails.
    """
    registers = " ".join(f"RTMR {register}" for register in rules.registers)
    if not isinstance(events, list):
        return [
            check("contract", "tdx events", False, "no event log", f"the events of {registers}",
                  "send the event log with the quote")
        ]  # fmt: skip
    judged = [event for event in events if event["register"] in rules.registers]
    unknown = [
        f"RTMR {event['register']} {event['type']} {event['digest'][7:19]}"
        for event in judged
        if event["digest"] not in rules.allowed.get(event["type"], ())
    ]
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    there = {event["digest"] for event in judged}
    missing = [digest[7:19] for digest in rules.required if digest not in there]
    remedy = "restore what was measured, or allow it in a new contract"
    return [
        check(
            "contract",
            "tdx events",
            bool(judged) and not unknown,
            "; ".join(unknown[:5]) + more or f"{len(judged)} events",
            f"allowed events in {registers}",
            remedy,
        ),
        check(
            "contract",
            "tdx required events",
            not missing,
            "missing " + " ".join(missing) if missing else f"{len(rules.required)} there",
            f"{len(rules.required)} digests",
            remedy,
        ),
    ]
