"""The guard: one small process between the gateway and each engine.

Run as `python -I -S guard.py --grace-s F [--orders] [--scratch DIR] -- argv...`; standard
library only. It makes the engine's whole process tree end when told to, when the engine ends,
and when the gateway is gone, however that died.

stdin takes commands: `stop <grace_s>`, SIGTERM now and SIGKILL after so many seconds; a later,
shorter grace hurries. `tell <line>` hands a line on to the engine's stdin, which is a pipe with
`--orders` and empty without. EOF means that the gateway is gone. stdout tells the gateway `pid N`
once the engine's program runs, or `failed <reason>`, and at the very end `exited <status>`,
negative for a signal. stderr is the engine's stdout and stderr.

A killed engine leaves its shared memory behind: a file of /dev/shm that a process of the tree was
seen to map, and that no living process maps any more, is removed before `exited` is told, and so
is DIR with all that is in it.

Orphans of the engine become the guard's children (a "subreaper"), so leaving the process group
or the session is no escape. Without Linux's `/proc` and `prctl` only the engine's process group
is ended.
"""

from __future__ import annotations

import os
import select
import stat
import sys
import time

TYPE_CHECKING = False  # as `typing` has it, without importing that
if TYPE_CHECKING:
    import signal
    from collections.abc import Iterable
else:
    import _signal as signal  # the same without its enums, which take 6 ms of the guard's 25

PROC = "/proc"
COMMANDS, CONTROL, LOG = 0, 1, 2  # this process's stdin, stdout, stderr
SHORT_GRACE_S = 0.5  # nobody waits for what is left: the gateway or the engine is gone
FIRST_PAUSE_S, LAST_PAUSE_S = 0.01, 0.2  # between two looks at a tree that is ending
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the system's own
LOOK_PAUSE_S = 1.0  # between two looks at a tree that lives; inotify makes the end 10 ms later
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
IGNORED_HERE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a terminal's Ctrl-C is not for us
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


class Process:
    """One row of the process table. `start` (ticks since boot) tells two users of a pid apart."""

    __slots__ = ("parent", "running", "start")

    def __init__(self, parent: int, start: int, running: bool) -> None:
        self.parent = parent
        self.start = start
        self.running = running  # False: a zombie, waiting to be reaped


def look(pid: int) -> Process | None:
    """Read one row; None when there is no such process to see, or no `/proc`."""
    try:
        with open(f"{PROC}/{pid}/stat", "rb") as file:  # noqa: PTH123 - pathlib starts slowly
            # The name before the last bracket may hold anything, brackets and blanks included.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return Process(int(fields[1]), int(fields[19]), fields[0] not in (b"Z", b"X"))


def processes() -> dict[int, Process]:
    """Read the process table; empty where there is no `/proc`."""
    try:
        pids = [int(name) for name in os.listdir(PROC) if name.isdigit()]  # noqa: PTH208
    except FileNotFoundError:
        return {}
    return {pid: process for pid in pids if (process := look(pid)) is not None}


def descendants(table: dict[int, Process], root: int) -> list[int]:
    """List the children of `root` and theirs, without `root`."""
    children: dict[int, list[int]] = {}
    for pid, process in table.items():
        children.setdefault(process.parent, []).append(pid)
    found = list(children.get(root, ()))
    for pid in found:  # grows while it is walked
        found.extend(children.get(pid, ()))
    return found


def send(pid: int, start: int, number: int) -> None:
    """Signal the process that began at `start`; nobody, if `pid` is another's by now.

    The pidfd pins the process before its start time is read, so there is no moment between
    the look and the signal in which the pid could change hands.
    """
    pinned = None
    try:
        pinned = _pin(pid)
        process = look(pid)
        if process is None or process.start != start:
            return
        if pinned is None:
            os.kill(pid, number)
        else:
            signal.pidfd_send_signal(pinned, number)
    except (ProcessLookupError, PermissionError):
        pass  # it ended meanwhile, or became another user's
    finally:
        if pinned is not None:
            os.close(pinned)


