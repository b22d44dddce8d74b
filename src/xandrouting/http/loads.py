"""Loads by wish, and those among them that nobody waits for."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from xandrouting.core.errors import GatewayError, InvalidRequest, ModelNotLoaded, NotFound
from xandrouting.http import lists
from xandrouting.http.decisions import loading_item
from xandrouting.http.errors import body_of
from xandrouting.http.inference import InferenceApi
from xandrouting.http.schemas import ErrorInfo, LoadedItem, LoadJob
from xandrouting.pool.pool import Claim, EnginePool
from xandrouting.proxy.request import LoadRequest

KEPT_JOBS: Final = 1000  # those that ended; the oldest is forgotten first


@dataclass(slots=True)
class Job:
    """A load that goes on by itself."""

    id: str
    claim: Claim
    spelling: str
    task: asyncio.Task[None] | None = None
    ended: str | None = None  # `ready`, `failed` or `cancelled`; None: under way
    error: GatewayError | None = None


class Loads:
    """Begins loads and remembers those that were begun without waiting."""

    def __init__(self, inference: InferenceApi, pool: EnginePool) -> None:
        self._inference = inference
        self._pool = pool
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    async def begin(self, wanted: LoadRequest, *, wait_s: float | None) -> Claim:
        """Ask for the engine; after `wait_s` the claim is refused.

        Raises:
            GatewayError: no such model, or it cannot be loaded.
        """
        route = await self._inference.route(wanted, embeddings=wanted.embeddings is True)
        return self._pool.claim(
            route.spec,
            ttl_s=route.ttl_s,
            wait_s=wait_s,
            queue_wait_s=self._inference.max_queue_wait_s,
            spelling=wanted.model,
            works=False,
        )

    async def finish(self, claim: Claim) -> LoadedItem:
        """Wait for the engine, let it idle, and describe it."""
        try:
            engine = await claim.granted()
        finally:
            claim.release()
        found = self._pool.view(claim.key)
        if found is None or found[1] is not engine:
            raise ModelNotLoaded(f"{claim.key.model} was unloaded again before this answer.")
        return lists.loaded_item(*found, now=asyncio.get_running_loop().time())

    async def start(self, wanted: LoadRequest) -> Job:
        """Begin a load that goes on by itself, for as long as it takes.

        Raises:
            GatewayError: no such model, or it can be known already that it will not load.
        """
        claim = await self.begin(wanted, wait_s=None)
        if claim.error is not None:
            claim.release()
            raise claim.error
        job = Job(f"load_{secrets.token_hex(8)}", claim, wanted.model)
        self._jobs[job.id] = job
        while len(self._jobs) > KEPT_JOBS:
            oldest = next((old for old in self._jobs.values() if old.ended is not None), None)
            if oldest is None:
                break
            del self._jobs[oldest.id]
        if claim.engine is not None:
            await self._see_through(job)
        else:
            job.task = asyncio.create_task(self._see_through(job))
        return job

    def job(self, load_id: str) -> Job:
        """Return a job.

        Raises:
            NotFound: there is none, or it is long over.
        """
        job = self._jobs.get(load_id)
        if job is None:
            raise NotFound("There is no such load. It may have ended long ago.")
        return job

    def under_way(self, model: str) -> list[Job]:
        """Return the loads of a model, by its canonical id, that nobody waits for."""
        return [
            job for job in self._jobs.values() if job.ended is None and job.claim.key.model == model
        ]

    async def cancel(self, load_id: str) -> Job:
        """Take a load back. It ends unless somebody else waits for the model.

        Raises:
            NotFound: there is none.
            InvalidRequest: it is over.
        """
        job = self.job(load_id)
        if job.ended is not None or job.claim.engine is not None:
            raise InvalidRequest(
                f"The load of {job.claim.key.model} is over. POST /v1/models/unload unloads it."
            )
        job.ended = "cancelled"
        job.claim.release(cancel=True)
        assert job.task is not None  # it is under way
        job.task.cancel()
        await asyncio.wait({job.task})
        return job

    async def aclose(self) -> None:
        """Wait for nobody any more; the engines are the pool's to end."""
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def job_item(self, job: Job) -> LoadJob:
        """Describe a job."""
        claim = job.claim
        state = job.ended
        if state is None:
            found = self._pool.view(claim.key)
            state = "queued" if found is None else str(found[0].state)
        error = None if job.error is None else ErrorInfo(**body_of(job.error)["error"])
        under_way = job.ended is None
        return LoadJob(
            load_id=job.id,
            model=job.spelling,
            path=claim.key.model,
            state=state,
            queue_position=self._pool.queue_position(claim) if under_way else None,
            loading=loading_item(self._pool.loading(claim.key)) if under_way else None,
            error=error,
        )

    async def _see_through(self, job: Job) -> None:
        try:
            await self.finish(job.claim)
        except GatewayError as error:  # the pool logged it, and the model's status tells
            job.ended, job.error = "failed", error
        else:
            job.ended = "ready"
