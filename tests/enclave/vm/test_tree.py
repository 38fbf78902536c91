from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cenacle.enclave.vm.tree import Tree
from cenacle.errors import InputError


@pytest.mark.parametrize("path", ["", "/etc/x", "a//b", "../x", "a/../b", "a/.", "a\0b", "n" * 256])
def test_a_path_that_leaves_the_tree_or_cannot_be_named_is_refused(path: str) -> None:
    with pytest.raises(InputError):
        Tree().add_file(path, b"")


def test_programs_lose_the_bits_that_give_privileges(tree: Tree) -> None:
    assert stat.S_IMODE(tree.nodes["usr/bin/program"].mode) == 0o755


def test_folders_of_the_root_are_merged_into_usr_as_debian_does(tree: Tree) -> None:
    assert "bin/program" not in tree.nodes
    assert tree.nodes["bin"].read() == b"usr/bin"
    assert tree.resolve("bin/program") == "usr/bin/program"
    assert tree.resolve("etc/link") == "usr/bin/program"
    unmerged = Tree(merged=False)
    unmerged.add_file("bin/program", b"")
    assert "bin/program" in unmerged.nodes


def test_links_in_circles_and_links_to_nothing_are_refused() -> None:
    tree = Tree()
    tree.add_link("etc/a", "b")
    tree.add_link("etc/b", "a")
    tree.add_link("etc/c", "/nowhere")
    for path in ("etc/a", "etc/c", "etc/d"):
        with pytest.raises(InputError, match="lacks a file"):
            tree.resolve(path)


def test_a_file_where_a_folder_is_needed_is_refused() -> None:
    tree = Tree()
    tree.add_file("etc/x", b"")
    tree.add_file("etc/x/y", b"")
    with pytest.raises(InputError, match="where it needs a folder"):
        tree.entries()


def test_a_tree_on_a_disk_is_the_tree(tree: Tree, tmp_path: Path) -> None:
    tree.write_to(tmp_path)
    for path, node in tree.entries():
        if node.is_file:
            assert (tmp_path / path).read_bytes() == node.read()
    digests = tree.digests()
    assert digests["/etc/empty"].startswith("e3b0c442")
    assert set(digests) == {f"/{path}" for path, node in tree.entries() if node.is_file}
