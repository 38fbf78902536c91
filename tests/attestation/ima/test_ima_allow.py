from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.attestation.ima_allow import MAX_VIOLATIONS, AllowList
from cenacle.attestation.ima_list import ImaEntry
from cenacle.errors import DocumentError, EvidenceError, InputError

AGGREGATE = bytes(31) + b"\x01"
ANY = frozenset([AGGREGATE])


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


ALLOWED = AllowList(
    {
        "/sbin/init": [sha256(b"init")],
        "/usr/bin/agent": [sha256(b"agent"), sha256(b"agent 2")],
        "/etc/a file": [sha256(b"data")],
    },
    {"kernel_version": [sha256(b"6.1")]},
)

Make = Callable[..., ImaEntry]


def boot(make_entry: Make) -> list[ImaEntry]:
    return [make_entry("boot_aggregate", digest=AGGREGATE), make_entry("/sbin/init", b"init")]


def test_listed_files_pass(make_entry: Make) -> None:
    entries = [
        *boot(make_entry),
        make_entry("/usr/bin/agent", b"agent", b"ima-ng"),
        make_entry("/etc/a_file", b"data"),  # the kernel replaces spaces
        make_entry("kernel_version", b"6.1", b"ima-buf"),
        make_entry("boot_aggregate", digest=AGGREGATE),
    ]
    shown = ALLOWED.appraise(entries, ANY)
    assert (shown.entries, shown.violations, shown.replaced) == (6, [], set())


@pytest.mark.parametrize(
    ("name", "content", "extra", "told"),
    [
        ("/usr/bin/evil", b"evil", {}, "/usr/bin/evil, unknown"),
        ("/usr/bin/agent", b"evil", {}, "/usr/bin/agent with other content"),
        ("/tmp/init", b"init", {}, "/tmp/init, unknown, with the content of a listed file"),
        ("/usr/bin/../bin/agent", b"agent", {}, "unknown, with the content"),
        ("//sbin/init", b"init", {}, "unknown, with the content"),
        ("sbin/init", b"init", {}, "unknown, with the content"),
        ("/sbin/init ", b"init", {}, "unknown, with the content"),
        (b"/sbin/init\n", b"init", {}, r"/sbin/init\\n, unknown"),
        (b"/sbin/\xff", b"init", {}, "xff, unknown"),
        ("/sbin/init", b"init", {"algorithm": "sha1"}, "measured with sha1, not sha256"),
        ("/sbin/init", b"init", {"algorithm": "sha512"}, "measured with sha512"),
        ("kernel_version", b"6.6", {"template": b"ima-buf"}, "buffer kernel_version"),
        ("/sbin/init", b"init", {"template": b"ima-buf"}, "buffer /sbin/init"),
        ("kernel_version", b"6.1", {}, "kernel_version, unknown"),
        ("boot_aggregate", b"other", {}, "boot_aggregate of other registers"),
        ("boot_aggregate", b"x", {"algorithm": "sha1"}, "boot_aggregate measured with sha1"),
    ],
)
def test_what_is_not_listed_is_named(
    make_entry: Make, name: str, content: bytes, extra: dict[str, object], told: str
) -> None:
    with pytest.raises(EvidenceError, match=f"does not allow; found .*{told}"):
        ALLOWED.appraise([*boot(make_entry), make_entry(name, content, **extra)], ANY)


def test_an_fs_verity_digest_is_no_content_digest(make_entry: Make) -> None:
    entry = make_entry("/sbin/init", b"init")._replace(algorithm="verity:sha256")
    with pytest.raises(EvidenceError, match="measured with verity:sha256"):
        ALLOWED.appraise([*boot(make_entry), entry], ANY)


def test_the_first_twenty_are_named_and_all_counted(make_entry: Make) -> None:
    wrong = [make_entry(f"/tmp/evil{n:03}", b"evil") for n in range(50)]
    with pytest.raises(EvidenceError) as caught:
        ALLOWED.appraise([*boot(make_entry), *wrong], ANY)
    message = caught.value.diagnostics()
    assert "measured 50 files" in message
    assert "/tmp/evil019" in message
    assert "/tmp/evil020" not in message
    assert "and 30 more" in message


def test_a_list_that_shows_nothing_is_refused(make_entry: Make) -> None:
    first = make_entry("boot_aggregate", digest=AGGREGATE)
    with pytest.raises(EvidenceError, match="does not begin with the boot aggregate"):
        ALLOWED.appraise([], ANY)
    with pytest.raises(EvidenceError, match="does not begin with the boot aggregate"):
        ALLOWED.appraise([make_entry("/sbin/init", b"init")], ANY)
    with pytest.raises(EvidenceError, match="lacks files"):
        ALLOWED.appraise([first], ANY)
    with pytest.raises(EvidenceError, match="boot_aggregate of other registers"):
        ALLOWED.appraise(boot(make_entry), frozenset())


