"""Headers on disk: kept for the same file and the same readers, and for nobody else."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.gguf_writer import write_gguf
from tests.fakes.safetensors_writer import write_folder
from xandrouting.inventory import folders as folders_module
from xandrouting.inventory import headers as module
from xandrouting.inventory.gguf import GgufHeader, read_gguf
from xandrouting.inventory.header_store import MAX_ROW_BYTES, HeaderStore, version_of
from xandrouting.inventory.headers import HeaderCache, open_header_store
from xandrouting.inventory.model_file import Snapshot
from xandrouting.inventory.safetensors import read_folder
from xandrouting.inventory.scan import scan


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    write_gguf(root / "a.gguf", metadata={"tokenizer.chat_template": "{{ tools }} ü"})
    write_gguf(root / "moe.gguf", metadata={"llama.attention.head_count_kv": [1, 2]})
    write_folder(root / "smol", {"layer_types": ["full_attention"] * 4})
    (root / "bad.gguf").write_bytes(b"x")
    (write_folder(root / "bare") / "config.json").write_text("{")
    return root


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Journal what is read."""
    journal: list[str] = []

    def file(path: str) -> object:
        journal.append(Path(path).name)
        return read_gguf(path)

    def folder(path: Path) -> object:
        journal.append(path.name)
        return read_folder(path)

    monkeypatch.setattr(module, "read_gguf", file)
    monkeypatch.setattr(folders_module, "read_folder", folder)
    return journal


def look(root: Path, store: Path, version: str = "1") -> Snapshot:
    """Scan as a server that has just started."""
    opened = HeaderStore.open(store, version)
    try:
        return scan(root, HeaderCache(opened))
    finally:
        opened.close()


def test_what_has_not_changed_is_not_read_after_a_restart(
    root: Path, tmp_path: Path, read: list[str]
) -> None:
    store = tmp_path / "data" / "headers.db"
    first = look(root, store)
    assert sorted(read) == ["a.gguf", "bad.gguf", "bare", "moe.gguf", "smol"]
    assert [model.problem is None for model in first.models] == [True, False, False, True, True]
    read.clear()
    assert look(root, store) == first
    assert read == []
    assert store.stat().st_mode & 0o777 == 0o600


def test_what_has_changed_is_read_again(root: Path, tmp_path: Path, read: list[str]) -> None:
    store = tmp_path / "headers.db"
    look(root, store)
    read.clear()
    write_gguf(root / "a.gguf", metadata={"general.name": "new"})
    status = (root / "moe.gguf").stat()
    os.utime(root / "moe.gguf", ns=(status.st_atime_ns, status.st_mtime_ns))  # only its ctime
    (root / "smol" / "tokenizer.json").write_text("{ }")
    names = [model.header and model.header.name for model in look(root, store).models]
    assert "new" in names
    assert sorted(read) == ["a.gguf", "moe.gguf", "smol"]


def test_other_readers_read_anew(root: Path, tmp_path: Path, read: list[str]) -> None:
    store = tmp_path / "headers.db"
    look(root, store)
    read.clear()
    look(root, store, version="2")
    assert len(read) == 5
    read.clear()
    look(root, store, version="2")
    assert read == []


def test_the_version_is_that_of_the_readers(tmp_path: Path) -> None:
    version = version_of((module,))
    assert version == version_of((module,))
    assert version != version_of((module, folders_module))


def test_all_that_the_readers_use_is_in_their_version() -> None:
    counted = {reader.__name__ for reader in module._READERS}
    used = set()
    for reader in module._READERS:
        lines = Path(str(reader.__file__)).read_text().splitlines()
        used |= {line.split()[1] for line in lines if line.startswith("from xandrouting.")}
    assert used - counted == set()


@pytest.mark.parametrize("damage", [b"no database" * 100, b""])
def test_a_damaged_file_is_moved_aside(
    root: Path, tmp_path: Path, read: list[str], damage: bytes
) -> None:
    store = tmp_path / "headers.db"
    first = look(root, store)
    store.write_bytes(damage)
    assert look(root, store) == first
    assert (tmp_path / "headers.db.damaged").exists() == bool(damage)
    read.clear()
    assert look(root, store) == first
    assert read == []


@pytest.mark.parametrize("change", ["told = x'00'", "told = 'text'", "checksum = 0", "told = ''"])
def test_a_damaged_row_is_read_again(
    root: Path, tmp_path: Path, read: list[str], change: str
) -> None:
    store = tmp_path / "headers.db"
    first = look(root, store)
    with sqlite3.connect(store) as connection:
        connection.execute(f"UPDATE headers SET {change}")
    connection.close()
    read.clear()
    assert look(root, store) == first
    assert len(read) == 5


