"""What jobs cost a data set's records in all, composed from the ledger's events.

Composition takes from a tenth of a second to seconds: too long for the store's one writer. So it
is done beside it and remembered; a decision that needs a figure which nobody worked out yet is
taken back (:class:`UnaccountedError`), the figure is worked out, and the decision made again
from the facts as they stand then. A figure is a pure function of events and delta, so that a
remembered one is never out of date.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias, TypeVar

from cenacle.accounting import epsilon
from cenacle.broker.messages import BudgetView
from cenacle.documents.asset import Asset
from cenacle.documents.base import canonical_json, parse_json
from cenacle.documents.contract import Contract
from cenacle.documents.privacy import PrivacyEvent, PrivacyLoss
from cenacle.documents.terms import PrivacyBudget
from cenacle.errors import DocumentError, RefusedError, UnavailableError

__all__ = [
    "NO_EVENT",
    "Losses",
    "Question",
    "UnaccountedError",
    "event_text",
    "events_charged",
    "events_of_text",
    "require_covered",
    "until_accounted",
]

T = TypeVar("T")

NO_EVENT: Final = "{}"
"""What a reservation says that promises no bound."""

_REMEMBERED: Final = 4096
_TRIES: Final = 20

Question: TypeAlias = tuple[tuple[tuple[float, float, int], ...], float]
"""Noise multiplier, sampling probability and steps of each kind of event, sorted; and delta."""


class UnaccountedError(UnavailableError):
    """A decision needs figures that were not worked out yet."""

    def __init__(self, questions: tuple[Question, ...]) -> None:
        super().__init__(
            "the broker has not composed the privacy losses yet",
            remedy="ask again: other jobs were charged meanwhile",
        )
        self.questions = questions


def event_text(events: Iterable[PrivacyEvent]) -> str:
    """A reservation's events as canonical JSON."""
    listed = [event.to_fields() for event in events]
    return canonical_json(listed).decode() if listed else NO_EVENT


def events_of_text(text: str) -> tuple[PrivacyEvent, ...]:
    """The inverse of :func:`event_text`; empty where no bound was promised.

    Raises:
        DocumentError: the store was altered.
    """
    listed = parse_json(text)
    if listed == {}:
        return ()
    if not isinstance(listed, list) or not listed:
        raise DocumentError("a reservation's privacy events are damaged", found=text[:80])
    return tuple(PrivacyEvent.from_fields(fields) for fields in listed)


class Losses:
    """Figures worked out so far; shared by all threads."""

    def __init__(self) -> None:
        self._known: OrderedDict[Question, float] = OrderedDict()
        self._lock = threading.Lock()

    def figures(self, questions: Iterable[Question]) -> dict[Question, float]:
        """The epsilon that each asks for.

        Raises:
            UnaccountedError: naming all that have to be worked out first.
        """
        asked = set(questions)
        with self._lock:
            found = {q: self._known.get(q, _at_once(q)) for q in asked}
        missing = tuple(sorted(q for q, figure in found.items() if figure is None))
        if missing:
            raise UnaccountedError(missing)
        return {q: figure for q, figure in found.items() if figure is not None}

    def compose(
        self,
        contract: Contract,
        assets: Mapping[str, Asset],
        before: Callable[[str], Iterable[PrivacyEvent] | None],
    ) -> tuple[float | None, dict[str, PrivacyLoss]]:
        """What a contract's plan amounts to, and what that adds to each asset with a budget.

        Args:
            before: the events of all other jobs on the data of an asset, by its digest; None if
                one of them promised no bound.

        Returns:
            The plan's epsilon at its delta (None without a plan), and losses by alias.

        Raises:
            UnaccountedError: figures have to be worked out first.
        """
        plan, job = contract.privacy, contract.privacy_events
        if plan is None:
            return None, {}
        promised = _question(job, plan.delta)
        asked: dict[str, tuple[Question, Question] | None] = {}
        for alias, asset in assets.items():
            budget = asset.terms.privacy
            if not isinstance(budget, PrivacyBudget) or not contract.protects(alias):
                continue
            earlier = before(asset.digest)
            asked[alias] = None
            if earlier is not None:
                events = list(earlier)
                asked[alias] = (
                    _question(events, budget.delta),
                    _question([*events, *job], budget.delta),
                )
        figures = self.figures([promised, *(q for pair in asked.values() if pair for q in pair)])
        return figures[promised], {
            alias: PrivacyLoss(figures[pair[0]], figures[pair[1]])
            if pair
            else PrivacyLoss(math.inf, math.inf)
            for alias, pair in asked.items()
        }

    def budget(self, asset: Asset, charged: Sequence[tuple[str, bool, int]]) -> BudgetView:
        """An asset's budget and what is spent of it.

        Raises:
            UnaccountedError: figures have to be worked out first.
        """
        budget, earlier = asset.terms.privacy, events_charged(charged)
        unbounded = sum(runs for text, _, runs in charged if not events_of_text(text))
        spent = None
        if isinstance(budget, PrivacyBudget) and earlier is not None:
            question = _question(earlier, budget.delta)
            spent = self.figures([question])[question]
        return BudgetView(
            asset=asset.digest,
            name=asset.name,
            epsilon=budget.epsilon if isinstance(budget, PrivacyBudget) else None,
            delta=budget.delta if isinstance(budget, PrivacyBudget) else None,
            spent=None if spent is None or math.isinf(spent) else spent,
            jobs=sum(runs for _, _, runs in charged) - unbounded,
            unbounded=unbounded,
            events=events_charged([one for one in charged if events_of_text(one[0])]) or (),
        )

    def account(self, questions: Iterable[Question]) -> None:
        """Work figures out, however long that takes, and remember them.

        Raises:
            InputError: ``dp-accounting`` is not installed.
        """
        for question in questions:
            with self._lock:
                if question in self._known:
                    continue
            found = _work_out(question)
            with self._lock:
                self._known[question] = found
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)


