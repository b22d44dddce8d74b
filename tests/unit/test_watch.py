"""Which file systems the system's own news are enough for."""

from __future__ import annotations

from pathlib import Path

import pytest

from xandrouting.inventory.watch import shared_among

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/nas rw,relatime shared:2 - nfs4 nas:/models rw
31 30 0:41 / /mnt/nas/scratch rw - tmpfs tmpfs rw
32 22 0:42 / /home/me/my\\040share rw - cifs //host/share rw
33 22 0:43 / /mnt/s3 rw - fuse.rclone s3: rw
34 22 8:2 / /mnt/windows rw - fuseblk /dev/sdb1 rw
35 22 0:44 / /models rw master:1 - virtiofs models rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/", None),
        ("/home/me", None),
        ("/mnt/nas", "nfs4"),
        ("/mnt/nas/org/deep", "nfs4"),
        ("/mnt/nas/scratch/x", None),
        ("/mnt/nasty", None),
        ("/home/me/my share/x", "cifs"),
        ("/mnt/s3/x", "fuse.rclone"),
        ("/mnt/windows", None),
        ("/models", "virtiofs"),
    ],
)
def test_what_others_may_change(tmp_path: Path, folder: str, kind: str | None) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert shared_among([folder], mounts) == kind
    assert shared_among(["/home", folder], mounts) == kind


def test_where_no_mounts_are_told(tmp_path: Path) -> None:
    assert shared_among(["/"], tmp_path / "absent") is None
