"""Every call as /openapi.json describes it, with whatever schemathesis makes of the description."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CheckContext
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server import MODEL, Server, check_error, models_dir, ok

CALL_TIMEOUT_S = 30.0  # a hang is a failure; a load may take its time
MAX_EXAMPLES = 100
EXERCISED = {
    "POST /v1/models/load",
    "GET /v1/models/load/{load_id}",
    "DELETE /v1/models/load/{load_id}",
    "POST /v1/models/plan",
    "POST /v1/models/pin",
    "GET /v1/system",
    "GET /v1/logs",
    "GET /models",
    "POST /models/load",
    "POST /models/unload",
    "GET /props",
    "GET /running",
    "GET /unload",
    "POST /api/models/unload/{model}",
    "GET /logs",
}
# Streams that do not end are not waited for; what /upstream answers is the engine's to describe.
ENDLESS = ("/v1/events", "/models/sse", "/logs/stream", "/logs/stream/{monitor}")
SMALL = {"n_ctx": 1024, "n_parallel": 2, "max_tokens": 4, "max_completion_tokens": 4, "n": 2}


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("schema")
    nowhere = "http://127.0.0.1:9"  # a hub that is not there: nothing leaves this machine
    with Server(models_dir(root / "models"), root / "data", hf_endpoint=nowhere) as server:
        yield server


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_answers_are_as_described(
    described: Server, subtests: pytest.Subtests, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{described.url}/openapi.json")
    finite = schema.exclude(path=list(ENDLESS)).exclude(path="/upstream/{path}")
    operations = [found.ok() for found in finite.get_all_operations()]
    assert {operation.label for operation in operations} >= EXERCISED
    assert len(operations) >= 24
    if mode is GenerationMode.NEGATIVE:  # what takes no body cannot be asked wrongly
        operations = [operation for operation in operations if operation.body]
    for operation in operations:
        with subtests.test(operation.label), requests.Session() as session:
            session.trust_env = False  # no proxy between us
            call_as_described(operation, mode, session)
            assert described.process.is_running()


def call_as_described(operation: Any, mode: GenerationMode, session: requests.Session) -> None:
    @settings(
        max_examples=MAX_EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),  # a failure is shown as it was found
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: schemathesis.Case) -> None:
        steer(case)
        case.call_and_validate(
            session=session,
            timeout=CALL_TIMEOUT_S,
            checks=[
                status_code_conformance,
                content_type_conformance,
                response_headers_conformance,
                response_schema_conformance,
                errors_are_ours,
            ],
        )

    call()


def steer(case: schemathesis.Case) -> None:
    """Let half of the calls reach an engine, and keep what they ask of it small."""
    body = case.body
    if not isinstance(body, dict):
        return
    if len(repr(body)) % 2:
        body["model"] = MODEL
    for name, most in SMALL.items():
        if isinstance(body.get(name), int) and body[name] > most:
            body[name] = most
    for name in ("max_tokens", "max_output_tokens"):
        if body.get(name) is None:
            body[name] = 2


def errors_are_ours(
    ctx: CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """A 500 is described, and is a bug all the same; so is an error without its face."""
    assert response.status_code != 500, response.text
    if response.status_code >= 400:
        body = response.json()
        check_error(body, body["error"]["code"])


def test_server_is_well_after_all_that(described: Server) -> None:
    assert ok(described.get("/health"))["status"] == "healthy"
    assert ok(described.chat())
    stats = described.stats()
    assert stats["active_requests"] == 0
    assert stats["hits"] > 100  # many calls reached an engine
    assert "Traceback" not in described.log()
