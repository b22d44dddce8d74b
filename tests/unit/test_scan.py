"""What a scan finds under a root, and what it leaves alone."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.fakes.gguf_writer import TENSORS, write_gguf
from tests.fakes.safetensors_writer import write_folder
from xandrouting.inventory import headers as headers_module
from xandrouting.inventory.gguf import UnreadableGguf, read_gguf
from xandrouting.inventory.model_file import ModelFile, Snapshot, shown
from xandrouting.inventory.roots import Root
from xandrouting.inventory.scan import HeaderCache, recheck, scan, scan_all


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "outside" / "secret.gguf").parent


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Journal the files whose header is read."""
    journal: list[str] = []

    def read(path: str) -> object:
        journal.append(path)
        return read_gguf(path)

    monkeypatch.setattr(headers_module, "read_gguf", read)
    return journal


def look(root: Path) -> Snapshot:
    return scan(root, HeaderCache())


def ids(root: Path) -> list[str]:
    return [model.id for model in look(root).models]


def only(root: Path) -> ModelFile:
    [model] = look(root).models
    return model


def test_a_model_in_a_folder(root: Path) -> None:
    file = write_gguf(root / "org" / "tiny" / "Tiny.Q4_1.gguf", metadata={"general.file_type": 3})
    status = file.stat()
    model = only(root)
    assert model.id == "/models/org/tiny/Tiny.Q4_1.gguf"
    assert (model.relative, model.folder) == ("org/tiny/Tiny.Q4_1.gguf", "org/tiny")
    assert (model.stem, model.quantization) == ("Tiny.Q4_1", "Q4_1")
    assert model.path == file
    assert [(part.path, part.size_bytes) for part in model.files] == [(file, status.st_size)]
    assert model.size_bytes == status.st_size
    assert model.header is not None
    assert model.problem is model.mmproj is None
    assert model.modified == status.st_mtime
    assert model.revision == f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def test_models_come_in_the_order_of_their_ids(root: Path) -> None:
    for name in ("b/x.gguf", "a.gguf", "B.GGUF", "folder.gguf/c.gguf", "notes.txt"):
        write_gguf(root / name)
    assert ids(root) == [
        "/models/B.GGUF",
        "/models/a.gguf",
        "/models/b/x.gguf",
        "/models/folder.gguf/c.gguf",
    ]


def test_no_root_no_models(root: Path) -> None:
    assert look(root / "absent") == Snapshot()
    assert look(root) == Snapshot()
    assert look(write_gguf(root / "file.gguf")) == Snapshot()


def test_a_root_that_is_itself_a_symlink(root: Path, tmp_path: Path) -> None:
    file = write_gguf(root / "tiny.gguf")
    link = tmp_path / "link"
    link.symlink_to(root)
    assert only(link).path == file


def test_what_is_hidden_is_skipped(root: Path) -> None:
    for name in (".incoming/job/x.gguf", ".cache/y.gguf", "a/.z.gguf"):
        write_gguf(root / name)
    (root / "link.gguf").symlink_to(root / ".incoming" / "job" / "x.gguf")
    assert look(root) == Snapshot()


def test_names_no_request_may_use_are_skipped(root: Path) -> None:
    for name in ("line\nbreak.gguf", "back\\slash.gguf", os.fsdecode(b"latin-\xe9.gguf")):
        write_gguf(root / name)
    write_gguf(root / "déjà vu 模型.gguf")
    assert ids(root) == ["/models/déjà vu 模型.gguf"]


def test_damaged_files_are_listed_with_why(root: Path) -> None:
    (root / "a-Q8_0.gguf").touch()
    size = write_gguf(root / "f.gguf").stat().st_size
    write_gguf(root / "b.gguf", truncate=-1)
    write_gguf(root / "c.gguf", arch=None)
    write_gguf(root / "d.gguf", metadata={"general.type": "adapter"})
    write_gguf(root / "e.gguf", metadata={"split.count": 3, "split.no": 1})
    write_gguf(root / "f.gguf", metadata={"split.count": 0, "split.no": 0})  # merged
    os.mkfifo(root / "g.gguf")
    models = look(root).models
    assert [model.problem for model in models] == [
        "empty file",
        f"cut short: the header says {size} bytes, the file has {size - 1}",
        "header damaged: it names no architecture",
        "an adapter, not a model of its own",
        "its header says it is part 2 of 3",
        None,
    ]
    assert models[0].quantization == "Q8_0"


