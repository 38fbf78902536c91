"""The first root folder: it loads modules, opens the verified root, and hands over to it.

Nothing of it remains when the enclave runs. Its script is short on purpose: whoever approves
an image can read all of it. Anything unexpected ends the machine.
"""

from __future__ import annotations

from typing import Final

from cenacle.enclave.vm.kernel import module_order
from cenacle.enclave.vm.tree import Tree

__all__ = ["GUEST_COMMAND", "INIT", "PACKAGES", "initrd_tree"]

PACKAGES: Final = ("busybox-static", "dmsetup")
GUEST_COMMAND: Final = (
    "/usr/bin/python3.11 -s -P -B -W ignore -X frozen_modules=on -m cenacle.enclave.vm.guest"
)
"""The first process of the verified root."""

_APPLETS: Final = ("cat", "insmod", "mkdir", "mount", "poweroff", "sh", "sleep", "switch_root")
_LIBRARIES: Final = (
    "libc.so.6",
    "libdevmapper.so.1.02.1",
    "libm.so.6",
    "libpcre2-8.so.0",
    "libpthread.so.0",
    "libselinux.so.1",
    "libudev.so.1",
)
_LIBRARY_FOLDER: Final = "usr/lib/x86_64-linux-gnu"
_LOADER: Final = "usr/lib64/ld-linux-x86-64.so.2"

INIT: Final = f"""\
#!/bin/sh
# Read the root hash from the measured command line, and accept only the root it vouches for.
export PATH=/bin
end() {{
    echo "cenacle: $1" >/dev/console
    poweroff -f
    sleep 60
}}
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in $(cat /modules/order); do
    insmod "/modules/$module" || end "module $module cannot be loaded"
done
table=
for word in $(cat /proc/cmdline); do
    case "$word" in
    cenacle.verity=*)
        [ -z "$table" ] || end "the command line names two roots"
        table=${{word#cenacle.verity=}}
        ;;
    esac
done
IFS=, read -r version data hash blocks start algorithm root salt rest <<END
$table
END
[ "$version,$data,$hash,$algorithm,$rest" = "1,4096,4096,sha256," ] ||
    end "the command line names no verified root"
tries=0
while [ ! -b /dev/vda ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || end "there is no disk"
    sleep 0.1
done
tree="$data $hash $blocks $start $algorithm $root $salt"
dmsetup create --readonly --noudevsync --noudevrules root --table \\
    "0 $((blocks * 8)) verity $version /dev/vda /dev/vda $tree 1 panic_on_corruption" ||
    end "the root cannot be verified"
mount -t erofs -o ro,nodev,nosuid /dev/dm-0 /root || end "the root cannot be mounted"
mount --move /dev /root/dev
mount --move /proc /root/proc
mount --move /sys /root/sys
exec switch_root /root {GUEST_COMMAND}
end "the root has no enclave"
"""


def initrd_tree(packages: Tree, modules: Tree, release: str) -> Tree:
    """The files of the first root folder.

    Args:
        packages: the unpacked :data:`PACKAGES` with what they depend on.
        modules: the unpacked kernel package.
        release: of the kernel.

    Raises:
        InputError: one of the trees lacks a file.
    """
    tree = Tree(merged=False)
    busybox = packages.nodes[packages.resolve("bin/busybox")]
    tree.add_file("bin/busybox", busybox.content, 0o755)
    for name in _APPLETS:
        tree.add_link(f"bin/{name}", "busybox")
    tree.add_file("bin/dmsetup", packages.nodes[packages.resolve("sbin/dmsetup")].content, 0o755)
    for name in _LIBRARIES:
        found = packages.resolve(f"{_LIBRARY_FOLDER}/{name}")
        tree.add_file(f"lib/x86_64-linux-gnu/{name}", packages.nodes[found].content, 0o755)
    loader = packages.nodes[packages.resolve(_LOADER)]
    tree.add_file("lib64/ld-linux-x86-64.so.2", loader.content, 0o755)
    order = module_order(modules, release)
    for name, content in order:
        tree.add_file(f"modules/{name}.ko", content)
    tree.add_file("modules/order", "".join(f"{name}.ko\n" for name, _ in order).encode())
    tree.add_file("init", INIT.encode(), 0o755)
    for name in ("dev", "proc", "root", "sys"):
        tree.add_folder(name)
    return tree
