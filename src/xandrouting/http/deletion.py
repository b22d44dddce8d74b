"""`DELETE /v1/models/{id}`: a model's files go to the trash."""

from __future__ import annotations

import asyncio
import errno
import os
from collections import defaultdict
from typing import Annotated, Final

from fastapi import FastAPI, Query
from fastapi.routing import APIRoute

from xandrouting.core.errors import (
    GatewayError,
    InvalidModelPath,
    InvalidRequest,
    MethodNotAllowed,
    ModelInUse,
    ModelNotFound,
    ModelReadOnly,
    ModelsDirUnusable,
)
from xandrouting.http import lists, upstream_lists
from xandrouting.http.inventory_schemas import DeletedModel
from xandrouting.http.lifecycle import local_engines
from xandrouting.http.model_path import named
from xandrouting.http.services import Services
from xandrouting.inventory import trash
from xandrouting.inventory.model_file import VIRTUAL_ROOT, ModelFile, shown
from xandrouting.inventory.trash import Deleted

_GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL)


def add_deletion(app: FastAPI, services: Services) -> None:
    """Add the call that deletes a model, after all others: a path of theirs is no model."""
    taken: dict[str, set[str]] = defaultdict(set)
    for route in app.routes:
        if isinstance(route, APIRoute):
            taken[route.path].update(route.methods or ())

    @app.delete("/v1/models/{model_id:path}", tags=["models"])
    async def delete(
        model_id: str,
        purge: Annotated[
            bool, Query(description="The files are gone at once, and the disk has their place.")
        ] = False,
    ) -> DeletedModel:
        """Delete a model's files, and no others; they are in the trash for a day.

        The model is named as in requests, and may not be in use.
        """
        methods = taken.get(f"/v1/models/{model_id}")
        if methods:
            raise MethodNotAllowed(
                "DELETE is not a method of this address.", allow=", ".join(sorted(methods))
            )
        return await delete_model(services, model_id, purge=purge)


async def delete_model(services: Services, model_id: str, *, purge: bool = False) -> DeletedModel:
    """Delete the files of the model of this name; unless `purge`, to the trash.

    Raises:
        GatewayError: there is no such model, it is in use, or it may not be deleted.
    """
    if upstream_lists.model_item(services.upstreams, model_id) is not None:
        raise InvalidRequest(
            f"'{shown(model_id)}' is another server's: it is deleted there.", param="model"
        )
    snapshot = await services.inventory.refresh()
    path = _path(model_id)
    if path in snapshot.escaping:
        deleted = await _delete_link(services, path, purge=purge)
        return _told(services, f"{VIRTUAL_ROOT}/{path}", deleted)
    file = _meant(services, model_id)
    with services.inventory.leaving(file):
        _check_unused(services, file)
        root = services.inventory.roots[0]
        try:
            deleted = await asyncio.to_thread(trash.delete, root, file, snapshot, purge=purge)
        except OSError as error:
            raise _refused(file.id, error) from error
        finally:
            await services.inventory.refresh()
    return _told(services, file.id, deleted)


def _path(model_id: str) -> str:
    return "/".join(
        part
        for part in named(model_id).removeprefix(VIRTUAL_ROOT).split("/")
        if part not in ("", ".")
    )


def _meant(services: Services, model_id: str) -> ModelFile:
    """Return the model of this name.

    Raises:
        GatewayError: there is none, or several.
        ModelReadOnly: it lies where nothing is deleted.
    """
    file = services.catalog.names().resolve(named(model_id))
    if file.read_only:
        raise ModelReadOnly(
            f"'{shown(file.id)}' lies in a further root, which is only read. Delete it there.",
            param="model",
        )
    return file


def _check_unused(services: Services, file: ModelFile) -> None:
    """Pass a model that nobody uses.

    Raises:
        ModelInUse: it is loaded, on its way in or out, or still comes from the hub.
    """
    states = [view.state for view, _ in local_engines(services) if view.engine.key.model == file.id]
    if states or services.loads.under_way(file.id):
        raise ModelInUse(
            f"'{shown(file.id)}' is {states[0] if states else 'loading'}. Unload it with "
            "POST /v1/models/unload first.",
            param="model",
        )
    if services.is_downloaded_into(file.folder):
        raise ModelInUse(
            f"A download writes to the folder of '{shown(file.id)}'. Wait for it, or cancel it: "
            "GET /v1/models/download lists it.",
            param="model",
        )


async def _delete_link(services: Services, path: str, *, purge: bool) -> Deleted:
    root = services.inventory.roots[0]
    try:
        return await asyncio.to_thread(trash.delete_link, root, path, purge=purge)
    except OSError as error:
        if error.errno in _GONE:
            raise InvalidModelPath(
                f"'{shown(path)}' leads through a symlink that leaves the models directory.",
                param="model",
            ) from error
        raise _refused(path, error) from error
    finally:
        await services.inventory.refresh()


def _refused(model: str, error: OSError) -> GatewayError:
    if error.errno == errno.ENOENT:  # somebody else was faster; nothing of it was moved
        return ModelNotFound(f"'{shown(model)}' is not there any more.", param="model")
    reason = os.strerror(error.errno) if error.errno else "it fails"
    return ModelsDirUnusable(
        f"'{shown(model)}' cannot be deleted: {reason}. Let the user that the server runs as "
        "write to the models directory.",
        param="model",
        detail=str(error),
    )


def _told(services: Services, model: str, deleted: Deleted) -> DeletedModel:
    services.bus.publish("model", "model_remove", {"id": model})
    until = None if deleted.until is None else lists.iso(deleted.until.timestamp())
    return DeletedModel(
        model=model,
        files=[f"{VIRTUAL_ROOT}/{path}" for path in deleted.files],
        freed_bytes=deleted.freed_bytes,
        freed_gb=round(deleted.freed_bytes / lists.GIB, 2),
        trash_until=until,
        message=f"{len(deleted.files)} file(s) deleted."
        if until is None
        else f"{len(deleted.files)} file(s) are in the trash until {until}.",
    )
