"""Start small probe programs inside real enclaves and read what they found out."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cenacle.enclave.launcher import LaunchRequest, launcher
from cenacle.enclave.sandbox import SandboxPlan, plan, probe

Probe = Callable[..., dict[str, Any]]

_PROGRAM = """
import json
from cenacle.enclave.sandbox.entry import enclave_main
{before}
def probe(config):
{body}
def agent(config, channel):
    found = probe(config)
    (config.paths["outputs"] / "found.json").write_text(json.dumps(found))
    channel.finished()
enclave_main(agent)
"""


def probe_program(body: str, before: str = "") -> str:
    """The source of an agent that writes what ``body`` returns to the outputs folder."""
    return _PROGRAM.format(
        body=textwrap.indent(textwrap.dedent(body), "    "), before=textwrap.dedent(before)
    )


@pytest.fixture(scope="session")
def layer_plans() -> dict[str, SandboxPlan]:
    """A plan by name: none, each layer alone, the inner ones, and all that work here."""
    works = [status.name for status in probe() if status.missing is None]
    inner = [name for name in works if name != "bubblewrap"]
    plans = {"none": plan([]), "inner": plan(inner), "all": plan(works)}
    return {**plans, **{name: plan([name]) for name in works}}


@pytest.fixture
def choose(layer_plans: dict[str, SandboxPlan]) -> Callable[[str], SandboxPlan]:
    """The plan of this name, or a skip that names the package that would bring it."""
    missing = {status.name: status.missing for status in probe() if status.missing}

    def pick(name: str) -> SandboxPlan:
        if name in missing:
            pytest.skip(f"{name}: {missing[name]}")
        return layer_plans[name]

    return pick


@pytest.fixture
def run_probe(tmp_path: Path) -> Probe:
    """``run_probe(plan, body, before="", config={})`` -> what the probe returned."""
    outputs = tmp_path / "outputs"
    outputs.mkdir()

    def run(
        chosen: SandboxPlan, body: str, before: str = "", config: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        assets = tmp_path / "assets"
        assets.mkdir(exist_ok=True)
        (assets / "sealed.bin").write_bytes(b"ciphertext")
        request = LaunchRequest(
            broker=("127.0.0.1", 1),
            plan=chosen,
            config=config or {},
            read_only={"assets": assets},
            writable={"outputs": outputs},
            argv=("-c", probe_program(body, before)),
        )
        with launcher().launch(request) as enclave:
            enclave.wait(60)
        found = json.loads((outputs / "found.json").read_text())
        assert isinstance(found, dict)
        return found

    return run