def _pin(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return None  # an old kernel, or a sandbox that does not know the call


def shared_files() -> list[tuple[str, int]]:
    """List this user's files in /dev/shm with their inodes; none where there is no such folder."""
    try:
        paths = [f"{SHARED_MEMORY}/{name}" for name in os.listdir(SHARED_MEMORY)]  # noqa: PTH208
    except OSError:
        return []
    found = []
    for path in paths:
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid():
            found.append((path, status.st_ino))
    return found


def mapped(pids: Iterable[int]) -> set[int]:
    """Return the inodes of /dev/shm that one of these processes maps, if it lets us see.

    Not the names: what `sem_open` made is shown by the name it had before it was renamed.
    """
    device = os.stat(SHARED_MEMORY).st_dev  # noqa: PTH116 - pathlib starts slowly
    name = b"%02x:%02x" % (os.major(device), os.minor(device))
    found = set()
    for pid in pids:
        try:
            with open(f"{PROC}/{pid}/maps", "rb") as file:  # noqa: PTH123
                lines = file.read().split(b"\n")
        except OSError:
            continue  # it is gone, or another user's
        for line in lines:
            if name in line:
                fields = line.split(None, 5)  # a path follows, which may hold anything
                if fields[3] == name:
                    found.add(int(fields[4]))
    return found


class Segments:
    """The shared memory that a tree was seen to map.

    A process that was killed maps nothing any more, so they are looked at while all live: when
    there are new files in /dev/shm, and before a signal. Where this user has no file there, as
    beside llama.cpp alone, a look is one listing of an empty folder.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._there: set[int] = set()  # all of this user's files, whoever maps them
        self._settled: set[int] = set()  # those that were there twice: who made them maps them

    def news(self) -> bool:
        """Whether there are files that were not there at the last call but one."""
        there = {inode for _, inode in shared_files()}
        fresh = there - self._settled
        self._settled, self._there = self._there & there, there
        return bool(fresh)

    def look(self, pids: Iterable[int]) -> None:
        """Learn what these processes map."""
        if any(inode not in self._seen for _, inode in shared_files()):
            self._seen |= mapped(pids)

    def remove(self) -> None:
        """Remove those that no process maps; for when the tree is gone."""
        left = [(path, inode) for path, inode in shared_files() if inode in self._seen]
        kept = mapped(processes()) if left else set()
        for path, inode in left:
            if inode not in kept:
                try:
                    os.unlink(path)  # noqa: PTH108
                except FileNotFoundError:
                    pass  # whoever made it did


class Tree:
    """The engine and everything that came of it."""

    def __init__(self, engine: int, grace_s: float) -> None:
        self.status: int | None = None
        self.segments = Segments()
        self._engine = engine
        self._short_grace_s = min(grace_s, SHORT_GRACE_S)
        self._deadline: float | None = None  # None: nobody asked it to end
        self._pause_s = FIRST_PAUSE_S
        self._asked: set[tuple[int, int]] = set()  # who had their one SIGTERM
        self._has_table = look(os.getpid()) is not None

    def end(self, grace_s: float | None = None) -> None:
        """End everything within the grace; None is the short one. Never later than asked before."""
        grace_s = self._short_grace_s if grace_s is None else grace_s
        deadline = time.monotonic() + grace_s
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        self._pause_s = FIRST_PAUSE_S

    def reap(self) -> bool:
        """Collect the dead; return whether any child is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            self._pause_s = FIRST_PAUSE_S  # its children, if any, are ours from now on
            if pid == self._engine:
                self.status = os.waitstatus_to_exitcode(status)
                self._leader_gone()

    def _leader_gone(self) -> None:
        self.end()
        if not self._has_table:
            self._signal_group(signal.SIGKILL)  # the last moment the group is surely the engine's

    def press(self) -> None:
        """Signal what is still there, if the tree is to end: SIGTERM once, then SIGKILL."""
        if self._deadline is None:
            return
        kill = time.monotonic() >= self._deadline
        if not self._has_table:
            self._press_group(kill)
            return
        first = not self._asked
        leader = look(self._engine) if first and not kill else None
        if leader is not None:
            self.segments.look([self._engine])
            self._ask(self._engine, leader.start)  # at once: the table takes milliseconds to read
        table = processes()
        below = descendants(table, os.getpid())
        if first or kill:
            self.segments.look(below)
        for pid in below:
            start = table[pid].start
            if kill:
                send(pid, start, signal.SIGKILL)
            else:
                self._ask(pid, start)

    def look(self) -> None:
        """See what the tree maps of shared memory that is new."""
        if self.segments.news():
            self.segments.look(descendants(processes(), os.getpid()))

    def _ask(self, pid: int, start: int) -> None:
        if (pid, start) not in self._asked:
            self._asked.add((pid, start))
            send(pid, start, signal.SIGTERM)

    def _press_group(self, kill: bool) -> None:
        name = (self._engine, 0)
        if self.status is None and (kill or name not in self._asked):
            self._asked.add(name)
            self._signal_group(signal.SIGKILL if kill else signal.SIGTERM)

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self._engine, number)
        except (ProcessLookupError, PermissionError):
            pass  # nobody is left in it

    def pause_s(self) -> float | None:
        """How long to wait for news before looking again; None: for ever."""
        if self._deadline is None:
            return LOOK_PAUSE_S if self._has_table else None
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, LAST_PAUSE_S)
        left_s = self._deadline - time.monotonic()
        return min(pause_s, left_s) if left_s > 0 else pause_s


