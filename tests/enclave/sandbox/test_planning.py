"""Plans: what is chosen, what is promised, and that a promise is never believed unseen."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cenacle.enclave.sandbox import (
    InnerLayer,
    SandboxPlan,
    View,
    base,
    bubblewrap,
    folders,
    layer,
    layers,
    plan,
    probe,
    register,
    trial,
    verify_active,
)
from cenacle.errors import CenacleError, EnclaveError, InputError, UnavailableError

NAMES = ("bubblewrap", "process", "landlock", "seccomp")


def test_the_layers_are_applied_in_this_order() -> None:
    assert tuple(one.name for one in layers())[:4] == NAMES


def test_a_probe_has_a_row_for_every_layer() -> None:
    rows = probe()
    assert tuple(row.name for row in rows)[:4] == NAMES
    assert all(row.protects for row in rows)


def test_a_plan_without_request_has_every_layer_that_works() -> None:
    assert plan().layers == tuple(row.name for row in probe() if row.missing is None)


def test_no_layers_are_a_plan_too() -> None:
    empty = plan([])
    assert empty.layers == ()
    assert verify_active(empty) == []


def test_the_order_of_a_request_does_not_matter(choose: Callable[[str], SandboxPlan]) -> None:
    choose("landlock")
    one, two = plan(["landlock", "process"]), plan(["process", "landlock", "process"])
    assert one.layers == two.layers == ("process", "landlock")
    assert one.digest == two.digest


def test_an_unknown_layer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="bubblewrap, process, landlock, seccomp"):
        plan(["selinux"])


def test_a_name_is_registered_once() -> None:
    with pytest.raises(InputError, match="registered already"):
        register(layer("process"))


def test_the_digest_covers_every_setting() -> None:
    whole = plan().to_dict()
    digests = {SandboxPlan.from_dict(whole).digest, plan([]).digest, plan(["process"]).digest}
    assert len(digests) == 3
    assert all(d.startswith("sha256:") and len(d) == 71 for d in digests)
    changed = {name: {**one, "extra": True} for name, one in plan().settings.items()}
    assert SandboxPlan(changed).digest not in digests


def test_settings_name_no_path_of_this_machine(tmp_path: Path) -> None:
    text = json.dumps(plan().to_dict())
    for path in (str(Path.home()), str(tmp_path), str(Path.cwd())):
        assert path not in text
    # The same again in another process's words: equal systems have equal plans.
    assert plan().digest == SandboxPlan.from_dict(json.loads(text)).digest


def test_accelerators_are_part_of_the_digest() -> None:
    closed, opened = plan(["process"]), plan(["process"], accelerators=True)
    assert closed.settings == opened.settings
    assert closed.digest != opened.digest
    again = SandboxPlan.from_dict(opened.to_dict())
    assert again == opened
    assert again.accelerators


@pytest.mark.parametrize("what", ["platform", "serving"])
def test_a_socket_to_the_host_is_part_of_the_digest_and_its_absence_is_not_written(
    what: str,
) -> None:
    closed, opened = plan(["process"]), plan(["process"], **{what: True})
    assert what not in closed.to_dict()
    assert closed.digest != opened.digest
    again = SandboxPlan.from_dict(opened.to_dict())
    assert again == opened
    assert getattr(again, what)
    both = plan(["process"], platform=True, serving=True)
    assert len({closed.digest, opened.digest, both.digest}) == 3


def _without(fields: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1}


def _reversed(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "layers": list(reversed(fields["layers"]))}


def _twice(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "layers": fields["layers"] * 2}


def _unknown(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "layers": [{"name": "magic", "settings": {}}]}


BROKEN: list[Callable[[dict[str, Any]], Any]] = [
    _without,
    _reversed,
    _twice,
    _unknown,
    lambda fields: {**fields, "version": 2},
    lambda fields: {**fields, "more": 1},
    lambda fields: {**fields, "accelerators": 1},
    lambda fields: {**fields, "serving": False},
    lambda fields: {**fields, "serving": 1},
    lambda fields: {**fields, "platform": False},
    lambda fields: {**fields, "platform": "yes"},
    lambda fields: {name: value for name, value in fields.items() if name != "accelerators"},
    lambda fields: {**fields, "layers": ["process"]},
    lambda fields: {**fields, "layers": 7},
    lambda fields: {**fields, "layers": [{"name": "process"}]},
    lambda _: None,
    lambda _: [],
    lambda _: "plan",
]


@pytest.mark.parametrize("spoil", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_plan_is_refused(spoil: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(EnclaveError, match="sandbox plan"):
        SandboxPlan.from_dict(spoil(plan(["process", "landlock"]).to_dict()))


@pytest.mark.parametrize("name", NAMES)
def test_settings_that_are_not_enforced_are_not_accepted(
    name: str, choose: Callable[[str], SandboxPlan]
) -> None:
    honest = choose(name).to_dict()
    for setting, value in honest["layers"][0]["settings"].items():
        forged = copy.deepcopy(honest)
        forged["layers"][0]["settings"][setting] = not value if isinstance(value, bool) else "none"
        if name == "bubblewrap" and setting == "user_namespaces_disabled":
            continue  # both are real, and verified from inside
        with pytest.raises(EnclaveError, match="does not enforce"):
            SandboxPlan.from_dict(forged)


@pytest.mark.parametrize("name", NAMES)
def test_a_planned_layer_that_is_not_active_is_found_out(
    name: str, choose: Callable[[str], SandboxPlan]
) -> None:
    # This process is in no sandbox.
    with pytest.raises(EnclaveError, match=f"layer {name} is planned but not active"):
        verify_active(choose(name))


class _Fake(InnerLayer):
    name = "fake"
    protects = "nothing"

    def __init__(self, missing: str | None, fault: Exception | None = None) -> None:
        self._missing = missing
        self._fault = fault

    def available(self) -> str | None:
        return self._missing

    def settings(self) -> dict[str, Any]:
        return {"fake": True}

    def accepts(self, settings: Mapping[str, Any]) -> bool:
        return settings == self.settings()

    def apply(self, view: View) -> None:
        raise AssertionError

    def verify(self, settings: Mapping[str, Any]) -> None:
        if self._fault is not None:
            raise self._fault


@pytest.fixture
def own_layer(monkeypatch: pytest.MonkeyPatch) -> Callable[[_Fake], None]:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    return register


def test_a_layer_of_ones_own_can_be_added(own_layer: Callable[[_Fake], None]) -> None:
    own_layer(_Fake(None))
    assert plan(["fake"]).layers == ("fake",)
    assert verify_active(plan(["fake"])) == ["fake"]
    assert [one.name for one in plan(["fake"]).inner()] == ["fake"]


def test_a_missing_layer_is_left_out_unless_requested(own_layer: Callable[[_Fake], None]) -> None:
    own_layer(_Fake("needs the Debian package fake"))
    assert "fake" not in plan().layers
    assert probe()[-1].missing == "needs the Debian package fake"
    with pytest.raises(UnavailableError, match="needs the Debian package fake"):
        plan(["process", "fake"])


@pytest.mark.parametrize("fault", [OSError(5, "x"), ValueError("x"), KeyError("x"), IndexError()])
def test_a_verification_that_fails_in_another_way_counts_as_not_active(
    own_layer: Callable[[_Fake], None], fault: Exception
) -> None:
    own_layer(_Fake(None, fault))
    with pytest.raises(EnclaveError, match="cannot be verified"):
        verify_active(plan(["fake"]))


def _program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def bwrap_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str | None], str | None]]:
    """Put a bwrap of one's own (or none) on the path and ask whether the layer works."""
    monkeypatch.setenv("PATH", str(tmp_path))
    bubblewrap._try_out.cache_clear()

    def ask(script: str | None) -> str | None:
        if script is not None:
            _program(tmp_path, "bwrap", script)
        return layer("bubblewrap").available()

    yield ask
    bubblewrap._try_out.cache_clear()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "bwrap is not installed; needs the Debian package bubblewrap"),
        ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "No permissions"),
        ("exit 3", "status 3"),
        ("kill -9 $$", "status -9"),
    ],
)
def test_a_bwrap_that_is_there_but_does_not_work_is_not_available(
    bwrap_of: Callable[[str | None], str | None], script: str | None, reason: str
) -> None:
    answer = bwrap_of(script)
    assert answer is not None
    assert reason in answer
    assert "Debian package bubblewrap" in answer
    assert "bubblewrap" not in plan().layers