def test_what_decodes_to_nothing_is_read_again(root: Path, tmp_path: Path) -> None:
    store = HeaderStore.open(tmp_path / "headers.db", "1")
    cache = HeaderCache(store)
    status = (root / "a.gguf").stat()
    path = str(root / "a.gguf")
    header = cache.read(path, status)
    identity = module._ENCODE(
        (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    )
    store.keep(path, identity, b"\xc1")
    store.flush()
    assert HeaderCache(store).read(path, status) == header
    store.close()


def test_without_a_place_nothing_is_kept(
    root: Path, tmp_path: Path, read: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    first = look(root, tmp_path / "file" / "headers.db")
    assert look(root, tmp_path / "file" / "headers.db") == first
    assert len(read) == 10
    assert "headers kept in memory only" in caplog.text


def test_a_store_that_fails_later_is_done_without(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = HeaderStore.open(tmp_path / "headers.db", "1")
    cache = HeaderCache(store)
    first = scan(root, cache)
    with sqlite3.connect(tmp_path / "headers.db") as connection:
        connection.execute("DROP TABLE headers")
    connection.close()
    assert scan(root, HeaderCache(store)) == first
    assert caplog.text.count("headers file fails") == 1
    store.close()
    assert scan(root, HeaderCache(store)) == first


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "sentence_bert_config.json", "chat_template.jinja"]
)
def test_a_folder_that_could_not_be_read_is_read_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (root / "smol" / name).write_text("{}")
    cache = HeaderCache()
    expected = scan(root, HeaderCache())
    real = os.open

    def refuse(path: str | Path, *arguments: int) -> int:
        if Path(path).name == name:
            raise OSError(24, os.strerror(24))
        return real(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        problems = {model.id: model.problem for model in scan(root, cache).models}
        assert problems["/models/smol"] == f"{name}: unreadable: Too many open files"
    assert scan(root, cache) == expected


def test_what_is_too_large_is_not_kept(tmp_path: Path) -> None:
    store = HeaderStore.open(tmp_path / "headers.db", "1")
    store.keep("a", b"1", bytes(MAX_ROW_BYTES + 1))
    store.keep("b", b"1", bytes(MAX_ROW_BYTES))
    store.flush()
    assert store.find("a", b"1") is None
    assert store.find("b", b"1") == bytes(MAX_ROW_BYTES)
    assert store.find("b", b"2") is None
    store.close()


def test_impossible_numbers_are_not_kept_and_no_error(root: Path, tmp_path: Path) -> None:
    store = HeaderStore.open(tmp_path / "headers.db", "1")
    header = read_gguf(root / "a.gguf")
    status = (root / "a.gguf").stat()

    def absurd(path: str) -> GgufHeader:
        return replace(header, parameters=1 << 70)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_gguf", absurd)
        found = HeaderCache(store).read(str(root / "a.gguf"), status)
    assert isinstance(found, GgufHeader)
    assert found.parameters == 1 << 70
    assert HeaderCache(store).read(str(root / "a.gguf"), status) == header
    store.close()


def test_a_name_beside_that_is_no_text(root: Path, tmp_path: Path) -> None:
    strange = os.fsdecode(os.fsencode(root / "smol") + b"/\xff.txt")
    Path(strange).touch()
    first = look(root, tmp_path / "headers.db")
    assert look(root, tmp_path / "headers.db") == first


def test_a_kill_costs_little(root: Path, tmp_path: Path, read: list[str]) -> None:
    """What was read is written while the scan goes on."""
    for number in range(100):
        write_gguf(root / f"{number}.gguf")
    store = HeaderStore.open(tmp_path / "headers.db", "1")
    cache = HeaderCache(store)
    for path in sorted(root.glob("*.gguf")):
        cache.read(str(path), path.stat())
    read.clear()
    again = HeaderStore.open(tmp_path / "headers.db", "1")  # nothing was closed or flushed
    scan(root, HeaderCache(again))
    assert len(read) < 45
    again.close()
    store.close()


def test_the_server_opens_it_for_its_own_readers(root: Path, tmp_path: Path) -> None:
    store = open_header_store(tmp_path / "headers.db")
    first = scan(root, HeaderCache(store))
    store.close()
    again = open_header_store(tmp_path / "headers.db")
    assert scan(root, HeaderCache(again)) == first
    again.close()
