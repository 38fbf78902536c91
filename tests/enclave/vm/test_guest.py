"""What goes into an image of this installation, and the guest's small programs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cenacle
from cenacle.attestation.ima import ImaAttester
from cenacle.attestation.tpm_attester import TpmAttester
from cenacle.enclave.channel import Failed, Finished, Message, read_messages
from cenacle.enclave.vm import __main__ as process
from cenacle.enclave.vm.distributions import PACKAGES, add_distributions, required
from cenacle.enclave.vm.guest_platform import attester_of
from cenacle.enclave.vm.guest_registers import read_registers
from cenacle.enclave.vm.manifest import ImageManifest
from cenacle.enclave.vm.tree import Tree
from cenacle.errors import EnclaveError, InputError, UnavailableError


def test_an_image_has_what_an_enclave_imports_and_no_server() -> None:
    names = {one.name.lower() for one in required(("sandbox",))}
    assert {"cryptography", "httpx", "numpy", "pyarrow", "pydantic", "pyseccomp"} <= names
    assert names.isdisjoint({"fastapi", "uvicorn", "sqlalchemy", "typer", "pytest"})
    assert names <= {one.name.lower() for one in required(("sandbox",), ("pytest",))}
    with pytest.raises(InputError, match="no such extra"):
        required(("sandbox", "nonsense"))
    with pytest.raises(UnavailableError, match="not installed here"):
        required((), ("no-such-package-anywhere",))


_WITHOUT_OTHERS = """
import sys
import importlib.metadata as metadata
listed = set(sys.argv[1].split(","))
packages = metadata.packages_distributions()
others = {top for top, found in packages.items() if listed.isdisjoint(found)}

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in others:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Refusal())
import cenacle.enclave.agent, cenacle.enclave.worker
import cenacle.enclave.checkpoints, cenacle.enclave.outputs, cenacle.enclave.program_job
import cenacle.enclave.readers, cenacle.enclave.receipt, cenacle.enclave.recipe_job
import cenacle.enclave.vm.guest, cenacle.enclave.vm.guest_platform
print("imported")
"""


def test_the_enclaves_agent_needs_nothing_that_an_image_lacks() -> None:
    listed = ["cenacle", *(one.name for one in required(("sandbox",)))]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_OTHERS, ",".join(listed)], capture_output=True, check=False
    )
    assert done.stdout == b"imported\n", done.stderr.decode()


@pytest.mark.parametrize("module", ["cenacle.enclave.agent", "cenacle.enclave.vm.guest_platform"])
def test_until_the_keys_are_here_no_large_library_is_loaded(module: str) -> None:
    """A machine that measures what it maps hashes each of them whole."""
    large = ("numpy", "onnxruntime", "pyarrow", "torch", "yaml")
    code = f"import sys, {module}; print([name for name in {large} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"[]\n"


def test_packages_are_taken_over_without_what_no_enclave_needs() -> None:
    tree = Tree()
    listed = add_distributions(tree, [importlib.metadata.distribution("numpy")])
    assert [one.name for one in listed] == ["cenacle", "numpy"]
    assert f"{PACKAGES}/cenacle/enclave/agent.py" in tree.nodes
    assert f"{PACKAGES}/numpy/__init__.py" in tree.nodes
    for path in tree.nodes:
        assert "__pycache__" not in path
        assert "/tests/" not in path
        assert not path.endswith((".pyc", ".pyi", ".h", "/RECORD"))
    again = Tree()
    assert add_distributions(again, [importlib.metadata.distribution("numpy")]) == listed
    own = Path(cenacle.__file__).parent / "errors.py"
    assert tree.nodes[f"{PACKAGES}/cenacle/errors.py"].read() == own.read_bytes()


def test_registers_are_read_as_the_kernel_shows_them(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / str(number)).write_text(f"{number:02X}" * 32 + "\n")
    found = read_registers(tmp_path)
    assert list(found) == [str(number) for number in range(12)]
    assert found["10"] == "0a" * 32
    with pytest.raises(UnavailableError, match="no TPM"):
        read_registers(tmp_path / "nowhere")


def test_the_evidence_is_of_the_kind_that_the_host_names() -> None:
    fields: dict[str, Any] = {"kind": "ima", "authorities": [], "allow_list": "sha256:" + "0" * 64}
    assert isinstance(attester_of(fields, None), ImaAttester)
    assert type(attester_of({**fields, "kind": "tpm"}, None)) is TpmAttester
    for wrong in (
        {},
        {"kind": "tpm"},
        {**fields, "authorities": ["?"]},
        {**fields, "authorities": 7},
    ):
        with pytest.raises(EnclaveError, match="does not parse"):
            attester_of(wrong, None)


@pytest.mark.parametrize(
    ("pieces", "ends"),
    [
        ([], Failed),
        ([b'{"kind":"stage","name":"keys"}\n'], Failed),
        ([b'{"kind":"finished","outputs":[],', b'"receipt":null}\n'], Finished),
    ],
    ids=["silent", "started", "finished"],
)
def test_the_reason_follows_unless_the_agent_had_the_last_word(
    pieces: list[bytes], ends: type[Message]
) -> None:
    reader, writer = os.pipe()
    messages = process._Messages(writer)
    for piece in pieces:
        messages(piece)
    try:
        raise EnclaveError("the machine is gone")
    except EnclaveError as error:
        messages.fail(error)
    os.close(writer)
    found = list(read_messages(reader))
    os.close(reader)
    assert isinstance(found[-1], ends)


def test_the_first_process_leaves_a_job_no_way_around_the_fixed_commands(
    write: Callable[..., ImageManifest], tmp_path: Path
) -> None:
    manifest = write(tmp_path / "image")
    words = manifest.cmdline.split(" ")
    assert not [word for word in words if word.startswith(("init=", "root=", "systemd"))]
    assert "rdinit=/init" in words
    assert json.loads(json.dumps(manifest.to_fields()))["cmdline"] == manifest.cmdline
