"""Main memory and a tree's share of it, from files a test lays out."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from xandrouting.core.model import DeviceReading, MemoryUse
from xandrouting.launch import host_memory

MIB = 1 << 20
MEMINFO = """\
MemTotal:       16777216 kB
MemFree:         1048576 kB
MemAvailable:    8388608 kB
Active(anon):       1024 kB
HugePages_Total:       0
"""
TOTAL, AVAILABLE = 16384 * MIB, 8192 * MIB
NO_LIMIT_V1 = 9223372036854771712
ROLLUP = """\
55c000000000-7ffe70bd9000 ---p 00000000 00:00 0                          [rollup]
Rss:                1684 kB
Pss:                1312 kB
Pss_Dirty:           112 kB
Pss_Anon:            200 kB
Pss_File:            812 kB
Pss_Shmem:           300 kB
Anonymous:           999 kB
"""


class Machine:
    """A root folder under which a machine tells of its memory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", MEMINFO)

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def groups(self, *lines: str) -> None:
        self.write("proc/self/cgroup", "\n".join(lines))

    def v2(
        self, group: str, limit: object, usage: int = 0, inactive: int = 0, active: int = 0
    ) -> None:
        folder = f"sys/fs/cgroup/{group}"
        self.write(f"{folder}/memory.max", limit)
        self.write(f"{folder}/memory.current", usage)
        stat = f"anon 5\ninactive_file {inactive}\nactive_file {active}\ntotal_inactive_file 1"
        self.write(f"{folder}/memory.stat", stat)

    def v1(self, group: str, limit: int, usage: int = 0, inactive: int = 0) -> None:
        folder = f"sys/fs/cgroup/memory/{group}"
        self.write(f"{folder}/memory.limit_in_bytes", limit)
        self.write(f"{folder}/memory.usage_in_bytes", usage)
        stat = f"inactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file 0"
        self.write(f"{folder}/memory.stat", stat)

    def read(self) -> tuple[int, int]:
        reading = host_memory.read(self.root)
        assert (reading.device, reading.name, reading.stale) == ("host", "host", False)
        return reading.capacity_bytes, reading.available_bytes


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_without_control_groups(machine: Machine) -> None:
    assert machine.read() == (TOTAL, AVAILABLE)


def test_a_group_without_a_limit(machine: Machine) -> None:
    machine.groups("0::/user.slice/us.scope")
    machine.v2("user.slice/us.scope", "max", usage=2 * TOTAL)
    assert machine.read() == (TOTAL, AVAILABLE)


def test_a_limit_bounds_what_there_is_and_what_is_left(machine: Machine) -> None:
    machine.groups("0::/user.slice/us.scope")
    machine.v2("user.slice/us.scope", 4096 * MIB, usage=3072 * MIB, inactive=512 * MIB)
    assert machine.read() == (4096 * MIB, 1536 * MIB)


def test_files_in_the_page_cache_are_not_taken(machine: Machine) -> None:
    """As MemAvailable has it: a mapped model in use is active, and could be dropped too."""
    machine.groups("0::/us")
    machine.v2("us", 4096 * MIB, usage=4096 * MIB, inactive=512 * MIB, active=1024 * MIB)
    assert machine.read() == (4096 * MIB, 1536 * MIB)


def test_the_tightest_of_nested_limits_counts_for_each(machine: Machine) -> None:
    """The inner group has the lower limit; the outer one, with others in it, less room."""
    machine.groups("0::/outer/middle/inner")
    machine.v2("outer", 6144 * MIB, usage=6000 * MIB)
    machine.v2("outer/middle", "max", usage=6000 * MIB)
    machine.v2("outer/middle/inner", 4096 * MIB, usage=1024 * MIB)
    assert machine.read() == (4096 * MIB, 144 * MIB)


def test_a_group_over_its_limit_has_nothing_left(machine: Machine) -> None:
    machine.groups("0::/us")
    machine.v2("us", 1024 * MIB, usage=1025 * MIB)
    assert machine.read() == (1024 * MIB, 0)


def test_the_machine_may_have_less_than_the_limit_leaves(machine: Machine) -> None:
    machine.groups("0::/us")
    machine.v2("us", 12288 * MIB, usage=0)
    assert machine.read() == (12288 * MIB, AVAILABLE)


def test_a_limit_beyond_the_machine_is_none(machine: Machine) -> None:
    machine.groups("0::/us")
    machine.v2("us", 2 * TOTAL, usage=2 * TOTAL)
    assert machine.read() == (TOTAL, AVAILABLE)


@pytest.mark.parametrize("line", ["0::/", "0::/docker/0a1b2c", "0::/../../other"])
def test_a_container_sees_its_own_group_as_the_root(machine: Machine, line: str) -> None:
    machine.groups(line)
    machine.v2("", 2048 * MIB, usage=1024 * MIB)
    assert machine.read() == (2048 * MIB, 1024 * MIB)


def test_an_older_host_limits_in_its_memory_hierarchy(machine: Machine) -> None:
    machine.groups("4:memory:/docker/0a1b", "3:cpu,cpuacct:/docker/0a1b", "0::/")
    machine.v1("", NO_LIMIT_V1, usage=2 * TOTAL)
    machine.v1("docker/0a1b", 2048 * MIB, usage=1536 * MIB, inactive=512 * MIB)
    assert machine.read() == (2048 * MIB, 1024 * MIB)


