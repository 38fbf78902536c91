"""``cenacle serve`` and ``cenacle infer``: what is refused before anything is started or sent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cenacle.cli.main import app
from cenacle.cli.serve_operator import find_front
from cenacle.documents.base import sha256_digest
from cenacle.errors import InputError

SERVE = ("serve", "sha256:" + "00" * 32, "--data", ".", "--out", "out")


def _fails(folder: Path, *arguments: str) -> dict[str, str]:
    done = CliRunner().invoke(app, [*arguments, "--json"], env={"CENACLE_HOME": str(folder / "h")})
    assert done.exit_code == 2, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--listen", "8443"), "address to listen on"),
        (("--listen", "127.0.0.1:x"), "address to listen on"),
        (("--listen", "127.0.0.1:70000"), "address to listen on"),
        (("--listen", "0.0.0.0:0", "--plain-http"), "plain HTTP is for a loopback address"),
        (("--listen", "example.org:0", "--plain-http"), "plain HTTP is for a loopback address"),
        (("--waiting", "0"), "greater than zero"),
        (("--max-body-mb", "0"), "greater than zero"),
        (("--follow", "0"), "greater than zero"),
        (("--listen", "127.0.0.1:0", "--plain-http"), "no broker is pinned"),
    ],
)
def test_a_service_that_cannot_be(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    assert words in _fails(tmp_path, *SERVE, *options)["what"]


def test_a_certificate_of_its_own_is_made_once(tmp_path: Path) -> None:
    for _ in range(2):
        found = _fails(tmp_path, *SERVE, "--listen", "127.0.0.1:0")
        assert "no broker is pinned" in found["what"]
        made = (tmp_path / "h" / "serving" / "tls.crt").read_bytes()
    assert made == (tmp_path / "h" / "serving" / "tls.crt").read_bytes()
    assert (tmp_path / "h" / "serving" / "tls.key").stat().st_mode & 0o077 == 0


def test_the_front_is_found_by_its_digest(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, data in (("a.onnx", b"a"), ("deep/b.onnx", b"b")):
        (tmp_path / name).write_bytes(data)
    digest = sha256_digest(b"b")
    assert find_front([tmp_path], digest) == tmp_path / "deep" / "b.onnx"
    assert find_front([tmp_path / "deep" / "b.onnx"], digest).name == "b.onnx"
    for places in ([], [tmp_path / "a.onnx"]):
        with pytest.raises(InputError, match="public front is not there"):
            find_front(places, digest)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--sealed",),
        ("--model", "net", "--front", "front.onnx"),
        ("--model", "net", "--contract", "sha256:" + "00" * 32),
    ],
)
def test_options_of_a_query_that_do_not_go_together(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    np.save(tmp_path / "x.npy", np.ones(1))
    arguments = ["infer", "http://127.0.0.1:1", "--input", str(tmp_path / "x.npy"), *options]
    done = CliRunner().invoke(app, arguments, env={"CENACLE_HOME": str(tmp_path)})
    assert done.exit_code == 2
    assert "--" in done.output
