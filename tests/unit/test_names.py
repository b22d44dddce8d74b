"""Which model a name means, decided on strings alone."""

from pathlib import Path

import pytest

from xandrouting.core.errors import AmbiguousModel, GatewayError, InvalidModelPath, ModelNotFound
from xandrouting.inventory.model_file import ModelFile, ModelPart
from xandrouting.routing.names import ModelNames


def model(relative: str, *spellings: str, parts: int = 1) -> ModelFile:
    names = [relative.replace("-00001-of", f"-{no:05d}-of") for no in range(1, parts + 1)]
    return ModelFile(
        id=f"/models/{relative}",
        path=Path("/srv", relative),
        folder=relative.rpartition("/")[0],
        files=tuple(ModelPart(Path("/srv", name), name, 10) for name in names),
        size_bytes=10 * parts,
        header=None,
        problem=None,
        modified=0.0,
        revision="r",
        spellings=spellings,
    )


SMOL = "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QWEN_4 = "qwen/Qwen2.5-7B-Q4_K_M.gguf"
QWEN_8 = "qwen/Qwen2.5-7B-Q8_0.gguf"
BIG = "big/deep/Big-UD-Q4_K_XL-00001-of-00003.gguf"
ROOT = "Root-JSON.gguf"
NAMES = ModelNames(
    [
        model(SMOL, "latest/SmolLM2-135M-Instruct.Q4_1.gguf", "smol.gguf"),
        model(QWEN_4),
        model(QWEN_8),
        model(BIG, parts=3),
        model(ROOT),
    ],
    escaping=frozenset({"leak.gguf", "far", "qwen/out"}),
)


def resolve(name: str) -> str:
    return NAMES.resolve(name).relative


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (f"/models/{SMOL}", SMOL),
        (SMOL, SMOL),
        (f"./{SMOL}", SMOL),
        (f"//models//smollm2/./{SMOL[8:]}", SMOL),
        ("/models/smollm2", SMOL),
        ("/models/smollm2/", SMOL),
        ("smollm2", SMOL),
        ("smollm2/", SMOL),
        ("SmolLM2-135M-Instruct.Q4_1", SMOL),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", SMOL),
        ("smollm2-135m-instruct.q4_1", SMOL),
        ("/models/smollm2-135m-instruct.q4_1", SMOL),
        ("SmolLM2-135M-Instruct", SMOL),
        ("smollm2-135m-instruct", SMOL),
        ("SMOLLM2", SMOL),
        ("latest", SMOL),
        ("smol", SMOL),
        ("/models/smol.gguf", SMOL),
        ("/models/latest/SmolLM2-135M-Instruct.Q4_1.gguf", SMOL),
        (QWEN_4, QWEN_4),
        ("Qwen2.5-7B-Q8_0", QWEN_8),
        (BIG, BIG),
        ("big/deep/Big-UD-Q4_K_XL-00002-of-00003.gguf", BIG),
        ("Big-UD-Q4_K_XL", BIG),
        ("big", BIG),
        ("deep", BIG),
        ("deep/", BIG),
        ("big/deep", BIG),
        ("root-json", ROOT),
    ],
)
def test_spellings(name: str, found: str) -> None:
    assert resolve(name) == found


@pytest.mark.parametrize("name", ["qwen", "/models/qwen/", "QWEN", "qwen2.5-7b", "Qwen2.5-7B"])
def test_several_models_are_choices(name: str) -> None:
    with pytest.raises(AmbiguousModel) as caught:
        resolve(name)
    assert caught.value.details == {"choices": [f"/models/{QWEN_4}", f"/models/{QWEN_8}"]}
    assert caught.value.message == (
        f"'{name}' fits 2 models. Ask for one of '/models/{QWEN_4}' and '/models/{QWEN_8}'."
    )


@pytest.mark.parametrize("name", ["/models", "/models/", "."])
def test_the_root_is_a_folder_like_any_other(name: str) -> None:
    with pytest.raises(AmbiguousModel):
        resolve(name)
    assert ModelNames([model(SMOL)]).resolve(name).relative == SMOL
    with pytest.raises(ModelNotFound):
        ModelNames([]).resolve(name)


