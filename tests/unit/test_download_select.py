"""Which files of a repository are fetched: never nothing, never half a model."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xandrouting.core.errors import (
    AmbiguousDownload,
    GatewayError,
    NoSuchQuantization,
    NothingToDownload,
)
from xandrouting.downloads.jobs import RemoteFile
from xandrouting.downloads.select import Chosen, Wish, choose, distinct, variants

REPO = "org/name"
SIZES = {"Q2_K": 10, "Q4_0": 20, "Q4_K_M": 25, "UD-Q4_K_XL": 27, "Q8_0": 40, "BF16": 80}


def listing(*names: str, size: int = 10) -> list[RemoteFile]:
    """Return files of these names; `name=SIZE` says how large it is."""
    files = []
    for name in names:
        path, equals, text = name.partition("=")
        files.append(RemoteFile(path, int(text) if equals else size, blob_id="0" * 40))
    return files


def paths(chosen: Chosen) -> list[str]:
    return sorted(file.path for file in chosen.files)


def pick(files: list[RemoteFile], **wish: object) -> list[str]:
    return paths(choose(REPO, files, Wish(**wish)))


GGUF = listing(
    *(f"Model-{name}.gguf={size}" for name, size in SIZES.items()),
    *("README.md", "config.json", "imatrix.gguf", ".gitattributes"),
)


@pytest.mark.parametrize(
    ("wanted", "file"),
    [
        ("Q4_K_M", "Model-Q4_K_M.gguf"),
        ("q4_k_m", "Model-Q4_K_M.gguf"),
        ("UD-Q4_K_XL", "Model-UD-Q4_K_XL.gguf"),
        ("Q4_K_XL", "Model-UD-Q4_K_XL.gguf"),
        ("bf16", "Model-BF16.gguf"),
        ("Model-Q8_0", "Model-Q8_0.gguf"),
        ("model-q8_0.gguf", "Model-Q8_0.gguf"),
    ],
)
def test_a_quantization_is_one_file(wanted: str, file: str) -> None:
    assert pick(GGUF, quantization=wanted) == [file]


def test_f16_is_not_bf16() -> None:
    with pytest.raises(NoSuchQuantization) as caught:
        pick(GGUF, quantization="F16")
    details = caught.value.details
    assert details is not None
    names = {choice["name"]: choice["size_bytes"] for choice in details["choices"]}
    assert names == SIZES
    assert "Q4_K_M (25 bytes)" in caught.value.message


def test_exact_goes_before_unsloth_s_own() -> None:
    files = listing("M-UD-Q4_K_M.gguf", "M-Q4_K_M.gguf")
    assert pick(files, quantization="Q4_K_M") == ["M-Q4_K_M.gguf"]
    assert pick(files, quantization="UD-Q4_K_M") == ["M-UD-Q4_K_M.gguf"]
    with pytest.raises(NoSuchQuantization):
        pick(files[1:], quantization="UD-Q4_K_M")


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (list(SIZES), "Q4_K_M"),
        (["Q2_K", "Q4_0", "Q8_0"], "Q4_0"),
        (["Q2_K", "Q8_0", "BF16"], "Q8_0"),
        (["BF16", "Q2_K", "UD-Q4_K_XL"], "Q2_K"),
    ],
)
def test_without_a_wish(names: list[str], file: str) -> None:
    files = listing(*(f"M-{name}.gguf={SIZES[name]}" for name in names), "README.md")
    chosen = choose(REPO, files, Wish())
    assert (paths(chosen), chosen.quantization) == ([f"M-{file}.gguf"], file)


def test_all_parts_of_a_split() -> None:
    parts = [f"Q8_0/M-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    files = listing(*parts, "M-Q4_0.gguf")
    assert pick(files, quantization="Q8_0") == parts
    assert pick(files, file=parts[1]) == parts
    [small, large] = variants(files)
    assert (small.name, large.name, large.size_bytes) == ("Q4_0", "Q8_0", 30)


def test_a_missing_part_is_an_error() -> None:
    files = listing("M-Q8_0-00001-of-00003.gguf", "M-Q8_0-00003-of-00003.gguf")
    for wish in (Wish(), Wish(quantization="Q8_0"), Wish(file="M-Q8_0-00001-of-00003.gguf")):
        with pytest.raises(NothingToDownload, match="1 of 3 parts are missing"):
            choose(REPO, files, wish)
    assert pick([*files, *listing("M-Q2_K.gguf")]) == ["M-Q2_K.gguf"]


def test_the_quantization_may_be_the_folder_s() -> None:
    files = listing("Q4_K_M/model.gguf", "Q8_0/model.gguf")
    assert pick(files, quantization="Q8_0") == ["Q8_0/model.gguf"]
    assert pick(files, folder="Q8_0") == ["Q8_0/model.gguf"]


def test_two_models_of_one_quantization() -> None:
    files = listing("small/A-Q4_0.gguf", "large/B-Q4_0.gguf")
    with pytest.raises(AmbiguousDownload) as caught:
        pick(files, quantization="Q4_0")
    assert caught.value.details is not None
    assert len(caught.value.details["choices"]) == 2
    assert pick(files, quantization="large/B-Q4_0") == ["large/B-Q4_0.gguf"]
    assert pick(files, quantization="b-q4_0") == ["large/B-Q4_0.gguf"]
    assert pick(files, quantization="Q4_0", exclude=("large",)) == ["small/A-Q4_0.gguf"]


def test_a_name_without_a_quantization() -> None:
    files = listing("model.gguf")
    assert choose(REPO, files, Wish()).quantization is None
    assert pick(files, quantization="model") == ["model.gguf"]


@pytest.mark.parametrize(
    ("projectors", "chosen"),
    [
        (["mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf"], "mmproj-F16.gguf"),
        (["mmproj-F32.gguf", "mmproj-model-bf16.gguf"], "mmproj-model-bf16.gguf"),
        (["mmproj.gguf"], "mmproj.gguf"),
        (["mmproj-F16.gguf", "Q4_0/mmproj-F32.gguf"], "Q4_0/mmproj-F32.gguf"),
        (["other/mmproj-F16.gguf"], None),
    ],
)
def test_eyes_come_along(projectors: list[str], chosen: str | None) -> None:
    files = listing("Q4_0/M-Q4_0.gguf", *projectors)
    expected = ["Q4_0/M-Q4_0.gguf", *([] if chosen is None else [chosen])]
    assert pick(files) == sorted(expected)
    assert pick(files, quantization="Q4_0") == sorted(expected)
    assert pick(files, file="Q4_0/M-Q4_0.gguf") == ["Q4_0/M-Q4_0.gguf"]


def test_among_several_models_eyes_go_by_name() -> None:
    files = listing("A-Q4_0.gguf", "B-Q8_0.gguf", "A-mmproj-F16.gguf", "mmproj-B-F16.gguf")
    assert pick(files, quantization="Q4_0") == ["A-Q4_0.gguf", "A-mmproj-F16.gguf"]
    assert pick(files, quantization="Q8_0") == ["B-Q8_0.gguf", "mmproj-B-F16.gguf"]


FOLDER = listing(
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    *("model.safetensors.index.json", "chat_template.jinja", "LICENSE", "modeling_x.py"),
)
KEPT = sorted(file.path for file in FOLDER)
DROPPED = listing(
    *("README.md", ".gitattributes", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("model.fp16.safetensors", "consolidated.safetensors", "original/consolidated.00.pth"),
    *("original/model.safetensors", "onnx/model.onnx", "onnx/config.json", "tf_model.h5"),
    *("figures/plot.png", "training_args.bin", "runs/events.json", "adapter_model.safetensors"),
)


def test_a_folder_of_safetensors_without_what_is_there_twice() -> None:
    assert pick([*DROPPED, *FOLDER]) == KEPT


def test_one_file_goes_before_shards_without_an_index() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = listing("config.json", "model.safetensors", *shards)
    assert pick(files) == ["config.json", "model.safetensors"]
    indexed = [*files, *listing("model.safetensors.index.json")]
    assert pick(indexed) == ["config.json", *shards, "model.safetensors.index.json"]


def test_only_consolidated_is_kept() -> None:
    files = listing("consolidated.safetensors", "params.json", "tekken.json")
    assert pick(files) == ["consolidated.safetensors", "params.json", "tekken.json"]


def test_variants_alone_are_kept() -> None:
    assert pick(listing("model.fp16.safetensors")) == ["model.fp16.safetensors"]


def test_modules_of_sentence_transformers() -> None:
    files = listing("model.safetensors", "modules.json", "1_Pooling/config.json", "x/config.json")
    assert pick(files) == ["1_Pooling/config.json", "model.safetensors", "modules.json"]


def test_a_missing_shard_is_an_error() -> None:
    files = listing("config.json", "model-00001-of-00002.safetensors")
    with pytest.raises(NothingToDownload, match="1 of 2 parts"):
        pick(files)


def test_weights_in_one_folder_below() -> None:
    files = listing("README.md", "final/config.json", "final/model.safetensors")
    assert pick(files) == ["final/config.json", "final/model.safetensors"]


def test_weights_in_several_folders_are_to_be_chosen() -> None:
    files = listing("a/config.json", "a/model.safetensors", "b/model.safetensors")
    with pytest.raises(AmbiguousDownload, match="2 folders"):
        pick(files)
    assert pick(files, folder="a") == ["a/config.json", "a/model.safetensors"]


def test_both_formats() -> None:
    files = listing("config.json", "model.safetensors", "M-Q4_0.gguf")
    assert pick(files) == ["config.json", "model.safetensors"]
    assert pick(files, quantization="Q4_0") == ["M-Q4_0.gguf"]
    assert pick(files, file="M-Q4_0.gguf") == ["M-Q4_0.gguf"]


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ([], "holds no files"),
        (["README.md"], "holds no model"),
        (["pytorch_model.bin", "config.json"], "no engine here loads"),
        (["adapter_model.safetensors", "adapter_config.json"], "adapter"),
    ],
)
def test_no_model_at_all(names: list[str], why: str) -> None:
    with pytest.raises(NothingToDownload, match=why):
        pick(listing(*names))


def test_a_quantization_of_a_folder_of_safetensors() -> None:
    with pytest.raises(NoSuchQuantization, match="no GGUF files"):
        pick(FOLDER, quantization="Q4_K_M")


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        (("*.json",), (), ["a.json", "sub/b.json"]),
        (("sub",), (), ["sub/M-Q4_0.gguf", "sub/b.json"]),
        (("sub/",), ("*.json",), ["sub/M-Q4_0.gguf"]),
        (("*",), ("sub", "M-*"), ["a.json"]),
        (("*Q4_0*", "a.*"), (), ["M-Q4_0.gguf", "a.json", "sub/M-Q4_0.gguf"]),
    ],
)
def test_patterns(include: tuple[str, ...], exclude: tuple[str, ...], chosen: list[str]) -> None:
    files = listing("a.json", "sub/b.json", "sub/M-Q4_0.gguf", "M-Q4_0.gguf", "M-Q8_0.gguf")
    assert pick(files, include=include, exclude=exclude) == chosen


@pytest.mark.parametrize(
    "wish",
    [
        Wish(include=("*.GGUF",)),
        Wish(include=("nothing",)),
        Wish(exclude=("*",)),
        Wish(file="nothing.gguf"),
        Wish(folder="nothing"),
    ],
)
def test_nothing_fits(wish: Wish) -> None:
    with pytest.raises(NothingToDownload):
        choose(REPO, GGUF, wish)


def test_patterns_narrow_the_choice_of_a_quantization() -> None:
    files = listing("a/M-Q4_0.gguf", "b/M-Q4_0.gguf")
    assert pick(files, include=("b/*",), quantization="Q4_0") == ["b/M-Q4_0.gguf"]


NAMES = st.lists(
    st.sampled_from(["M", "UD", "Q4_K_M", "Q8_0", "mmproj", "model", "00001-of-00002", "fp16"]),
    min_size=1,
    max_size=4,
).map("-".join)
PATHS = st.builds(
    lambda folder, name, suffix: f"{folder}{name}{suffix}",
    st.sampled_from(["", "", "sub/", "Q4_0/", "original/", "1_Pooling/"]),
    NAMES,
    st.sampled_from([".gguf", ".GGUF", ".safetensors", ".json", ".bin", ""]),
)
WISHES = st.builds(
    Wish,
    quantization=st.none() | st.sampled_from(["Q4_K_M", "q8_0", "UD-Q4_K_M", "M", "x"]) | NAMES,
    include=st.lists(st.sampled_from(["*", "*.gguf", "sub", "M*"]), max_size=2).map(tuple),
    exclude=st.lists(st.sampled_from(["*.bin", "sub", "*mmproj*"]), max_size=2).map(tuple),
    file=st.none() | PATHS,
    folder=st.none() | st.sampled_from(["sub", "Q4_0"]),
)


@given(st.lists(PATHS, max_size=8, unique=True), WISHES)
def test_whatever_is_there_the_choice_is_some_of_it_or_refused(
    names: list[str], wish: Wish
) -> None:
    files = listing(*names)
    try:
        chosen = choose(REPO, files, wish)
    except GatewayError as error:
        assert error.status == 400  # noqa: PT017 - either outcome is right
        return
    assert chosen.files
    assert len(set(chosen.files)) == len(chosen.files)
    assert set(chosen.files) <= set(files)
    for excluded in wish.exclude:
        assert excluded != "*.bin" or not any(f.path.endswith(".bin") for f in chosen.files)
    whole = [one for one in variants(files) if one.lacks]
    if not wish.include:
        for one in whole:
            assert not set(one.parts) & set(chosen.files)


def test_a_model_that_is_there_whole_and_in_parts_is_one() -> None:
    """As Qwen2.5-Coder-7B-Instruct-GGUF has it, the guide's own example."""
    whole, parts = "q-q4_k_m.gguf", ["q-q4_k_m-00001-of-00002.gguf", "q-q4_k_m-00002-of-00002.gguf"]
    files = listing(*parts, whole, "q-q8_0-00001-of-00002.gguf")
    assert pick(files, quantization="Q4_K_M") == pick(files) == [whole]
    assert pick(files, file=parts[0]) == parts  # who asks for a part has all of them
    assert [one.name for one in distinct(variants(files))] == ["Q4_K_M", "Q8_0"]


def test_choices_have_names_that_choose() -> None:
    files = listing("a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "b/b-Q4_K_M.gguf", "c-Q8_0.gguf")
    found = distinct(variants(files))
    assert {one.name for one in found} == {"a-Q4_K_M", "b-Q4_K_M", "b/b-Q4_K_M", "Q8_0"}
    with pytest.raises(AmbiguousDownload) as refused:
        pick(files, quantization="Q4_K_M")
    choices = [choice["name"] for choice in (refused.value.details or {})["choices"]]
    picked = [pick(files, quantization=choice) for choice in choices]
    assert picked == [[f"{choice}.gguf"] for choice in choices]


def test_thousands_of_models_take_no_minutes() -> None:
    names = [f"{n % 7}/M{n}" for n in range(5000)]
    files = listing(*(f"{name}-Q4_0.gguf" for name in names))
    files += listing(*(f"{name}-mmproj-F16.gguf" for name in names))
    began = time.process_time()
    found = variants(files)
    assert time.process_time() - began < 10
    eyes = {one.stem: one.projector.path for one in found if one.projector is not None}
    assert eyes == {f"{name}-Q4_0": f"{name}-mmproj-F16.gguf" for name in names}
