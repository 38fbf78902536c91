"""Fetching MNIST from a real server on this machine, honest and otherwise."""

from __future__ import annotations

import errno
import gzip
import hashlib
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cenacle.cli import demo_download
from cenacle.cli.demo_data import load_pictures
from cenacle.cli.demo_download import MNIST, download
from cenacle.errors import CenacleError, DataError, InputError, UnavailableError

NAMES = list(MNIST)
IMAGES, LABELS = NAMES[0], NAMES[1]


def _idx(*sizes: int) -> bytes:
    count = 1
    for size in sizes:
        count *= size
    items = bytes(number % 251 for number in range(count))
    return struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes) + items


CONTENT = {
    name: _idx(*((count, 28, 28) if "images" in name else (count,)))
    for name, count in zip(NAMES, (60, 60, 10, 10), strict=True)
}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


@dataclass
class Mirror:
    """What a server gives. ``special`` answers for a path itself, in place of its file."""

    url: str = ""
    files: dict[str, bytes] = field(
        default_factory=lambda: {f"/mnist/{n}": gzip.compress(c) for n, c in CONTENT.items()}
    )
    special: dict[str, Callable[[Any], None]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    made = Mirror()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append(self.path)
            if self.path in made.special:
                made.special[self.path](self)
                return
            body = made.files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Whoever is cut off need not say so."""

    with Server(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}/mnist"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield made
        server.shutdown()
        thread.join()


def _left(folder: Path) -> set[str]:
    """All files there, hidden ones too."""
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


# ------------------------------------------------------------------ what goes well


@pytest.mark.parametrize("slash", ["", "/"])
def test_four_files_arrive_and_can_be_read(mirror: Mirror, tmp_path: Path, slash: str) -> None:
    steps: list[tuple[int, int]] = []
    folder = tmp_path / "new" / "mnist"
    found = download(
        mirror.url + slash, folder, DIGESTS, lambda done, total: steps.append((done, total))
    )
    assert found == folder
    assert _left(folder) == set(NAMES)
    for name, content in CONTENT.items():
        assert gzip.decompress((folder / name).read_bytes()) == content
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    pictures = load_pictures(folder.parent, 50)
    assert pictures.source == "MNIST"
    assert pictures.images.shape == (50, 28, 28)
    assert pictures.labels[7] == 7


def test_what_is_there_is_not_fetched_again(mirror: Mirror, tmp_path: Path) -> None:
    download(mirror.url, tmp_path, DIGESTS)
    mirror.asked.clear()
    download(mirror.url, tmp_path, DIGESTS)
    assert mirror.asked == []


@pytest.mark.parametrize(
    "damage",
    [b"", b"not gzip", gzip.compress(b"another", mtime=0)],
    ids=["empty", "not gzip", "another content"],
)
def test_what_is_there_but_damaged_is_fetched_again(
    damage: bytes, mirror: Mirror, tmp_path: Path
) -> None:
    download(mirror.url, tmp_path, DIGESTS)
    mirror.asked.clear()
    (tmp_path / LABELS).write_bytes(damage)
    download(mirror.url, tmp_path, DIGESTS)
    assert mirror.asked == [f"/mnist/{LABELS}"]
    assert gzip.decompress((tmp_path / LABELS).read_bytes()) == CONTENT[LABELS]


def test_another_packing_of_the_same_content_is_as_good(mirror: Mirror, tmp_path: Path) -> None:
    mirror.files[f"/mnist/{IMAGES}"] = gzip.compress(CONTENT[IMAGES], 1, mtime=7)
    download(mirror.url, tmp_path, DIGESTS)
    assert _left(tmp_path) == set(NAMES)


def test_a_proxy_is_not_asked_for_this_machine(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    download(mirror.url, tmp_path, DIGESTS)


def test_redirections_within_the_server_are_followed(mirror: Mirror, tmp_path: Path) -> None:
    mirror.files = {path.replace("/mnist/", "/v2/"): body for path, body in mirror.files.items()}
    for name in NAMES:
        mirror.special[f"/mnist/{name}"] = _redirect(f"/v2/{name}")
    download(mirror.url, tmp_path, DIGESTS)
    assert _left(tmp_path) == set(NAMES)


def test_the_published_digests_are_those_of_the_real_files(mnist: Path) -> None:
    assert {
        name: hashlib.sha256(gzip.decompress((mnist / name).read_bytes())).hexdigest()
        for name in NAMES
    } == MNIST


# ------------------------------------------------------------------ what does not


def _redirect(target: str) -> Callable[[Any], None]:
    def answer(request: Any) -> None:
        request.send_response(302)
        request.send_header("Location", target)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def _body(body: bytes, *, length: int | None = None, status: int = 200) -> Callable[[Any], None]:
    def answer(request: Any) -> None:
        request.send_response(status)
        if length is not None:
            request.send_header("Content-Length", str(length))
        request.end_headers()
        request.wfile.write(body)

    return answer


def _cut() -> bytes:
    return gzip.compress(CONTENT[LABELS])[:-6]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        pytest.param(_body(gzip.compress(b"else")), DataError, "SHA-256", id="wrong digest"),
        pytest.param(_body(_cut()), DataError, "an end too early", id="truncated file"),
        pytest.param(
            _body(_cut(), length=100_000), UnavailableError, LABELS, id="truncated answer"
        ),
        pytest.param(_body(b""), DataError, "an end too early", id="empty"),
        pytest.param(_body(b"<html>moved</html>"), DataError, "not gzipped", id="a page"),
        pytest.param(_body(CONTENT[LABELS]), DataError, "not gzipped", id="unpacked"),
        pytest.param(
            _body(gzip.compress(CONTENT[LABELS]) + b"x"), DataError, "after the end", id="a tail"
        ),
        pytest.param(_body(b"", status=404), UnavailableError, "status 404", id="missing"),
        pytest.param(_body(b"", status=500), UnavailableError, "status 500", id="broken"),
        pytest.param(
            _redirect("http://localhost:9/x"), UnavailableError, "http://localhost", id="host"
        ),
        pytest.param(
            _redirect("http://127.0.0.1:9/x"), UnavailableError, "another address", id="port"
        ),
        pytest.param(
            _redirect("file:///etc/passwd"), UnavailableError, "", id="a file of this machine"
        ),
        pytest.param(
            _redirect(f"/mnist/{LABELS}"), UnavailableError, "again and again", id="a circle"
        ),
    ],
)
def test_whatever_is_wrong_with_a_file_nothing_of_it_stays(
    answer: Callable[[Any], None],
    error: type[CenacleError],
    words: str,
    mirror: Mirror,
    tmp_path: Path,
) -> None:
    mirror.special[f"/mnist/{LABELS}"] = answer
    with pytest.raises(error) as caught:
        download(mirror.url, tmp_path, DIGESTS)
    assert words in caught.value.diagnostics()
    assert _left(tmp_path) == {IMAGES}  # the one before it is whole
    # And the way on is to try again.
    mirror.special.clear()
    download(mirror.url, tmp_path, DIGESTS)
    assert _left(tmp_path) == set(NAMES)


def test_a_bomb_is_not_unpacked_to_its_end(mirror: Mirror, tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(80 << 20), 1)
    assert len(bomb) < 1 << 20
    mirror.files[f"/mnist/{IMAGES}"] = bomb
    with pytest.raises(DataError, match="64 MiB when unpacked"):
        download(mirror.url, tmp_path, DIGESTS)
    assert _left(tmp_path) == set()


def test_a_file_that_is_too_long_is_cut_off(mirror: Mirror, tmp_path: Path) -> None:
    """Empty blocks of deflate: nothing to unpack, however many there are."""
    mirror.files[f"/mnist/{IMAGES}"] = b"\x1f\x8b\x08" + bytes(7) + b"\0\0\0\xff\xff" * (4 << 20)
    with pytest.raises(DataError, match="more than 16 MiB"):
        download(mirror.url, tmp_path, DIGESTS)
    assert _left(tmp_path) == set()


def test_an_endless_answer_is_cut_off(mirror: Mirror, tmp_path: Path) -> None:
    ended = threading.Event()

    def endless(request: Any) -> None:
        request.send_response(200)
        request.end_headers()
        block = gzip.compress(bytes(1 << 16), 0)
        try:
            while True:
                request.wfile.write(block)
        except OSError:
            ended.set()

    mirror.special[f"/mnist/{IMAGES}"] = endless
    with pytest.raises(DataError, match="after the end"):
        download(mirror.url, tmp_path, DIGESTS)
    assert ended.wait(30)
    assert _left(tmp_path) == set()


def test_a_full_disk_is_said_and_leaves_nothing(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes, offset: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo_download, "pwrite_all", full)
    with pytest.raises(UnavailableError, match="no room"):
        download(mirror.url, tmp_path, DIGESTS)
    assert _left(tmp_path) == set()


def test_a_folder_that_cannot_be(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot write"):
        download(mirror.url, tmp_path / "file" / "mnist", DIGESTS)


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be downloaded"):
        download("http://127.0.0.1:9/mnist", tmp_path, DIGESTS)
    assert _left(tmp_path) == set()


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/mnist",
        "http://127.0.0.1.example.org/",
        "ftp://x",
        "file:///etc",
        "/etc",
        "",
        "https://",
        "http://[::1",
    ],
)
def test_downloads_need_https_or_this_machine(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="HTTPS"):
        download(url, tmp_path)


@pytest.mark.parametrize("url", ["https://me:word@host/x", "https://host/x?y=1", "https://h/#a"])
def test_a_secret_in_an_address_is_not_repeated(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        download(url, tmp_path)
    assert "word" not in caught.value.diagnostics().replace("password", "")


def test_a_folder_and_an_address_exclude_each_other(alone: Any, tmp_path: Path) -> None:
    answer = alone(
        "demo", "images", "--data", tmp_path, "--download-url", "https://example.org", "--json"
    )
    assert answer.code == 2
    assert "not from both" in answer.json["what"]
