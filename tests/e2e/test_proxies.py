"""Downloads of a hub that only a proxy reaches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Serve
from tests.fakes.proxy import FarHub, ForwardProxy, far_certificate
from tests.fetching import MIB, WEIGHTS, add_big, ask, check_published, job_of, until
from tests.waiting import wait_for

TOKEN = "hf_far"
PASSWORD = "hunter2"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_hub_behind_a_proxy(serve: Serve, tmp_path: Path, scheme: str) -> None:
    certificate = far_certificate(tmp_path) if scheme == "https" else None
    with ForwardProxy("me", PASSWORD) as proxy, FarHub(proxy, certificate) as hub:
        add_big(hub, "Org/Far", 4 * MIB, gated=True, token=TOKEN)
        environment = {"HF_TOKEN": TOKEN, f"{scheme}_proxy": proxy.url, "no_proxy": ""}
        if certificate is not None:
            environment["SSL_CERT_FILE"] = str(certificate)
        server = serve(hf_endpoint=hub.url, environment=environment)
        job = ask(server, "Org/Far")
        until(server, job["job_id"], "completed")
        check_published(server, hub, "Org/Far", "far")
        assert {asked.host for asked in hub.requests(WEIGHTS)} == {"hub", "cdn"}
        assert hub.authorizations("hub") == {f"Bearer {TOKEN}"}
        assert hub.authorizations("cdn") == set()
        if certificate is not None:
            assert proxy.methods() == {"CONNECT"}
            assert TOKEN not in repr(proxy.asked)

        add_big(hub, "Org/Later", MIB, gated=True, token=TOKEN)
        del proxy.hosts["cdn.test:443" if certificate is not None else "cdn.test:80"]
        job = ask(server, "Org/Later")
        wait_for(lambda: proxy.name in job_of(server, job["job_id"])["message"])
        assert "502" in job_of(server, job["job_id"])["message"]
        told = json.dumps(job_of(server, job["job_id"])) + server.log()
        assert PASSWORD not in told
        assert TOKEN not in told
