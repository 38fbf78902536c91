"""File system, hash tree and archive against the tools that others read them with."""

from __future__ import annotations

import hashlib
import io
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.enclave.vm.cpio import write_cpio
from cenacle.enclave.vm.erofs import write_erofs
from cenacle.enclave.vm.tree import Tree
from cenacle.enclave.vm.verity import BLOCK, append_verity
from cenacle.errors import InputError

Needs = Callable[[str, str], str]


def _erofs(tree: Tree, path: Path) -> bytes:
    with path.open("wb") as file:
        blocks = write_erofs(tree, file)
    data = path.read_bytes()
    assert len(data) == blocks * BLOCK
    return data


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_system_is_sound_and_holds_every_file(
    tree: Tree, tmp_path: Path, needs: Needs
) -> None:
    fsck = needs("fsck.erofs", "erofs-utils")
    image = tmp_path / "root.img"
    _erofs(tree, image)
    _run(fsck, f"--extract={tmp_path / 'out'}", "--no-preserve-owner", image)
    out = tmp_path / "out"
    for path, node in tree.entries():
        if node.is_file:
            assert (out / path).read_bytes() == node.read(), path
        elif stat.S_ISLNK(node.mode):
            assert str((out / path).readlink()) == node.read().decode()
        else:
            assert (out / path).is_dir()
    found = {p.relative_to(out).as_posix() for p in out.rglob("*")}
    assert found == {path for path, _ in tree.entries() if path}


def test_equal_trees_give_equal_file_systems_in_whatever_order_they_were_made(
    tree: Tree, tmp_path: Path
) -> None:
    backwards = Tree(nodes=dict(reversed(tree.nodes.items())))
    assert _erofs(tree, tmp_path / "a") == _erofs(backwards, tmp_path / "b")
    tree.add_file("etc/empty", b"x")
    assert _erofs(tree, tmp_path / "c") != (tmp_path / "a").read_bytes()


_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(_NAMES, st.binary(max_size=9000), max_size=300))
def test_every_name_is_found_by_a_binary_search_as_the_kernel_does_it(
    files: dict[str, bytes],
) -> None:
    tree = Tree(merged=False)
    for name, content in files.items():
        if name not in {".", ".."} and len(name.encode()) <= 255:
            tree.add_file(name, content)
    out = io.BytesIO()
    write_erofs(tree, out)
    data = out.getvalue()
    names = _folder_names(data)
    assert names == sorted(names)
    expected = {path.encode() for path, _ in tree.entries() if path}
    assert set(names) == expected | {b".", b".."}


def _folder_names(image: bytes) -> list[bytes]:
    """Names in the root folder, read as erofs_fs.h describes them."""
    slot = int.from_bytes(image[1024 + 14 : 1024 + 16], "little") * 32
    size = int.from_bytes(image[slot + 8 : slot + 12], "little")
    start = int.from_bytes(image[slot + 16 : slot + 20], "little") * BLOCK
    names = []
    for at in range(0, size, BLOCK):
        block = image[start + at : start + min(at + BLOCK, size)]
        count = int.from_bytes(block[8:10], "little") // 12
        offsets = [int.from_bytes(block[i * 12 + 8 : i * 12 + 10], "little") for i in range(count)]
        ends = [*offsets[1:], len(block)]
        names += [block[a:b].rstrip(b"\0") for a, b in zip(offsets, ends, strict=True)]
    return names


@pytest.mark.parametrize(
    ("blocks", "salt"),
    [
        (1, b"salt"),
        (2, b""),
        (128, bytes(range(256))),
        (129, b"salt"),
        (128 * 128 + 1, b"salt"),
    ],
    ids=["one", "unsalted", "full", "two-levels", "three-levels"],
)
def test_a_hash_tree_is_what_veritysetup_verifies(
    blocks: int, salt: bytes, tmp_path: Path, needs: Needs
) -> None:
    veritysetup = needs("veritysetup", "cryptsetup-bin")
    path = tmp_path / "root.img"
    content = b"".join(i.to_bytes(4, "big") * (BLOCK // 4) for i in range(blocks))
    path.write_bytes(content)
    with path.open("rb+") as file:
        table = append_verity(file, salt)
    assert table.data_blocks == blocks
    assert path.read_bytes()[: len(content)] == content
    offset = f"--hash-offset={blocks * BLOCK}"
    _run(veritysetup, "verify", path, path, table.root.hex(), offset)
    with path.open("rb+") as file:
        file.seek(blocks * BLOCK - 1)
        file.write(b"\xff")
    refused = subprocess.run(
        [veritysetup, "verify", path, path, table.root.hex(), offset],
        capture_output=True,
        check=False,
    )
    assert refused.returncode != 0


def test_a_hash_tree_is_the_one_that_veritysetup_makes(tmp_path: Path, needs: Needs) -> None:
    veritysetup = needs("veritysetup", "cryptsetup-bin")
    ours, theirs, tree = tmp_path / "ours", tmp_path / "theirs", tmp_path / "tree"
    content = hashlib.shake_256(b"seed").digest(300 * BLOCK)
    for path in (ours, theirs):
        path.write_bytes(content)
    with ours.open("rb+") as file:
        table = append_verity(file, b"\x17" * 32)
    said = _run(
        veritysetup,
        "format",
        "--uuid=00000000-0000-0000-0000-000000000000",
        f"--salt={'17' * 32}",
        theirs,
        tree,
    )
    assert f"Root hash:      \t{table.root.hex()}" in said
    made = tree.read_bytes()
    assert ours.read_bytes()[len(content) :] == made


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK + 1])
def test_a_hash_tree_needs_whole_blocks(size: int) -> None:
    with pytest.raises(InputError, match="whole blocks"):
        append_verity(io.BytesIO(bytes(size)), b"")
    with pytest.raises(InputError, match="whole blocks"):
        append_verity(io.BytesIO(bytes(BLOCK)), bytes(257))


def test_an_archive_is_what_cpio_unpacks(tree: Tree, tmp_path: Path, needs: Needs) -> None:
    cpio = needs("cpio", "cpio")
    archive, out = tmp_path / "initrd", tmp_path / "out"
    with archive.open("wb") as file:
        write_cpio(tree, file)
    out.mkdir()
    with archive.open("rb") as file:
        subprocess.run(
            [cpio, "-idm", "--quiet"], stdin=file, cwd=out, check=True, capture_output=True
        )
    for path, node in tree.entries():
        if node.is_file:
            assert (out / path).read_bytes() == node.read()
            assert stat.S_IMODE((out / path).stat().st_mode) == node.mode & 0o777
        elif stat.S_ISLNK(node.mode):
            assert str((out / path).readlink()) == node.read().decode()
    again = io.BytesIO()
    write_cpio(Tree(nodes=dict(reversed(tree.nodes.items()))), again)
    assert again.getvalue() == archive.read_bytes()
