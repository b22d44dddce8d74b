"""Figures on disk: whole again after a restart, and never in the way."""

import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from xandrouting.core.figures import FigureKey
from xandrouting.core.model import Figure, LoadOptions
from xandrouting.pool import figure_store
from xandrouting.pool.figure_store import FigureStore

OPTIONS = LoadOptions(n_ctx=2048, n_gpu_layers=0, gpu_memory_utilization=0.5, embeddings=True)
KEY = FigureKey("qwen@7", "cuda:0", 1, OPTIONS)
CPU = FigureKey("qwen@7", "cpu", 0, LoadOptions())
FIGURE = Figure(host_bytes=1 << 40, device_bytes=0, load_s=2.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "figures.db"


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged, all of which must be warnings."""
    assert {record.levelname for record in caplog.records} <= {"WARNING"}
    return [record.getMessage() for record in caplog.records]


def saved(path: Path) -> dict[FigureKey, Figure]:
    with closing(FigureStore.open(path)) as store:
        return dict(store.load().items())


def save(path: Path, key: FigureKey = KEY, figure: Figure = FIGURE) -> None:
    with closing(FigureStore.open(path)) as store:
        store.save(*key, figure)


def execute(path: Path, sql: str, *values: object) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(sql, values).fetchall()


def test_figures_survive(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert saved(path) == {}
    save(path)
    save(path, CPU)
    assert saved(path) == {KEY: FIGURE, CPU: FIGURE}
    assert warned(caplog) == []


def test_a_later_figure_takes_the_place_of_the_earlier(path: Path) -> None:
    save(path)
    save(path, CPU)
    save(path, KEY, Figure(1, 2, 3.0))
    with closing(FigureStore.open(path)) as store:
        figures = store.load()
    assert figures.items() == [(CPU, FIGURE), (KEY, Figure(1, 2, 3.0))]  # the last load last
    assert figures.load_s("qwen@7", "cuda:0") == 3.0


def test_only_this_user_may_read_it(path: Path) -> None:
    with closing(FigureStore.open(path)) as store:
        store.save(*KEY, FIGURE)
        files = sorted(path.parent.iterdir())
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        assert [file.name for file in files] == ["figures.db", "figures.db-shm", "figures.db-wal"]


def test_nothing_is_kept_without_a_name(path: Path) -> None:
    save(path, KEY._replace(learned_as=""))
    assert saved(path) == {}


def test_it_forgets_the_oldest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcd":
        save(path, KEY._replace(learned_as=name))
    monkeypatch.setattr(figure_store, "MAX_FIGURES", 2)
    assert [key.learned_as for key in saved(path)] == ["c", "d"]
    assert execute(path, "SELECT learned_as FROM figures ORDER BY learned_as") == [("c",), ("d",)]


def test_options_are_stored_as_canonical_json(path: Path) -> None:
    save(path)
    assert execute(path, "SELECT options FROM figures") == [
        ('{"embeddings":true,"gpu_memory_utilization":0.5,"n_ctx":2048,"n_gpu_layers":0}',)
    ]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("options", '{"n_ctx":2048,"rope_scale":2}'),
        ("options", '{"n_ctx":"2048"}'),
        ("options", "[]"),
        ("options", "{"),
        ("options", '{"n_ctx":' + "[" * 100_000),
        ("options", b"\xff"),
        ("placement_cards", "many"),
        ("host_bytes", -1),
        ("device_bytes", "few"),
        ("device_bytes", 1.5),
        ("load_s", float("inf")),
        ("load_s", -1.0),
    ],
)
def test_a_row_of_another_version_is_left_out(
    path: Path, caplog: pytest.LogCaptureFixture, column: str, value: object
) -> None:
    save(path)
    save(path, CPU)
    execute(path, f"UPDATE figures SET {column} = ? WHERE device = 'cuda:0'", value)
    assert saved(path) == {CPU: FIGURE}
    assert warned(caplog) == []


def damage_head(path: Path) -> None:
    path.write_bytes(b"not a database " * 1000)


def damage_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def other_version(path: Path) -> None:
    execute(path, "PRAGMA user_version = 99")


def other_columns(path: Path) -> None:
    execute(path, "ALTER TABLE figures ADD COLUMN colour TEXT")


def name_in_no_encoding(path: Path) -> None:
    other_columns(path)
    path.write_bytes(path.read_bytes().replace(b"colour", b"\xff\xfelour"))


def other_program(path: Path) -> None:
    execute(path, "PRAGMA user_version = 0")


@pytest.mark.parametrize(
    "spoil",
    [
        damage_head,
        damage_middle,
        cut,
        other_version,
        other_columns,
        name_in_no_encoding,
        other_program,
    ],
)
def test_a_file_that_is_none_of_ours_is_moved_aside(
    path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
) -> None:
    save(path)
    spoil(path)
    spoiled = path.read_bytes()
    with closing(FigureStore.open(path)) as store:
        assert store.load().items() == []
        store.save(*CPU, FIGURE)
    assert saved(path) == {CPU: FIGURE}
    assert path.with_name("figures.db.damaged").read_bytes() == spoiled
    assert len(warned(caplog)) == 1


def test_a_file_that_another_gateway_has_open_is_moved_with_its_log(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA user_version = 99")  # is in the log only, while `other` is open
        save(path, CPU)
        assert saved(path) == {CPU: FIGURE}
        assert len(warned(caplog)) == 1
        assert path.with_name("figures.db.damaged-wal").exists()


def test_it_goes_on_in_memory_where_there_can_be_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with closing(FigureStore.open(tmp_path / "file" / "figures.db")) as store:
        store.save(*KEY, FIGURE)
        assert store.load().items() == []
    (tmp_path / "figures.db").mkdir()
    with closing(FigureStore.open(tmp_path / "figures.db")) as store:
        store.save(*KEY, FIGURE)
    assert len(warned(caplog)) == 2


def test_writes_that_fail_warn_once_and_are_tried_again(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(FigureStore.open(path)) as store:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            store.save(*KEY, FIGURE)
            store.save(*KEY, FIGURE)
            assert store.load().items() == []
        assert len(warned(caplog)) == 1
        store.save(*CPU, FIGURE)
        assert store.load().items() == [(CPU, FIGURE)]


def test_a_full_disk(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(FigureStore.open(path)) as store:
        store._connection.execute("PRAGMA max_page_count = 1")
        for n in range(200):
            store.save(*KEY._replace(learned_as=f"{n:0200d}"), FIGURE)
        assert len(store.load().items()) < 200
    [warning] = warned(caplog)
    assert "full" in warning


def test_closed_it_keeps_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FigureStore.open(path)
    store.close()
    store.close()
    store.save(*KEY, FIGURE)
    assert store.load().items() == []
    assert warned(caplog) == []
