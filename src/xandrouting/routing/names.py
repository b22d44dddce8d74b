"""Which model a name means.

Everything is decided on strings and the last scan: nothing is opened here. A path goes before
a short name, an exact spelling before one that differs in case, and a whole name before one
without its quantization; the first that fits decides.
"""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Final, NamedTuple

from xandrouting.core.errors import AmbiguousModel, InvalidModelPath, ModelNotFound
from xandrouting.core.quantization import without_quantization
from xandrouting.inventory.model_file import (
    MAX_NAME_LENGTH,
    VIRTUAL_ROOT,
    ModelFile,
    ModelFormat,
    is_nameable,
    shown,
    stem_of,
)

_CHOICES_IN_MESSAGE: Final = 10
_NEAR_MATCHES: Final = 3
_MIN_PART: Final = 3  # characters a part of a name must have to be taken for it
_NEAR_ENOUGH: Final = 0.5  # difflib's ratio
_COMPARED: Final = 50  # difflib is slow: it sees only those that share most with the name
_COMPARED_LENGTH: Final = 200

_Index = dict[str, dict[str, ModelFile]]
"""Spelling → the models it may mean, by id."""


class _ShortNames(NamedTuple):
    """One way of naming a model without its path."""

    spellings: _Index
    of_folders: bool = False
    any_case: bool = False

    def ignoring_case(self) -> _ShortNames:
        folded: _Index = defaultdict(dict)
        for name, models in self.spellings.items():
            folded[name.casefold()].update(models)
        return self._replace(spellings=folded, any_case=True)

    def get(self, name: str) -> Mapping[str, ModelFile]:
        return self.spellings.get(name.casefold() if self.any_case else name, {})


class ModelNames:
    """All names of the models of one snapshot.

    `escaping` are the symlinks that leave the root, relative to it.
    """

    def __init__(
        self, models: Iterable[ModelFile], *, escaping: frozenset[str] = frozenset()
    ) -> None:
        self._models = tuple(models)
        self._escaping = escaping
        self._paths: dict[str, ModelFile] = {}
        self._shards: dict[str, ModelFile] = {}  # files of folders that are models
        self._folders: _Index = defaultdict(dict)
        for model in self._models:
            self._add_paths(model)
        self._short_names = self._index_short_names()

    def resolve(
        self,
        name: str,
        *,
        backend_folder_ok: bool = True,
        prefers: ModelFormat | None = None,
    ) -> ModelFile:
        """Return the model that `name` means, damaged or not.

        `backend_folder_ok`: a folder may stand for the only model in it. `prefers` is the
        format of which the model shall be where the name fits several, or a folder that is a
        model and holds others.

        Raises:
            InvalidModelPath: it can be the name of nothing under the root.
            AmbiguousModel: it fits several; `details["choices"]` holds their ids.
            ModelNotFound: the message names near matches.
        """
        path = self._inside_root(name)
        files_ok = not name.endswith("/")
        inside: Mapping[str, ModelFile]
        inside = self._folders.get(path, {}) if backend_folder_ok else {}
        exact = self._exact(path, files_ok=files_ok)
        if exact is not None:
            others = {} if exact.format is prefers else _of_format(inside, prefers)
            if len(others) > 1:
                raise _ambiguous(name, sorted(others))
            return _only(others) if others else exact
        inside = _of_format(inside, prefers) or inside
        if len(inside) == 1:
            return _only(inside)
        named = self._by_short_name(path, files_ok=files_ok, folders_ok=backend_folder_ok)
        named = _of_format(named, prefers) or named
        if len(named) == 1:
            return _only(named)
        if inside or named:
            raise _ambiguous(name, sorted(inside or named))
        raise self._not_found(name, path)

    def _exact(self, path: str, *, files_ok: bool) -> ModelFile | None:
        model = self._paths.get(path) or self._shards.get(path)
        if model is None or files_ok:
            return model
        is_folder = model.format is ModelFormat.SAFETENSORS and path not in self._shards
        return model if is_folder else None

    def quantizations(self, model: ModelFile) -> list[ModelFile]:
        """Return the other models that bear the same name but for their quantization.

        Those that lie in a folder that is a model itself are that model too.
        """
        bare = self._short_names[-1].get(without_quantization(model.stem))
        inside = self._folders.get(model.relative, {})
        return [other for other in {**bare, **inside}.values() if other.id != model.id]

    def _add_paths(self, model: ModelFile) -> None:
        for path in (model.relative, *model.spellings):
            self._paths[path] = model
            for folder in _folders_above(path):
                self._folders[folder][model.id] = model
        parts = self._paths if model.format is ModelFormat.GGUF else self._shards
        for part in model.files:
            parts.setdefault(part.relative, model)

    def _index_short_names(self) -> Sequence[_ShortNames]:
        stems, folders, bare = (
            _ShortNames(defaultdict(dict), folder) for folder in (False, True, False)
        )
        for path, model in self._paths.items():
            stem = stem_of(path)
            stems.spellings[stem][model.id] = model
            stems.spellings[path.rpartition("/")[2]][model.id] = model
            bare.spellings[without_quantization(stem)][model.id] = model
        for folder, inside in self._folders.items():
            folders.spellings[folder.rpartition("/")[2]].update(inside)
        return (
            stems,
            folders,
            stems.ignoring_case(),
            folders.ignoring_case(),
            bare,
            bare.ignoring_case(),
        )

    def _inside_root(self, name: str) -> str:
        """Return the path that `name` is, relative to the root; "" is the root itself."""
        if not name:
            raise InvalidModelPath("The model's name is empty.", param="model")
        if not is_nameable(name):
            raise InvalidModelPath(
                f"A model's name has at most {MAX_NAME_LENGTH} characters, and no backslash or "
                "control character among them.",
                param="model",
            )
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise InvalidModelPath("A model's path may not go up with '..'.", param="model")
        if name.startswith("/"):
            if parts[:1] != [VIRTUAL_ROOT[1:]]:
                raise InvalidModelPath(
                    f"A path lies under {VIRTUAL_ROOT}; GET /v1/models/inventory lists all models.",
                    param="model",
                )
            del parts[0]
        path = "/".join(parts)
        if not self._escaping.isdisjoint((path, *_folders_above(path))):
            raise InvalidModelPath(
                "The model's path leads through a symlink that leaves the models directory.",
                param="model",
            )
        return path

    def _by_short_name(
        self, name: str, *, files_ok: bool, folders_ok: bool
    ) -> Mapping[str, ModelFile]:
        for names in self._short_names:
            if folders_ok if names.of_folders else files_ok:
                found = names.get(name)
                if found:
                    return found
        return {}

    def _not_found(self, name: str, path: str) -> ModelNotFound:
        near = [f"'{shown(model.id)}'" for model in self._near.find(path)]
        hint = f" Did you mean {_listed(near, 'or')}?" if near else ""
        return ModelNotFound(
            f"There is no model '{shown(name)}'.{hint} GET /v1/models/inventory lists all.",
            param="model",
        )

    @cached_property
    def _near(self) -> _NearMatches:
        return _NearMatches(self._models)