def _at_once(question: Question) -> float | None:
    """Without events nothing is spent; Gaussian noise keeps no epsilon at a delta of 0."""
    kinds, delta = question
    if not kinds:
        return 0.0
    return None if delta else math.inf


def _question(events: Iterable[PrivacyEvent], delta: float) -> Question:
    merged: dict[tuple[float, float], int] = {}
    for event in events:
        if event.steps:
            kind = event.noise_multiplier, event.sampling_probability
            merged[kind] = merged.get(kind, 0) + event.steps
    return tuple(sorted((*kind, steps) for kind, steps in merged.items())), float(delta)


def _work_out(question: Question) -> float:
    kinds, delta = question
    # Steps that are too many for one event: their cost is beyond any budget anyway.
    if any(steps > 10**9 for _, _, steps in kinds):
        return math.inf
    events = [
        PrivacyEvent(noise_multiplier=noise, sampling_probability=probability, steps=steps)
        for noise, probability, steps in kinds
    ]
    return epsilon(events, delta)


def events_charged(
    charged: Iterable[tuple[str, bool, int]],
) -> tuple[PrivacyEvent, ...] | None:
    """All events of :meth:`~cenacle.broker.store.ReadTransaction.charged_events`.

    None if one job among them promised no bound.
    """
    found = []
    for text, bounded, runs in charged:
        events = events_of_text(text) if bounded else ()
        if not events:
            return None
        found += [event.model_copy(update={"steps": event.steps * runs}) for event in events]
    return tuple(found)


def require_covered(reserved: str, spent: tuple[PrivacyEvent, ...]) -> None:
    """Raises unless what a run says it spent is what was reserved for it, or less of the same.

    Raises:
        RefusedError: it spent more, something else, or says nothing of what it spent.
    """
    planned = events_of_text(reserved)
    if not planned:
        return
    if len(planned) != len(spent) or not all(
        plan.covers(event) for plan, event in zip(planned, spent, strict=True)
    ):
        raise RefusedError(
            "a run reports another privacy loss than it reserved",
            found=event_text(spent),
            expected=f"at most {reserved}",
            remedy="the reservation stays charged in full; the run's output must not be used",
        )


def until_accounted(losses: Losses, decide: Callable[[], T]) -> T:
    """Decide, working out between tries what a decision lacked.

    Raises:
        UnaccountedError: other jobs were charged meanwhile, again and again.
    """
    for _ in range(_TRIES - 1):
        try:
            return decide()
        except UnaccountedError as missing:
            losses.account(missing.questions)
    return decide()