def split(root: Path, *numbers: int, total: int = 3) -> None:
    for no in numbers:
        write_gguf(
            root / "big" / f"Big-Q4_1-{no:05d}-of-{total:05d}.gguf",
            arch="llama" if no == 1 else None,
            metadata={"split.no": no - 1, "split.count": total},
        )


def test_split_parts_are_one_model(root: Path) -> None:
    split(root, 1, 2, 3)
    model = only(root)
    assert model.id == "/models/big/Big-Q4_1-00001-of-00003.gguf"
    assert (model.stem, model.problem) == ("Big-Q4_1", None)
    assert [part.relative[-19:-5] for part in model.files] == [
        "00001-of-00003",
        "00002-of-00003",
        "00003-of-00003",
    ]
    assert model.size_bytes == sum(part.size_bytes for part in model.files)
    assert model.header is not None
    assert model.header.parameters == 3 * 256
    assert model.revision.count("+") == 2


def test_missing_parts_are_a_problem(root: Path) -> None:
    split(root, 2)
    model = only(root)
    assert model.id == "/models/big/Big-Q4_1-00001-of-00003.gguf"
    assert model.header is None
    assert model.problem == "2 of 3 parts missing: 1, 3"


def test_a_damaged_part_is_named(root: Path) -> None:
    split(root, 1, 2, 3)
    (root / "big" / "Big-Q4_1-00002-of-00003.gguf").write_bytes(b"")
    model = only(root)
    assert model.header is not None
    assert model.problem == "part 2 of 3: empty file"


def test_swapped_parts_are_a_problem(root: Path) -> None:
    split(root, 1, 2, total=2)
    one, two = (root / "big" / f"Big-Q4_1-0000{no}-of-00002.gguf" for no in (1, 2))
    one.rename(root / "aside")
    two.rename(one)
    (root / "aside").rename(two)
    assert only(root).problem == "part 1 of 2: its header says it is part 2 of 2"


def test_a_part_of_another_model_is_a_problem(root: Path) -> None:
    split(root, 1, 2, 3)
    two = root / "big" / "Big-Q4_1-00002-of-00003.gguf"
    metadata = {"split.no": 1, "split.count": 3}
    write_gguf(two, arch="qwen2", metadata=metadata)
    assert only(root).problem == "part 2 of 3: of another model, 'qwen2'"
    write_gguf(two, metadata=metadata)  # each may name the architecture
    assert only(root).problem is None
    one = root / "big" / "Big-Q4_1-00001-of-00003.gguf"
    write_gguf(one, arch=None, metadata={**metadata, "split.no": 0})
    assert only(root).problem == "header damaged: it names no architecture"


@pytest.mark.parametrize(("said", "problem"), [(6, False), (7, True), (0, True), (None, False)])
def test_the_parts_hold_as_many_tensors_as_they_say(
    root: Path, said: int | None, problem: bool
) -> None:
    split(root, 2, 3)
    told = {} if said is None else {"split.tensors.count": said}
    metadata = {"split.no": 0, "split.count": 3, **told}
    write_gguf(root / "big" / "Big-Q4_1-00001-of-00003.gguf", metadata=metadata)
    expected = f"a part is of another model: 6 tensors, not {said}" if problem else None
    assert only(root).problem == expected


def test_what_is_no_model_of_its_own(root: Path) -> None:
    write_gguf(root / "a.gguf", arch=None, metadata={"general.type": "imatrix"})
    write_gguf(root / "b.gguf", tensors=())  # llama.cpp's `ggml-vocab-*.gguf`
    for no, tensors in ((1, ()), (2, TENSORS)):
        metadata = {"split.no": no - 1, "split.count": 2}
        write_gguf(root / f"c-0000{no}-of-00002.gguf", metadata=metadata, tensors=tensors)
    assert [model.problem for model in look(root).models] == [
        "an importance matrix, not a model",
        "no weights: it holds a vocabulary at most",
        None,
    ]


def test_part_numbers_that_make_no_sense_are_part_of_the_name(root: Path) -> None:
    write_gguf(root / "x-00004-of-00003.gguf")
    write_gguf(root / "y-00001-of-99999.gguf")
    assert [(model.stem, model.problem) for model in look(root).models] == [
        ("x-00004-of-00003", None),
        ("y-00001-of-99999", None),
    ]


def test_symlinks_inside_the_root_are_spellings(root: Path) -> None:
    write_gguf(root / "real" / "tiny.gguf")
    (root / "alias.gguf").symlink_to("real/tiny.gguf")
    (root / "latest").symlink_to("real")
    (root / "real" / "also.gguf").symlink_to(root / "alias.gguf")
    model = only(root)
    assert model.id == "/models/real/tiny.gguf"
    assert model.spellings == (
        "alias.gguf",
        "latest/also.gguf",
        "latest/tiny.gguf",
        "real/also.gguf",
    )