class _NearMatches:
    """Finds the models whose short name or path looks like a given one."""

    def __init__(self, models: Iterable[ModelFile]) -> None:
        self._texts = [
            (text.casefold(), model) for model in models for text in {model.stem, model.relative}
        ]
        self._with_trigram: dict[str, list[int]] = defaultdict(list)
        for number, (text, _) in enumerate(self._texts):
            for trigram in _trigrams(text):
                self._with_trigram[trigram].append(number)

    def find(self, wanted: str) -> list[ModelFile]:
        wanted = wanted[:_COMPARED_LENGTH].casefold()
        shared: Counter[int] = Counter()
        for trigram in _trigrams(wanted):
            shared.update(self._with_trigram.get(trigram, ()))
        matcher = difflib.SequenceMatcher(b=wanted, autojunk=False)
        best: dict[str, tuple[float, ModelFile]] = {}
        for number, _ in shared.most_common(_COMPARED):
            text, model = self._texts[number]
            matcher.set_seq1(text[:_COMPARED_LENGTH])
            score = matcher.ratio()
            if len(wanted) >= _MIN_PART and wanted in text:
                score = max(score, _NEAR_ENOUGH)  # a part of a long name is near it too
            if score >= max(_NEAR_ENOUGH, best.get(model.id, (0.0,))[0]):
                best[model.id] = score, model
        ranked = sorted(best.values(), key=lambda found: (-found[0], found[1].id))
        return [model for _, model in ranked[:_NEAR_MATCHES]]


def _trigrams(text: str) -> set[str]:
    padded = f" {text} "
    return {padded[at : at + 3] for at in range(len(padded) - 2)}


def _folders_above(path: str) -> Iterator[str]:
    """Yield the folders a path goes through, the nearest first, the root ("") last."""
    while path:
        path = path.rpartition("/")[0]
        yield path


def _of_format(
    models: Mapping[str, ModelFile], wanted: ModelFormat | None
) -> Mapping[str, ModelFile]:
    return {name: model for name, model in models.items() if model.format is wanted}


def _only(models: Mapping[str, ModelFile]) -> ModelFile:
    [model] = models.values()
    return model


def _ambiguous(name: str, choices: Sequence[str]) -> AmbiguousModel:
    listed = [f"'{shown(choice)}'" for choice in choices[:_CHOICES_IN_MESSAGE]]
    more = len(choices) - len(listed)
    if more:
        listed.append(f"{more} more")
    return AmbiguousModel(
        f"'{shown(name)}' fits {len(choices)} models. Ask for one of {_listed(listed, 'and')}.",
        param="model",
        details={"choices": list(choices)},
    )


def _listed(items: Sequence[str], conjunction: str) -> str:
    *head, last = items
    return f"{', '.join(head)} {conjunction} {last}" if head else last