def test_the_only_model_in_a_folder_goes_before_a_short_name() -> None:
    names = ModelNames([model("a/x.gguf"), model("b/a.gguf")])
    assert names.resolve("a").relative == "a/x.gguf"


def test_a_short_name_goes_before_a_folder_of_several() -> None:
    names = ModelNames([model("a/x.gguf"), model("a/a.gguf"), model("a/A.gguf")])
    assert names.resolve("a").relative == "a/a.gguf"
    assert names.resolve("A").relative == "a/A.gguf"
    with pytest.raises(AmbiguousModel):
        names.resolve("a/")


def test_one_stem_in_two_folders_is_ambiguous() -> None:
    names = ModelNames([model("a/x.gguf"), model("b/x.gguf")])
    with pytest.raises(AmbiguousModel):
        names.resolve("x")


def test_two_spellings_of_one_model_are_one_choice() -> None:
    names = ModelNames([model("real/x.gguf", "links/x.gguf", "links/y.gguf")])
    assert names.resolve("links").relative == names.resolve("x").relative == "real/x.gguf"


def test_a_folder_is_not_asked_where_the_backend_takes_none() -> None:
    with pytest.raises(ModelNotFound):
        NAMES.resolve("smollm2/", backend_folder_ok=False)
    with pytest.raises(ModelNotFound):
        NAMES.resolve("deep", backend_folder_ok=False)
    assert NAMES.resolve("smol", backend_folder_ok=False).relative == SMOL


def test_a_file_is_no_folder() -> None:
    with pytest.raises(ModelNotFound):
        resolve(f"{SMOL}/")
    with pytest.raises(ModelNotFound):
        resolve("SmolLM2-135M-Instruct.Q4_1/")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../x.gguf",
        "/models/../etc/passwd",
        "smollm2/../smollm2",
        "/etc/passwd",
        "/",
        "/modelsx/a",
        "a\\b",
        "..\\x",
        "a\x00.gguf",
        "a\nb",
        "a\x7f",
        "a\x85b",
        "a\ud800",
        "x" * 1025,
        "leak.gguf",
        "/models/leak.gguf",
        "far",
        "far/x/y.gguf",
        "/models/qwen/out/x.gguf",
        "qwen//out/",
    ],
)
def test_names_of_nothing_under_the_root(name: str) -> None:
    with pytest.raises(InvalidModelPath) as caught:
        resolve(name)
    assert caught.value.param == "model"
    assert "passwd" not in caught.value.message


def test_not_found_names_near_matches() -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve("Qwen2.5-7B-Q5_K_M")
    assert caught.value.message == (
        "There is no model 'Qwen2.5-7B-Q5_K_M'. Did you mean "
        f"'/models/{QWEN_4}' or '/models/{QWEN_8}'? GET /v1/models/inventory lists all."
    )
    with pytest.raises(ModelNotFound) as caught:
        resolve("smol-lm2-135m-instruct")
    assert f"Did you mean '/models/{SMOL}'?" in caught.value.message


def test_not_found_without_near_matches() -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve("gpt-4o")
    assert caught.value.message == (
        "There is no model 'gpt-4o'. GET /v1/models/inventory lists all."
    )


@pytest.mark.parametrize("name", ["Root-JSONs", "Unexpected", "é" * 900, "a b\u2028c"])
def test_messages_hold_nothing_a_front_end_trips_over(name: str) -> None:
    with pytest.raises(GatewayError) as caught:
        resolve(name)
    message = caught.value.message
    assert "JSON" not in message
    assert "Unexpected" not in message
    assert "/srv" not in message
    assert message.isprintable()
    assert len(message) < 500


def test_many_choices_are_cut_in_the_message_only() -> None:
    names = ModelNames([model(f"many/m{no:02d}.gguf") for no in range(25)])
    with pytest.raises(AmbiguousModel, match=r"and 15 more\.$") as caught:
        names.resolve("many")
    assert caught.value.details is not None
    assert len(caught.value.details["choices"]) == 25