class Commands:
    """The gateway's wishes, as they come on stdin."""

    def __init__(self, orders: int | None) -> None:
        self._rest = b""
        self._orders = orders  # the other end of the engine's stdin

    def read(self, tree: Tree) -> bool:
        """Obey what has come; return False when the gateway is gone."""
        data = os.read(COMMANDS, 4096)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            word, _, rest = line.partition(b" ")
            if word == b"stop":
                tree.end(float(rest))
            elif word == b"tell":
                self._tell(rest + b"\n")
        if not data:
            tree.end()
        return bool(data)

    def _tell(self, order: bytes) -> None:
        if self._orders is not None:
            try:
                os.write(self._orders, order)
            except (BrokenPipeError, BlockingIOError):
                pass  # it is ending, or has not read 64 KiB of orders: it hangs


def watch(tree: Tree, wakeup: int, orders: int | None) -> None:
    """Wait for commands and deaths until the whole tree is gone."""
    commands = Commands(orders)
    sources = [COMMANDS, wakeup]
    while tree.reap():
        tree.press()
        tree.look()
        readable = select.select(sources, [], [], tree.pause_s())[0]
        if wakeup in readable:
            os.read(wakeup, 4096)
        if COMMANDS in readable and not commands.read(tree):
            sources.remove(COMMANDS)


def wake_on_child() -> int:
    """Return a descriptor that becomes readable when a child ends."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)  # else no wakeup is written
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    return readable


def prctl(option: int, value: int) -> None:
    """Set a Linux process attribute; elsewhere do nothing."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def spawn(argv: list[str], orders: int) -> int:
    """Start the engine in a session of its own and return its pid once its program runs.

    `orders` becomes its stdin.

    Raises:
        OSError: no such program, not executable, or no process could be made.
    """
    readable, writable = os.pipe()  # closed by the exec, so EOF is success
    guard = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(argv, guard, orders, writable)
    os.close(writable)
    reason = os.read(readable, 16)
    os.close(readable)
    if reason:
        os.waitpid(pid, 0)
        raise OSError(int(reason), os.strerror(int(reason)))
    return pid


def _become(argv: list[str], guard: int, orders: int, failure: int) -> None:
    """Turn this forked process into the engine. Never returns."""
    try:
        os.setsid()
        os.dup2(orders, COMMANDS)
        os.dup2(LOG, CONTROL)
        for number in (*IGNORED_HERE, *IGNORED_BY_PYTHON):
            signal.signal(number, signal.SIG_DFL)  # what is ignored stays ignored over an exec
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == guard:  # else it died before the line above
            os.execvp(argv[0], argv)  # noqa: S606
    except OSError as error:
        os.write(failure, str(error.errno).encode())
    finally:
        os._exit(127)


def say(line: str) -> None:
    """Tell the gateway, if it is still there."""
    try:
        os.write(CONTROL, line.encode() + b"\n")
    except BrokenPipeError:
        pass  # it has gone; the engine is ended all the same


def discard(folder: str) -> None:
    """Remove a folder with all that is in it, as far as that can be done."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    discard(entry.path)
                else:
                    os.unlink(entry.path)  # noqa: PTH108 - pathlib starts slowly
        os.rmdir(folder)  # noqa: PTH106
    except OSError:
        pass  # it is gone, or somebody else's by now


def be_as_any_other() -> None:
    """Take turns on a core as others do: the gateway may not (see `turns`)."""
    if hasattr(os, "SCHED_OTHER"):  # Linux
        try:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        except OSError:
            pass  # a sandbox that does not allow it


def main(arguments: list[str]) -> int:
    """Run one engine from its start to the end of its tree."""
    split = arguments.index("--")
    options, argv = arguments[:split], arguments[split + 1 :]
    grace_s = float(options[1])
    scratch = options[options.index("--scratch") + 1] if "--scratch" in options else ""
    orders = None
    if "--orders" in options:
        stdin, orders = os.pipe()
        os.set_blocking(orders, False)
    else:
        stdin = os.open(os.devnull, os.O_RDONLY)
    for number in IGNORED_HERE:
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    be_as_any_other()
    wakeup = wake_on_child()
    try:
        engine = spawn(argv, stdin)
    except OSError as error:
        discard(scratch)
        say(f"failed {error.strerror}")
        return 127
    os.close(stdin)
    say(f"pid {engine}")
    tree = Tree(engine, grace_s)
    watch(tree, wakeup, orders)
    tree.segments.remove()
    discard(scratch)
    say(f"exited {tree.status}")
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # the gateway waits for this end, and there is nothing to tidy
