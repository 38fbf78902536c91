"""The kernel of an image and the few modules that its machine needs, in the order of loading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from cenacle.enclave.vm.tree import Tree
from cenacle.errors import InputError

__all__ = ["MODULES", "find_kernel", "module_order"]

MODULES: Final = ("virtio_pci", "virtio_blk", "virtio_console", "dm_verity", "erofs")
"""What the machine of :mod:`cenacle.enclave.vm.qemu` and its root file system need."""

_KERNEL: Final = re.compile(r"boot/vmlinuz-(\S+)")
_DEPENDS: Final = re.compile(rb"\x00depends=([^\x00]*)\x00")


def find_kernel(tree: Tree) -> tuple[str, bytes]:
    """Release and bytes of the one kernel in a tree; raises InputError."""
    found = [(match[1], path) for path in tree.nodes if (match := _KERNEL.fullmatch(path))]
    if len(found) != 1:
        raise InputError(
            "an image needs exactly one kernel", found=", ".join(r for r, _ in found) or "none"
        )
    release, path = found[0]
    return release, tree.nodes[path].read()


def module_order(
    tree: Tree, release: str, names: tuple[str, ...] = MODULES
) -> list[tuple[str, bytes]]:
    """Modules and those they depend on, each after what it needs: names and contents.

    A module that is built into the kernel is left out.

    Raises:
        InputError: a module is neither there nor built in.
    """
    folder = f"usr/lib/modules/{release}/"
    files = {
        path.rpartition("/")[2].removesuffix(".ko").replace("-", "_"): path
        for path in tree.nodes
        if path.startswith(folder) and path.endswith(".ko")
    }
    listed = tree.nodes.get(f"{folder}modules.builtin")
    builtin = {
        line.rpartition(b"/")[2].removesuffix(b".ko").replace(b"-", b"_").decode()
        for line in (listed.read().split(b"\n") if listed else [])
    }
    order: dict[str, bytes] = {}

    def visit(name: str) -> None:
        if name in order or name in builtin:
            return
        if name not in files:
            raise InputError("the kernel lacks a module", found=f"no {name} in {release}")
        content = tree.nodes[files[name]].read()
        for needed in _needs(content):
            visit(needed)
        order[name] = content

    for name in names:
        visit(name)
    return list(order.items())


def _needs(module: bytes) -> Iterator[str]:
    found = _DEPENDS.search(module)
    for name in found[1].decode("ascii").split(",") if found else []:
        if name:
            yield name.replace("-", "_")