def test_required_files_must_have_been_measured(make_entry: Make) -> None:
    listed = AllowList(ALLOWED.files, required=["/usr/bin/agent", "/etc/a file"])
    with pytest.raises(EvidenceError, match=r"lacks files.*/etc/a file, /usr/bin/agent"):
        listed.appraise(boot(make_entry), ANY)
    more = [make_entry("/usr/bin/agent", b"agent"), make_entry("/etc/a_file", b"data")]
    assert listed.appraise([*boot(make_entry), *more], ANY).entries == 4
    violated = make_entry("/usr/bin/agent", violation=True)
    with pytest.raises(EvidenceError, match="lacks files"):
        listed.appraise([*boot(make_entry), violated, more[1]], ANY)
    with pytest.raises(DocumentError, match="requires files"):
        AllowList(ALLOWED.files, required=["/usr/bin/other"])


def test_violations_are_told(make_entry: Make) -> None:
    entries = [*boot(make_entry), make_entry("/var/log/x", violation=True)]
    assert ALLOWED.appraise(entries, ANY).violations == ["/var/log/x"]
    many = [make_entry("/var/log/x", violation=True)] * (MAX_VIOLATIONS + 1)
    with pytest.raises(EvidenceError, match="too many violations"):
        ALLOWED.appraise([*boot(make_entry), *many], ANY)


def test_two_allowed_contents_of_one_file_are_told(make_entry: Make) -> None:
    entries = [*boot(make_entry), make_entry("/usr/bin/agent", b"agent")]
    before = ALLOWED.appraise(entries, ANY)
    assert before.replaced == set()
    later = [make_entry("/usr/bin/agent", b"agent 2")]
    assert ALLOWED.appraise([*entries, *later], ANY).replaced == {"/usr/bin/agent"}
    after = ALLOWED.appraise(later, ANY, before)
    assert (after.entries, after.replaced) == (4, {"/usr/bin/agent"})
    assert before.replaced == set()
    assert ALLOWED.appraise([], ANY, before).entries == 3


def test_a_file_holds_the_list(tmp_path: Path) -> None:
    listed = AllowList(ALLOWED.files, ALLOWED.buffers, ["/sbin/init"])
    again = AllowList.parse(listed.serialized)
    assert again.serialized == listed.serialized
    assert again.digest == listed.digest == f"sha256:{sha256(listed.serialized).hex()}"
    assert (again.files, again.buffers, again.required) == (
        listed.files,
        listed.buffers,
        listed.required,
    )
    lines = listed.serialized.decode().splitlines()
    assert [list(json.loads(line)) for line in lines] == [
        ["algorithm", "format", "version"],
        ["digests", "file"],
        ["digests", "file", "required"],
        ["digests", "file"],
        ["buffer", "digests"],
    ]


def line(**fields: object) -> bytes:
    return json.dumps(fields, separators=(",", ":"), sort_keys=True).encode() + b"\n"


HEAD = line(algorithm="sha256", format="cenacle/ima-allow-list", version=1)
ONE = line(digests=["00" * 32], file="/a")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]\n",
        HEAD[:-1],
        ONE,
        HEAD.replace(b"sha256", b"sha1"),
        HEAD + ONE[:-1],
        HEAD + ONE + ONE,
        HEAD + line(digests=["00" * 32], file="/b") + ONE,
        HEAD + line(digests=["00" * 32, "00" * 32], file="/a"),
        HEAD + line(digests=["11" * 32, "00" * 32], file="/a"),
        HEAD + line(digests=["AA" * 32], file="/a"),
        HEAD + line(digests=[], file="/a"),
        HEAD + line(digests=["00" * 31], file="/a"),
        HEAD + line(digests="00" * 32, file="/a"),
        HEAD + line(digests=["00" * 32], file="a"),
        HEAD + line(digests=["00" * 32], file="/a/../b"),
        HEAD + line(digests=["00" * 32], file="//a"),
        HEAD + line(digests=["00" * 32], file="/a/"),
        HEAD + line(digests=["00" * 32], file="/a\0"),
        HEAD + line(digests=["00" * 32], file="/\ud800"),
        HEAD + line(digests=["00" * 32], file=7),
        HEAD + line(digests=["00" * 32], buffer=""),
        HEAD + line(digests=["00" * 32], buffer="a\nb"),
        HEAD + line(digests=["00" * 32], file="/a", required=False),
        HEAD + line(digests=["00" * 32], file="/a", more=1),
        HEAD + line(digests=["00" * 32]),
        HEAD + b"{\n",
        HEAD + b"\xff\n",
        HEAD + b"[" * 5000 + b"\n",
        HEAD + ONE + b" ",
        HEAD + ONE.replace(b":", b": "),
    ],
)
def test_other_forms_of_a_file_are_refused(raw: bytes) -> None:
    with pytest.raises(DocumentError):
        AllowList.parse(raw)


