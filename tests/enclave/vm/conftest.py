"""Small trees, and an image small enough to be built and started in a test."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cenacle.enclave.vm import initrd, qemu
from cenacle.enclave.vm.distributions import add_distributions, compile_sources, required
from cenacle.enclave.vm.image import ImagePlan, default_cache, write_image
from cenacle.enclave.vm.manifest import ImageManifest
from cenacle.enclave.vm.packages import PackageCache, kernel_package, resolve, unpack
from cenacle.enclave.vm.tree import Tree
from cenacle.errors import UnavailableError

__all__: list[str] = []


def _needs(program: str, package: str) -> str:
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/bin:/sbin")
    if found is None:
        pytest.skip(f"needs the Debian package {package}")
    return found


@pytest.fixture(scope="session")
def needs() -> Callable[[str, str], str]:
    """Path of a program; skips the test, naming the Debian package, if it is not here."""
    return _needs


@pytest.fixture
def tree() -> Tree:
    """A little of everything that a tree can hold."""
    made = Tree()
    made.add_file("bin/program", b"\x7fELF" + b"x" * 20000, 0o4755)
    made.add_file("etc/empty", b"")
    made.add_file("etc/with space", b"1")
    made.add_file("etc/\u00fcmlaut", "\u00fcber".encode())
    made.add_link("etc/link", "../usr/bin/program")
    made.add_folder("proc")
    made.add_folder("tmp", 0o1777)
    for index in range(400):  # more than fit into one block of names
        made.add_file(f"usr/share/many/a-file-with-a-long-name-{index:04}", b"n" * index)
    made.add_merged_links()
    return made


def _assemble() -> tuple[Tree, Tree, Tree]:
    _needs("apt-get", "apt")
    _needs("dpkg-deb", "dpkg")
    try:
        kernel = kernel_package()
        packages = resolve(["libpython3.11-stdlib", "python3.11-minimal", *initrd.PACKAGES])
        cache = PackageCache(default_cache())
        cache.fetch([kernel, *packages])
    except UnavailableError as error:
        pytest.skip(f"needs Debian 12's package lists: {error.diagnostics()}")
    first, modules = Tree(), Tree()
    for package in packages:
        unpack(cache.path(package), first, lambda _: True)
    unpack(cache.path(kernel), modules, lambda _: True)
    folders = ("usr/lib/python3", "usr/lib/x86_64-linux-gnu/", "usr/lib64/", "usr/bin/python3.11")
    root = Tree(nodes={p: node for p, node in first.nodes.items() if p.startswith(folders)})
    add_distributions(root, [one for one in required(()) if one.name == "rfc8785"])
    compile_sources(root)
    return root, first, modules


@pytest.fixture(scope="session")
def assemble() -> Callable[[], tuple[Tree, Tree, Tree]]:
    """Makes root, packages of the first root folder, and kernel anew."""
    return _assemble


@pytest.fixture(scope="session")
def parts() -> tuple[Tree, Tree, Tree]:
    """Root, packages of the first root folder, and kernel: enough to start and measure."""
    return _assemble()


def _write(
    parts: tuple[Tree, Tree, Tree],
    folder: Path,
    plan: ImagePlan | None = None,
    change: Callable[[Tree], None] | None = None,
) -> ImageManifest:
    root, first, modules = parts
    copy = Tree(nodes=dict(root.nodes))
    if change is not None:
        change(copy)
    return write_image(folder, plan or ImagePlan(), root=copy, packages=first, kernel=modules)


@pytest.fixture(scope="session")
def image(parts: tuple[Tree, Tree, Tree], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small image: the guest's own programs, without an enclave's dependencies."""
    folder = tmp_path_factory.mktemp("vm") / "image"
    _write(parts, folder)
    return folder


@pytest.fixture(scope="session")
def rebuild(parts: tuple[Tree, Tree, Tree]) -> Callable[..., ImageManifest]:
    """Build another image from the same parts: folder, plan, and a change to the root."""
    return partial(_write, parts)


@pytest.fixture(scope="session")
def machine_programs() -> None:
    """Skips where no virtual machine can be started."""
    if missing := qemu.missing_programs():
        pytest.skip("needs the Debian packages " + " ".join(missing))


@pytest.fixture(scope="session")
def tpm_identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a software TPM's identity, made at the first start."""
    return tmp_path_factory.mktemp("identity") / "tpm"


# ---------------------------------------------------------------------- made-up packages

_RELEASE = "6.1.0-1-test"


def _module(*needs: str) -> bytes:
    return b"\x7fELF\0name=x\0depends=" + ",".join(needs).encode() + b"\0vermagic=1\0"


def _kernel() -> Tree:
    tree = Tree()
    tree.add_file(f"boot/vmlinuz-{_RELEASE}", b"MZ" + b"k" * 5000)
    modules = {
        "virtio": (),
        "virtio_ring": (),
        "virtio_pci": ("virtio", "virtio_ring"),
        "virtio_blk": ("virtio_ring", "virtio"),
        "virtio_console": ("virtio",),
        "dm-mod": (),
        "dm-verity": ("dm-mod",),
    }
    for name, needs in modules.items():
        tree.add_file(f"lib/modules/{_RELEASE}/kernel/{name}.ko", _module(*needs))
    tree.add_file(f"lib/modules/{_RELEASE}/modules.builtin", b"kernel/fs/erofs/erofs.ko\n")
    return tree


def _first() -> Tree:
    tree = Tree()
    for name in ("bin/busybox", "sbin/dmsetup", "lib64/ld-linux-x86-64.so.2"):
        tree.add_file(name, name.encode(), 0o755)
    for name in ("c.so.6", "devmapper.so.1.02.1", "m.so.6", "pcre2-8.so.0", "pthread.so.0"):
        tree.add_file(f"lib/x86_64-linux-gnu/lib{name}", name.encode())
    for name in ("selinux.so.1", "udev.so.1"):
        tree.add_file(f"usr/lib/x86_64-linux-gnu/lib{name}.0", name.encode())
        tree.add_link(f"usr/lib/x86_64-linux-gnu/lib{name}", f"lib{name}.0")
    return tree


def _root() -> Tree:
    tree = Tree()
    tree.add_file("usr/bin/python3.11", b"python", 0o755)
    tree.add_file("usr/lib/python3.11/os.pyc", b"os")
    return tree


@pytest.fixture
def small_kernel() -> Tree:
    """A kernel package whose kernel is none."""
    return _kernel()


@pytest.fixture
def small_root() -> Tree:
    """Two files."""
    return _root()


@pytest.fixture(scope="session")
def write() -> Callable[..., ImageManifest]:
    """Write an image of made-up packages: folder, plan, root."""

    def made(
        folder: Path, plan: ImagePlan | None = None, root: Tree | None = None
    ) -> ImageManifest:
        return write_image(
            folder, plan or ImagePlan(), root=root or _root(), packages=_first(), kernel=_kernel()
        )

    return made