def test_an_old_bwrap_without_disable_userns_is_described_as_such(
    bwrap_of: Callable[[str | None], str | None],
) -> None:
    old = 'for a in "$@"; do [ "$a" = --disable-userns ] && exit 1; done; exit 0'
    assert bwrap_of(old) is None
    assert plan(["bubblewrap"]).settings["bubblewrap"]["user_namespaces_disabled"] is False


@pytest.mark.parametrize(
    ("name", "package", "missing"),
    [("landlock", "py-landlock", "py_landlock"), ("seccomp", "pyseccomp", "pyseccomp")],
)
def test_a_layer_without_its_package_names_the_package(
    name: str, package: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = f"import sys\nsys.modules[{missing!r}] = None\n"
    monkeypatch.setattr(trial, "_PROGRAM", block + trial._PROGRAM)
    trial.trial.cache_clear()
    try:
        reason = layer(name).available()
        assert reason is not None
        assert package in reason
        assert name not in plan().layers
    finally:
        trial.trial.cache_clear()


def test_every_layers_reason_is_kept_until_the_process_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = layer("process").available()
    monkeypatch.setattr(trial, "_PROGRAM", "raise SystemExit(9)")
    assert layer("process").available() == before


def test_folders_that_hold_the_home_folder_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", str(Path("~").expanduser()))
    with pytest.raises(CenacleError, match="must not see"):
        folders.interpreter_folders()