def test_every_byte_of_a_file_counts() -> None:
    raw = AllowList(ALLOWED.files, ALLOWED.buffers, ["/sbin/init"]).serialized
    digest = AllowList.parse(raw).digest
    for place in range(len(raw)):
        altered = bytearray(raw)
        altered[place] ^= 0x01
        try:
            assert AllowList.parse(bytes(altered)).digest != digest
        except DocumentError:
            continue


def test_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "usr" / "bin").mkdir(parents=True)
    (tmp_path / "usr/bin/agent").write_bytes(b"agent")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/new\nline").write_bytes(b"x")
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "etc/link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "etc/pipe")
    listed = AllowList.of_tree(tmp_path, required=["/usr/bin/agent"])
    assert listed.files == {
        "/etc/new\nline": {sha256(b"x")},
        "/usr/bin/agent": {sha256(b"agent")},
    }
    assert AllowList.parse(listed.serialized).files == listed.files
    with pytest.raises(InputError, match="cannot be read"):
        AllowList.of_tree(tmp_path / "absent")
    (tmp_path / os.fsdecode(b"\xff")).write_bytes(b"x")
    with pytest.raises(DocumentError, match="path that no file can have"):
        AllowList.of_tree(tmp_path)


def test_from_a_listing(tmp_path: Path) -> None:
    names = ["plain", "two words", "new\nline", "back\\slash", "\\n"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    done = subprocess.run(
        ["sha256sum", "--", *(tmp_path / name for name in names)], capture_output=True, check=True
    )
    listed = AllowList.of_listing(done.stdout)
    assert listed.files == {f"{tmp_path}/{name}": {sha256(name.encode())} for name in sorted(names)}
    for listing in (b"zz  /a\n", b"00\n", b"\\" + b"00" * 32 + b"  /a\\x\n", b"00  /\xff\n"):
        with pytest.raises(InputError, match="line 1 of a listing"):
            AllowList.of_listing(listing)
    with pytest.raises(DocumentError, match="path that no file can have"):
        AllowList.of_listing(b"00" * 32 + b"  relative\n")


def test_lists_are_merged() -> None:
    one = AllowList({"/a": [sha256(b"1")]}, {"x": [sha256(b"x")]}, ["/a"])
    two = AllowList({"/a": [sha256(b"2")], "/b": [sha256(b"3")]}, required=["/b"])
    both = one.merged(two)
    assert both.files == {"/a": {sha256(b"1"), sha256(b"2")}, "/b": {sha256(b"3")}}
    assert sorted(both.required) == ["/a", "/b"]
    assert list(both.buffers) == ["x"]
    assert both.digest == two.merged(one).digest


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with a program, a hard link and a symbolic link."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb: install Debian's package dpkg")
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n"
    )
    (root / "bin").mkdir()
    (root / "bin/tool").write_bytes(b"tool")
    (root / "usr/share").mkdir(parents=True)
    (root / "usr/share/copy").hardlink_to(root / "bin/tool")
    (root / "usr/share/link").symlink_to("/bin/tool")
    made = tmp_path / "x.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Zxz", "-b", str(root), str(made)]
    subprocess.run(command, capture_output=True, check=True)
    return made


def test_from_packages(package: Path, tmp_path: Path) -> None:
    expected = {"/usr/bin/tool": {sha256(b"tool")}, "/usr/share/copy": {sha256(b"tool")}}
    assert AllowList.of_packages([package]).files == expected
    apart = AllowList.of_packages([package, package], merged_usr=False).files
    assert sorted(apart) == ["/bin/tool", "/usr/share/copy"]
    gzip = tmp_path / "gzip.deb"
    command = ["dpkg-deb", "-Zgzip", "-b", str(tmp_path / "root"), str(gzip)]
    subprocess.run(command, capture_output=True, check=True)
    assert AllowList.of_packages([gzip]).files == expected


def test_packages_that_are_none(package: Path, tmp_path: Path) -> None:
    raw = package.read_bytes()
    bad = tmp_path / "bad.deb"
    start = raw.index(b"data.tar")
    for content in (b"", b"!<arch>\n", raw[:200], raw[: start + 60], raw[:-200], b"x" * 100):
        bad.write_bytes(content)
        with pytest.raises(InputError, match="Debian package"):
            AllowList.of_packages([bad])
    bad.write_bytes(raw[: start + 60] + b"\x28\xb5\x2f\xfd" + raw[start + 64 :])
    with pytest.raises(InputError, match="dpkg-deb -x"):
        AllowList.of_packages([bad])
    with pytest.raises(InputError, match="Debian package"):
        AllowList.of_packages([tmp_path / "absent.deb"])


@settings(max_examples=100)
@given(st.binary(max_size=100))
def test_hostile_files_raise_document_errors_only(noise: bytes) -> None:
    for raw in (noise, HEAD + noise, HEAD + ONE[:20] + noise + b"\n"):
        try:
            AllowList.parse(raw)
        except DocumentError:
            continue
