"""What becomes of a download that is complete: a model that is listed, and loaded if asked."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from xandrouting.core.errors import GatewayError
from xandrouting.downloads.jobs import Job
from xandrouting.downloads.movers import Arrived
from xandrouting.http.loads import Loads
from xandrouting.inventory.inventory import Inventory
from xandrouting.inventory.model_file import VIRTUAL_ROOT, ModelFile
from xandrouting.proxy.request import LoadRequest

log = logging.getLogger(__name__)


async def model_of(inventory: Inventory, job: Job) -> Arrived:
    """Look at the models directory, and return the model that a job's files are."""
    snapshot = await inventory.refresh()
    order = job.order
    folder = f"{VIRTUAL_ROOT}/{order.destination}"
    fetched = {f"{order.destination}/{file.path}" for file in order.files}
    found = [
        model
        for model in snapshot.models
        if model.id == folder or model.id.startswith(f"{folder}/")
        if any(part.relative in fetched for part in model.files)
    ]
    whole = [model for model in found if model.problem is None]
    if len(whole) == 1:
        return Arrived(whole[0].id)
    return Arrived(None, _why_not(folder, found, whole))


def _why_not(folder: str, found: list[ModelFile], whole: list[ModelFile]) -> str:
    if whole:
        names = ", ".join(model.id for model in whole[:10])
        return f"Complete. {folder} holds {len(whole)} models: {names}."
    if found:
        return f"Complete, but {found[0].id} cannot be loaded: {found[0].problem}."
    return f"Complete in {folder}. None of its files is a model by itself."


async def load(loads: Loads, model: str, options: Mapping[str, Any]) -> str | None:
    """Begin to load a model, and return what there is to say if that cannot be."""
    try:
        await loads.start(LoadRequest(model=model, **options))
    except GatewayError as error:
        log.warning("load after download failed model=%s %s", model, error.message)
        return f"Complete, but {model} was not loaded: {error.message}"
    return None