def test_a_hub_cache_links_names_to_blobs(root: Path) -> None:
    blob = write_gguf(root / "hub" / "blobs" / "0a1b")
    (root / "hub" / "snapshots").mkdir()
    (root / "hub" / "snapshots" / "Tiny.gguf").symlink_to("../blobs/0a1b")
    model = only(root)
    assert (model.id, model.path) == ("/models/hub/blobs/0a1b", blob)
    assert model.spellings == ("hub/snapshots/Tiny.gguf",)


def test_symlink_loops_end(root: Path) -> None:
    write_gguf(root / "a" / "tiny.gguf")
    (root / "a" / "self").symlink_to(".")
    (root / "up").symlink_to(root)
    (root / "ring1").symlink_to("ring2")
    (root / "ring2").symlink_to("ring1")
    (root / "dangling.gguf").symlink_to("nowhere.gguf")
    assert "a/self/tiny.gguf" in only(root).spellings


def test_symlinks_that_leave_the_root_are_not_followed(
    root: Path, outside: Path, opened: list[str]
) -> None:
    write_gguf(root / "real" / "tiny.gguf")
    (root / "leak.gguf").symlink_to(outside / "secret.gguf")
    (root / "real" / "far").symlink_to("../../outside")
    (root / "latest").symlink_to("real")
    (root / "gone.gguf").symlink_to("/nowhere/at/all.gguf")
    snapshot = look(root)
    assert [model.id for model in snapshot.models] == ["/models/real/tiny.gguf"]
    assert snapshot.escaping == {"leak.gguf", "real/far", "latest/far", "gone.gguf"}
    assert opened == [str(root / "real" / "tiny.gguf")]


def test_a_folder_beside_the_root_with_the_same_beginning_is_outside(root: Path) -> None:
    twin = write_gguf(root.parent / "models-old" / "x.gguf")
    (root / "x.gguf").symlink_to(twin)
    assert look(root) == Snapshot(escaping=frozenset({"x.gguf"}))


def test_an_unchanged_rescan_opens_nothing(root: Path, opened: list[str]) -> None:
    write_gguf(root / "a.gguf")
    write_gguf(root / "b.gguf")
    (root / "empty.gguf").touch()
    cache = HeaderCache()
    first = scan(root, cache)
    opened.clear()
    assert scan(root, cache) == first
    assert opened == []

    write_gguf(root / "b.gguf", metadata={"general.name": "changed"})
    (root / "a.gguf").unlink()
    scan(root, cache)
    assert opened == [str(root / "b.gguf")]


