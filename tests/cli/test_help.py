"""What every command has: a help text with an example, ``--json``, documented exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from cenacle import errors
from cenacle.cli.main import app
from cenacle.cli.output import EXIT_CODES

ROOT: Any = typer.main.get_command(app)


def _commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(_commands(ROOT))


def test_the_verbs_of_the_program_are_these() -> None:
    assert sorted(" ".join(path) for path in COMMANDS) == sorted(
        """abandon
attest show
attest trust
attest verify
broker attest
broker invite
broker keys recover
broker keys seal
broker keys share
broker measure
broker pin
broker show
broker start
budget
contracts
cut export
cut model
cut retrain
demo hospitals
demo images
demo serving
draft
enclave layers
enclave measure
evaluate
image build
image measure
image show
infer
log
offload profile
offload schemes
open
party list
party new
party register
party show
propose
review
run
seal
serve
sign
terms check
terms new
ticket key new
ticket new
ticket show
verify
veto""".splitlines()
    )


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_with_an_example_of_its_own(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    assert command.help
    assert f"cenacle {' '.join(path)}" in command.epilog
    assert command.epilog.startswith("Example")
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{parameter.name} has no help"


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_answers_in_json_if_asked(path: tuple[str, ...]) -> None:
    assert any("--json" in parameter.opts for parameter in COMMANDS[path].params)


def test_the_program_and_each_group_give_an_example_of_a_command() -> None:
    groups = {"": ROOT, **{n: c for n, c in ROOT.commands.items() if hasattr(c, "commands")}}
    assert len(groups) == 11
    for name, group in groups.items():
        example = group.epilog.splitlines()[0]
        assert example.startswith(f"Example: cenacle {name}")
        assert any(f"cenacle {' '.join(path)}" in example for path in COMMANDS)


def test_exit_codes_are_documented_and_are_those_of_the_errors() -> None:
    assert ROOT.epilog.endswith(EXIT_CODES)
    kinds = [getattr(errors, name) for name in errors.__all__]
    for code in {kind.exit_code for kind in kinds}:
        assert f"{code} " in EXIT_CODES
    assert sorted({kind.exit_code for kind in kinds}) == [1, 2, 3, 4, 5, 6, 7]
