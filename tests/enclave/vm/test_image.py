"""Images from made-up packages: the same bytes twice, other bytes for any change, or nothing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cenacle.attestation.ima_allow import AllowList
from cenacle.cli.image import app
from cenacle.enclave.vm import image as image_module
from cenacle.enclave.vm.guest_plan import GUEST_LAYERS, guest_plan, landlock_abi
from cenacle.enclave.vm.image import ImagePlan, build_image
from cenacle.enclave.vm.initrd import INIT, PACKAGES
from cenacle.enclave.vm.kernel import find_kernel, module_order
from cenacle.enclave.vm.manifest import FILES, ImageManifest
from cenacle.enclave.vm.packages import Package, PackageCache, unpack
from cenacle.enclave.vm.tree import Tree
from cenacle.errors import ConflictError, InputError, UnavailableError

RELEASE = "6.1.0-1-test"
Needs = Callable[[str, str], str]
Write = Callable[..., ImageManifest]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_builds_are_one_image_wherever_and_whenever_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    first = write(tmp_path / "a" / "image")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    before = os.umask(0o077)
    try:
        second = write(tmp_path / "b")
    finally:
        os.umask(before)
    assert first.digest == second.digest
    assert _bytes(tmp_path / "a" / "image") == _bytes(tmp_path / "b")
    assert ImageManifest.load(tmp_path / "b") == first


def test_the_time_of_an_image_is_the_builders_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    manifest = write(tmp_path / "a")
    assert manifest.source_date == 1700000000
    assert manifest.digest != write(tmp_path / "b", ImagePlan(source_date=0)).digest
    with pytest.raises(InputError, match="time of an image"):
        ImagePlan(source_date=-1)


def test_one_changed_file_is_another_root_hash_on_another_command_line(
    tmp_path: Path, write: Write, small_root: Tree
) -> None:
    one = write(tmp_path / "one")
    root = small_root
    root.add_file("usr/lib/python3.11/os.pyc", b"oS")
    other = write(tmp_path / "other", root=root)
    assert one.verity.root_hash != other.verity.root_hash
    assert one.cmdline != other.cmdline
    assert one.files["listing"].digest != other.files["listing"].digest
    for kind in ("kernel", "initrd"):
        assert one.files[kind] == other.files[kind]


def test_one_more_argument_is_another_image(tmp_path: Path, write: Write) -> None:
    one = write(tmp_path / "one")
    plan = ImagePlan(arguments=(*image_module.ARGUMENTS, "debug"))
    other = write(tmp_path / "other", plan)
    assert one.digest != other.digest
    assert other.cmdline.replace(" debug", "") == one.cmdline


def test_the_command_line_names_the_root_and_the_measuring_policy(
    tmp_path: Path, write: Write
) -> None:
    manifest = write(tmp_path / "image")
    words = manifest.cmdline.split(" ")
    assert {"ima_policy=tcb", "ima_hash=sha256", "module.sig_enforce=1"} <= set(words)
    assert words[-1].startswith("cenacle.verity=1,4096,4096,")
    assert words[-1].endswith(f",sha256,{manifest.verity.root_hash},{manifest.verity.salt}")
    assert (tmp_path / "image" / "cmdline").read_text() == manifest.cmdline


def test_the_allow_list_is_of_every_file_in_the_root(tmp_path: Path, write: Write) -> None:
    manifest = write(tmp_path / "image")
    listed = AllowList.parse((tmp_path / "image" / FILES["listing"]).read_bytes())
    assert listed.digest == manifest.files["listing"].digest
    assert listed.required == {"/usr/bin/python3.11"}
    assert "/usr/share/cenacle/measured-root" in listed.files


@pytest.mark.parametrize("kind", list(FILES))
def test_a_file_that_is_not_the_manifests_is_named(kind: str, tmp_path: Path, write: Write) -> None:
    write(tmp_path / "image")
    path = tmp_path / "image" / FILES[kind]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"the {kind} of an image"):
        ImageManifest.load(tmp_path / "image")
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        ImageManifest.load(tmp_path / "image")


@pytest.mark.parametrize("raw", [b"", b"{}", b"[", b'{"version":2}', b"\xff" * 10])
def test_a_manifest_that_is_none_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(raw)
    with pytest.raises(InputError, match="holds no image"):
        ImageManifest.load(tmp_path)
    with pytest.raises(InputError, match="holds no image"):
        ImageManifest.load(tmp_path / "nowhere")


def test_an_image_replaces_nothing_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "precious").write_bytes(b"")
    with pytest.raises(ConflictError, match="not written over"):
        write(tmp_path / "image")
    monkeypatch.setattr(image_module, "write_erofs", _full)
    with pytest.raises(UnavailableError, match="no room"):
        write(tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image"]


def _full(*_: object) -> int:
    raise OSError(28, os.strerror(28))


def test_an_image_is_not_built_from_packages_of_another_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(UnavailableError, match="riscv64"):
        build_image(tmp_path / "image", ImagePlan())
    assert list(tmp_path.iterdir()) == []


def test_modules_come_after_those_that_they_need(small_kernel: Tree) -> None:
    names = [name for name, _ in module_order(small_kernel, RELEASE)]
    assert set(names) == {
        *("virtio", "virtio_ring", "virtio_pci", "virtio_blk", "virtio_console"),
        *("dm_mod", "dm_verity"),  # erofs is built in
    }
    assert names.index("virtio") < names.index("virtio_pci")
    assert names.index("dm_mod") < names.index("dm_verity")
    with pytest.raises(InputError, match="lacks a module"):
        module_order(small_kernel, RELEASE, ("absent",))
    with pytest.raises(InputError, match="exactly one kernel"):
        find_kernel(Tree())


def test_the_first_script_is_one_that_a_shell_understands(tmp_path: Path) -> None:
    path = tmp_path / "init"
    path.write_text(INIT)
    done = subprocess.run(["sh", "-n", path], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "panic_on_corruption" in INIT
    assert "busybox-static" in PACKAGES


# ---------------------------------------------------------------------- packages


def _deb(folder: Path, needs: Needs) -> Path:
    builder = needs("dpkg-deb", "dpkg")
    source = folder / "source"
    (source / "DEBIAN").mkdir(parents=True)
    (source / "DEBIAN" / "control").write_text(
        "Package: x\nVersion: 1\nArchitecture: amd64\nMaintainer: n <n@example.org>\n"
        "Description: x\n"
    )
    (source / "usr" / "bin").mkdir(parents=True)
    (source / "usr" / "bin" / "one").write_bytes(b"program")
    (source / "usr" / "bin" / "one").chmod(0o4755)
    (source / "usr" / "bin" / "two").hardlink_to(source / "usr" / "bin" / "one")
    (source / "usr" / "bin" / "three").symlink_to("one")
    (source / "usr" / "share").mkdir()
    (source / "usr" / "share" / "manual").write_bytes(b"")
    subprocess.run(
        [builder, "--root-owner-group", "-b", source, folder / "x.deb"],
        check=True,
        capture_output=True,
    )
    return folder / "x.deb"


def test_a_package_is_unpacked_as_it_is_but_for_its_privileges(
    tmp_path: Path, needs: Needs
) -> None:
    tree = Tree()
    unpack(_deb(tmp_path, needs), tree, lambda path: path.startswith("usr/bin"))
    assert sorted(tree.nodes) == ["usr/bin/one", "usr/bin/three", "usr/bin/two"]
    assert tree.nodes["usr/bin/one"].mode == 0o100755
    assert tree.nodes["usr/bin/two"].read() == b"program"
    assert tree.resolve("usr/bin/three") == "usr/bin/one"


def test_what_is_no_package_is_refused(tmp_path: Path, needs: Needs) -> None:
    whole = _deb(tmp_path, needs).read_bytes()
    for name, data in {
        "empty": b"",
        "noise": b"!<arch>\n" * 9,
        "half": whole[: len(whole) // 2],
    }.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InputError, match="cannot be unpacked"):
            unpack(path, Tree(), lambda _: True)


def test_a_package_with_another_digest_is_not_used(tmp_path: Path) -> None:
    cache = PackageCache(tmp_path / "cache")
    package = Package("one", "1", "sha256:" + "0" * 64)
    cache.path(package).write_bytes(b"something else")
    with pytest.raises(InputError, match="not the one that was chosen"):
        cache.fetch([package])
    with pytest.raises(InputError, match="unusable name"):
        cache.fetch([Package("--option", "1", package.digest)])


# ---------------------------------------------------------------------- the sandbox inside


@pytest.mark.parametrize(
    ("release", "version"),
    [("5.10.0", 0), ("5.13", 1), ("6.1.0-56-cloud-amd64", 2), ("6.2.1", 3), ("6.12.9", 6)],
)
def test_the_guests_landlock_follows_from_its_kernel(release: str, version: int) -> None:
    assert landlock_abi(release) == version


def test_the_guests_plan_does_not_depend_on_this_kernel(tmp_path: Path, write: Write) -> None:
    pytest.importorskip("py_landlock", reason="needs the PyPI package py-landlock")
    manifest = write(tmp_path / "image")
    plan = guest_plan(manifest)
    assert plan.layers == GUEST_LAYERS
    assert "truncate" not in plan.settings["landlock"]["restricted_files"]
    assert plan.settings["landlock"]["restricted_network"] == []
    assert guest_plan(manifest, ["seccomp"]).layers == ("seccomp",)
    assert guest_plan(manifest, platform=True).digest != plan.digest
    assert guest_plan(manifest, serving=True).digest != plan.digest
    with pytest.raises(InputError, match="no such sandbox layer"):
        guest_plan(manifest, ["bubblewrap"])


# ---------------------------------------------------------------------- the command


def test_show_checks_an_image_and_tells_what_it_is(write: Write, tmp_path: Path) -> None:
    manifest = write(tmp_path / "image")
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "image"), "--json"])
    assert shown.exit_code == 0, shown.output
    fields = json.loads(shown.output)
    assert fields["digest"] == manifest.digest
    assert fields["cmdline"] == manifest.cmdline
    (tmp_path / "image" / "initrd").write_bytes(b"another")
    refused = CliRunner().invoke(app, ["show", str(tmp_path / "image"), "--json"])
    assert refused.exit_code == 2
    assert "initrd" in json.loads(refused.output)["what"]


def test_build_refuses_what_it_cannot_make_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    refused = CliRunner().invoke(app, ["build", "--out", str(tmp_path / "image"), "--json"])
    assert refused.exit_code == 6
    assert json.loads(refused.output)["remedy"]
    assert list(tmp_path.iterdir()) == []