def test_unreadable_files_are_looked_at_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(root / "a.gguf")
    cache = HeaderCache()

    def refuse(path: str) -> None:
        raise UnreadableGguf("unreadable: Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(headers_module, "read_gguf", refuse)
        [model] = scan(root, cache).models
        assert model.problem == "unreadable: Too many open files"
    [model] = scan(root, cache).models
    assert model.problem is None


def test_an_unreadable_folder_hides_only_itself(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(root / "a.gguf")
    (root / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert ids(root) == ["/models/a.gguf"]
    assert "folder='locked' reason=Permission denied" in caplog.text
    caplog.clear()
    roots, cache = (Root(root),), HeaderCache()
    known = scan_all(roots, cache).snapshot
    assert len(caplog.records) == 1
    assert scan_all(roots, cache, before=known).snapshot == known
    assert len(caplog.records) == 1  # it was told


def test_a_symlink_that_goes_while_it_is_looked_at(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(root / "a.gguf")
    write_folder(root / "smol")
    for link in (root / "gone.gguf", root / "smol" / "gone"):
        link.symlink_to(root / "a.gguf")
    realpath = os.path.realpath

    def refuse(path: str) -> str:
        if Path(path).name.startswith("gone"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return realpath(path)

    monkeypatch.setattr(os.path, "realpath", refuse)
    models = look(root).models
    assert [(model.id, model.problem) for model in models] == [
        ("/models/a.gguf", None),
        ("/models/smol", None),
    ]


def test_a_file_system_that_refuses_to_tell_what_is_what(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(root / "a.gguf")
    write_gguf(root / "odd" / "b.gguf")
    scandir = os.scandir

    class Entry:
        name = "b.gguf"

        def is_symlink(self) -> bool:
            raise PermissionError(13, "Permission denied")

    def refuse(path: str) -> object:
        return nullcontext([Entry()]) if path.endswith("odd") else scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert ids(root) == ["/models/a.gguf"]
    assert "folder='odd' reason=Permission denied" in caplog.text


def mmproj_of(root: Path) -> dict[str, str | None]:
    return {
        model.relative: model.mmproj and str(model.mmproj.relative_to(root))
        for model in look(root).models
    }


def test_the_projector_beside_a_model_is_its_own(root: Path) -> None:
    write_gguf(root / "gemma" / "gemma-Q4_K_M.gguf")
    write_gguf(root / "gemma" / "gemma-Q8_0.gguf")
    write_gguf(root / "gemma" / "mmproj-BF16.gguf", arch="clip")
    write_gguf(root / "gemma" / "mmproj-F16.gguf", arch="clip")
    write_gguf(root / "text" / "qwen.gguf")
    assert mmproj_of(root) == {
        "gemma/gemma-Q4_K_M.gguf": "gemma/mmproj-F16.gguf",
        "gemma/gemma-Q8_0.gguf": "gemma/mmproj-F16.gguf",
        "text/qwen.gguf": None,
    }


def test_in_a_folder_of_many_models_a_projector_belongs_by_name(root: Path) -> None:
    write_gguf(root / "gemma-Q4_K_M.gguf")
    write_gguf(root / "qwen-Q4_K_M.gguf")
    write_gguf(root / "eyes.gguf", arch="clip")
    write_gguf(root / "mmproj-Gemma-f16.gguf", arch="clip")
    write_gguf(root / "mmproj-F16.gguf", truncate=10)
    assert mmproj_of(root) == {
        "gemma-Q4_K_M.gguf": "mmproj-Gemma-f16.gguf",
        "qwen-Q4_K_M.gguf": None,
    }


def test_the_nearest_projector_wins(root: Path) -> None:
    write_gguf(root / "vl" / "q4" / "vl-Q4_0.gguf")
    write_gguf(root / "vl" / "q8" / "vl-Q8_0.gguf")
    write_gguf(root / "vl" / "mmproj-F16.gguf", arch="clip")
    write_gguf(root / "vl" / "q8" / "vl-mmproj-F32.gguf", arch="clip")
    assert mmproj_of(root) == {
        "vl/q4/vl-Q4_0.gguf": "vl/mmproj-F16.gguf",
        "vl/q8/vl-Q8_0.gguf": "vl/q8/vl-mmproj-F32.gguf",
    }


def test_recheck_sees_what_changed(root: Path) -> None:
    file = write_gguf(root / "vl" / "vl.gguf")
    projector = write_gguf(root / "vl" / "mmproj.gguf", arch="clip")
    (root / "alias.gguf").symlink_to(file)
    model = only(root)
    assert recheck(root, model, HeaderCache()) == model

    projector.unlink()
    write_gguf(file, metadata={"general.name": "new"})
    now = recheck(root, model, HeaderCache())
    assert now is not None
    assert now.header is not None
    assert now.header.name == "new"
    assert now.mmproj is None
    assert now.spellings == ("alias.gguf",)
    assert now.revision != model.revision

    file.unlink()
    assert recheck(root, model, HeaderCache()) is None


def test_recheck_of_parts(root: Path) -> None:
    split(root, 1, 2, 3)
    model = only(root)
    assert recheck(root, model, HeaderCache()) == model
    model.files[1].path.unlink()
    now = recheck(root, model, HeaderCache())
    assert now is not None
    assert now.problem == "1 of 3 parts missing: 2"


def test_recheck_does_not_follow_a_symlink(root: Path, outside: Path, opened: list[str]) -> None:
    write_gguf(root / "a" / "secret.gguf")
    model = only(root)
    opened.clear()
    model.path.unlink()
    model.path.symlink_to(outside / "secret.gguf")
    assert recheck(root, model, HeaderCache()) is None
    model.path.unlink()
    model.path.parent.rmdir()
    model.path.parent.symlink_to(outside)
    assert recheck(root, model, HeaderCache()) is None
    assert opened == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("/models/a.gguf", "/models/a.gguf"),
        ("a\nb\x00\udc80", "a\\nb\\x00\\udc80"),
        ("Hermes-JSON-Unexpected", "Hermes-json-unexpected"),
        ("x" * 201, "x" * 199 + "…"),
        ("\n" * 150, "\\n" * 99 + "\\…"),
    ],
)
def test_a_name_as_a_message_may_hold_it(name: str, text: str) -> None:
    assert shown(name) == text