def test_an_older_hosts_container(machine: Machine) -> None:
    machine.groups("9:hugetlb,memory:/docker/0a1b", "0::/system.slice/docker.service")
    machine.v1("", 2048 * MIB, usage=1024 * MIB)
    assert machine.read() == (2048 * MIB, 1024 * MIB)


def test_a_hierarchy_without_memory_does_not_limit_it(machine: Machine) -> None:
    machine.groups("3:cpu,cpuacct:/us")
    machine.v1("us", 2048 * MIB)
    machine.v2("us", 2048 * MIB)
    assert machine.read() == (TOTAL, AVAILABLE)


def test_without_proc_psutil_tells(tmp_path: Path) -> None:
    reading = host_memory.read(tmp_path)
    assert reading.capacity_bytes == psutil.virtual_memory().total
    assert 0 < reading.available_bytes <= reading.capacity_bytes


def test_this_machine_tells() -> None:
    reading = host_memory.read()
    assert isinstance(reading, DeviceReading)
    assert 0 < reading.available_bytes <= reading.capacity_bytes <= psutil.virtual_memory().total


def test_a_trees_share_is_added_up(machine: Machine) -> None:
    machine.write("proc/11/smaps_rollup", ROLLUP)
    machine.write("proc/12/smaps_rollup", ROLLUP.replace("1312", "2312"))
    use = host_memory.Meter(machine.root).measure([11, 12])
    assert use == MemoryUse(host_bytes=3624 * 1024, private_bytes=1000 * 1024)


def test_an_older_kernel_does_not_divide_the_private_part(machine: Machine) -> None:
    lines = [line for line in ROLLUP.splitlines() if "Pss_" not in line]
    machine.write("proc/11/smaps_rollup", "\n".join(lines))
    use = host_memory.Meter(machine.root).measure([11])
    assert use == MemoryUse(host_bytes=1312 * 1024, private_bytes=999 * 1024)


def test_a_process_that_has_ended_does_not_count(machine: Machine) -> None:
    machine.write("proc/11/smaps_rollup", ROLLUP)
    ended = 2**30  # no pid is so large
    assert host_memory.Meter(machine.root).measure([ended, 11]).host_bytes == 1312 * 1024
    assert host_memory.Meter(machine.root).measure([ended]) == MemoryUse()
    assert host_memory.Meter(machine.root).measure([]) == MemoryUse()


@pytest.mark.parametrize("error", [PermissionError, ProcessLookupError])
def test_a_tree_is_told_whole_or_not_at_all(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    machine.write("proc/11/smaps_rollup", ROLLUP)
    machine.write("proc/12/smaps_rollup", ROLLUP)
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if "12" in path.parts:
            raise error
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    use = host_memory.Meter(machine.root).measure([11, 12])
    assert use.host_bytes == (None if error is PermissionError else 1312 * 1024)


def test_where_the_kernel_has_no_rollup_psutil_tells(tmp_path: Path) -> None:
    use = host_memory.Meter(tmp_path).measure([os.getpid()])
    real = host_memory.Meter().measure([os.getpid()])
    assert use.host_bytes == pytest.approx(real.host_bytes, rel=0.1)
    assert use.private_bytes == pytest.approx(real.private_bytes, rel=0.1)


def test_anonymous_memory_is_always_fresh(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "KEPT_FOR_COSTS", 1e9)
    meter = host_memory.Meter(machine.root)
    machine.write("proc/11/smaps_rollup", ROLLUP)
    before = meter.measure([11])
    assert before.private_bytes is not None
    machine.write("proc/11/status", "Name:\tengine\nRssAnon:\t 700 kB\n")  # 500 more
    now = meter.measure([11])
    assert now.private_bytes == before.private_bytes + 500 * 1024
    assert now.host_bytes == 1812 * 1024
    (machine.root / "proc/11/status").unlink()  # it has ended
    assert meter.measure([11]) == MemoryUse()


@pytest.mark.parametrize(("kept_for_costs", "then"), [(1e9, 1312), (0, 9312)])
def test_a_figure_is_kept_in_proportion_to_its_cost(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, kept_for_costs: float, then: int
) -> None:
    monkeypatch.setattr(host_memory, "KEPT_FOR_COSTS", kept_for_costs)
    meter = host_memory.Meter(machine.root)
    machine.write("proc/11/smaps_rollup", ROLLUP)
    machine.write("proc/11/status", "Name:\tengine\nVmRSS:\t 2000 kB\n")
    assert meter.measure([11]).host_bytes == 1312 * 1024
    machine.write("proc/11/smaps_rollup", ROLLUP.replace("1312", "9312"))
    assert meter.measure([11]).host_bytes == then * 1024


def test_the_kernels_count_of_those_it_killed(machine: Machine, tmp_path: Path) -> None:
    assert host_memory.oom_kills(machine.root) is None
    machine.write("proc/vmstat", "nr_free_pages 5\noom_kill 0\nother 3")
    assert host_memory.oom_kills(machine.root) == 0
    machine.write("proc/vmstat", "nr_free_pages 5\ndrop_oom_kill 9\noom_kill 12\nother 3")
    assert host_memory.oom_kills(machine.root) == 12
