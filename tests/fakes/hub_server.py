"""A fake hub's and its CDN's answers: metadata, files, and who may have them."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.fakes.hub_body import range_of, send_body
from tests.fakes.hub_content import Commit, File, Repo
from tests.fakes.hub_faults import (
    HTML,
    Fault,
    Host,
    Html,
    IgnoreRange,
    NeedsRange,
    Refuse,
    WrongLength,
)

if TYPE_CHECKING:
    from tests.fakes.hub import Hub

_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|paths-info|auth-check)(?:/(.*))?)?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_CDN = re.compile(r"/([^/]+/[^/]+)/([0-9a-f]{64})")


@dataclass(frozen=True)
class Asked:
    """One request as it came. `file` is the path in the repository, if it was for one."""

    host: Host
    method: str
    target: str
    file: str | None
    range: str | None
    authorization: str | None


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, server: Server) -> None:
        self.owner = server
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", server.port), _Call)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        if _lingers(request):
            request.close()  # with a reset, and no FIN before it
        else:
            super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        """Say nothing: who cuts a connection is what these tests are about."""


class Server:
    """One of the two, which can be taken down and comes up at the same port."""

    def __init__(self, hub: Hub, host: Host) -> None:
        self.hub, self.host, self.port = hub, host, 0
        self._listener: _Listener | None = None
        self._thread: threading.Thread | None = None

    def up(self) -> None:
        if self._listener is not None:
            return
        self._listener = _Listener(self)
        self.port = self._listener.server_port
        self._thread = threading.Thread(
            target=self._listener.serve_forever, args=(0.01,), daemon=True
        )
        self._thread.start()

    def down(self) -> None:
        listener, thread = self._listener, self._thread
        if listener is None or thread is None:
            return
        self._listener = None
        listener.shutdown()
        thread.join(5)
        listener.server_close()
        for connection in list(listener.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _lingers(connection: socket.socket) -> bool:
    try:
        value = connection.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
    except OSError:
        return False
    return struct.unpack("ii", value) == (1, 0)


class _Call(BaseHTTPRequestHandler):
    """One request under way."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener
    repo_id = ""

    def setup(self) -> None:
        super().setup()
        self.hub = self.server.owner.hub
        self.host: Host = self.server.owner.host

    def log_message(self, *_: object) -> None:
        """Say nothing: the output is for the tests."""

    def do_GET(self) -> None:
        self._take()

    def do_HEAD(self) -> None:
        self._take()

    def do_POST(self) -> None:
        self._take()

    def _take(self) -> None:
        self.sent: bytes = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.parts = urlsplit(self.path)
        self.query = parse_qs(self.parts.query, keep_blank_values=True)
        resolve, cdn = _RESOLVE.fullmatch(self.parts.path), _CDN.fullmatch(self.parts.path)
        file = unquote(resolve[3]) if resolve else self.query.get("file", [None])[0]
        headers = self.headers
        asked = Asked(
            self.host, self.command, self.path, file, headers["range"], headers["authorization"]
        )
        self.hub.asked.append(asked)
        try:
            if self.host == "cdn":
                self._answer_cdn(cdn)
            elif resolve:
                self._answer_file(unquote(resolve[1]), unquote(resolve[2]), unquote(resolve[3]))
            else:
                self._answer_api()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    # What is said

    def say(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        kind: str = "application/json",
    ) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say_error(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.say(status, json.dumps({"error": message}).encode(), headers)

    def _refused(self, faults: Iterable[Fault]) -> bool:
        for fault in faults:
            if isinstance(fault, Refuse):
                headers = {"X-Error-Code": fault.code} if fault.code else {}
                if fault.retry_after_s is not None:
                    headers["Retry-After"] = f"{fault.retry_after_s:g}"
                self.say(fault.status, b'{"error": "as told"}', headers)
                return True
        return False

    # Who may

    def _token(self) -> str | None:
        header = self.headers["authorization"]
        return header.removeprefix("Bearer ") if header else None

    def _repo(self, repo_id: str, *, content: bool) -> Repo | None:
        """Find the repository if the caller may see it; else say why not. `content`: its files."""
        token, repo = self._token(), self.hub.repos.get(repo_id)
        if token is not None and token not in self.hub.tokens:
            self.say_error(401, None, "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and token != repo.token):
            status = 401 if token is None else 404
            self.say_error(status, "RepoNotFound", "Repository not found")
        elif content and repo.gated and (token is None or token != repo.token):
            status = 401 if token is None else 403
            message = f"Access to model {repo_id} is restricted. Visit its page to ask for access."
            self.say_error(status, "GatedRepo", message)
        else:
            return repo
        return None

    def _commit(self, repo: Repo, revision: str) -> Commit | None:
        commit = repo.find(revision)
        if commit is None:
            self.say_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Metadata

    def _answer_api(self) -> None:
        match = _API.fullmatch(self.parts.path)
        if match is None:
            return self.say_error(404, "RepoNotFound", "Sorry, we can't find the page")
        repo_id, what, rest = unquote(match[1]), match[2], unquote(match[3] or "")
        if self._refused(self.hub.take_faults(repo_id, "api", "hub", body=False)):
            return None
        repo = self._repo(repo_id, content=what == "auth-check")
        if repo is None:
            return None
        if what == "auth-check":
            return self.say(200, b"{}")
        revision, _, folder = rest.partition("/") if what == "tree" else (rest, "", "")
        commit = self._commit(repo, revision or "main")
        if commit is None:
            return None
        if what == "tree":
            return self._say_tree(commit, folder)
        if what == "paths-info":
            wanted = parse_qs(self.sent.decode()).get("paths", [])
            return self._say_json([e for e in commit.entries() if e["path"] in wanted])
        return self._say_json(self._model_info(repo, commit))

    def _say_json(self, body: object, headers: Mapping[str, str] | None = None) -> None:
        self.say(200, json.dumps(body).encode(), headers)

    def _model_info(self, repo: Repo, commit: Commit) -> dict[str, Any]:
        blobs = self.query.get("blobs", ["false"])[0].lower() == "true"
        date = "2026-01-02T03:04:05.000Z"
        return {
            "_id": commit.sha[:24],
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.partition("/")[0],
            "sha": commit.sha,
            "private": repo.private,
            "gated": "auto" if repo.gated is True else repo.gated,
            "disabled": False,
            "downloads": 1,
            "likes": 0,
            "tags": [f"license:{repo.license}"] if repo.license else [],
            "cardData": {"license": repo.license} if repo.license else None,
            "lastModified": date,
            "createdAt": date,
            "siblings": [file.sibling(blobs=blobs) for file in commit.files.values()],
        }

    def _say_tree(self, commit: Commit, folder: str) -> None:
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        start = int(self.query.get("cursor", ["0"])[0])
        prefix = f"{folder}/" if folder else ""
        entries = [
            entry
            for entry in commit.entries()
            if entry["path"].startswith(prefix)
            and (recursive or "/" not in entry["path"][len(prefix) :])
        ]
        end = start + self.hub.page_entries
        headers = {}
        if end < len(entries):
            where = (
                f"{self.hub.url}{self.parts.path}?recursive={str(recursive).lower()}&cursor={end}"
            )
            headers["Link"] = f'<{where}>; rel="next"'
        self._say_json(entries[start:end], headers)

    # Files

    def _answer_file(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id, content=True)
        commit = self._commit(repo, revision) if repo is not None else None
        if commit is None:
            return None
        file = commit.files.get(path)
        if file is None:
            return self.say_error(404, "EntryNotFound", "Entry not found")
        faults: list[Fault] = []
        if self.command != "HEAD":
            faults = self.hub.take_faults(repo_id, path, "hub", body=not file.lfs)
        if self._refused(faults):
            return None
        headers = {"X-Repo-Commit": commit.sha}
        if file.lfs:
            query = f"file={quote(path)}&{self.hub.signatures.sign(file.blob.sha256)}"
            headers |= {
                "Location": f"{self.hub.cdn_url}/{repo_id}/{file.blob.sha256}?{query}",
                "X-Linked-Size": str(file.size),
                "X-Linked-ETag": f'"{file.blob.sha256}"',
                "ETag": f'"{file.blob_id}"',
                "Accept-Ranges": "bytes",
            }
            return self.say(302, b"", headers, kind="text/plain")
        self.repo_id = repo_id
        return self._say_bytes(file, headers, faults)

    def _answer_cdn(self, match: re.Match[str] | None) -> None:
        path = self.query.get("file", [""])[0]
        repo = self.hub.repos.get(unquote(match[1])) if match else None
        commits = repo.commits.values() if repo else ()
        files = [file for commit in commits if (file := commit.files.get(path))]
        file = next((file for file in files if match and file.blob.sha256 == match[2]), None)
        if file is None or repo is None:
            return self.say(404, b"<Error><Code>NoSuchKey</Code></Error>", kind="application/xml")
        faults = self.hub.take_faults(repo.id, path, "cdn", body=self.command != "HEAD")
        if self._refused(faults):
            return None
        if not self.hub.signatures.valid(file.blob.sha256, self.query):
            return self.say(
                403, b"<Error><Code>AccessDenied</Code></Error>", kind="application/xml"
            )
        self.repo_id = repo.id
        return self._say_bytes(file, {}, faults)

    def _say_bytes(self, file: File, headers: dict[str, str], faults: list[Fault]) -> None:
        kinds = {type(fault) for fault in faults}
        if Html in kinds:
            return self.say(200, HTML, headers, kind="text/html")
        size = file.size + sum(fault.by for fault in faults if isinstance(fault, WrongLength))
        asked = None if IgnoreRange in kinds else self.headers["range"]
        if asked is None and NeedsRange in kinds:
            return self.say(400, b"a range is needed", kind="text/plain")
        span = range_of(asked, size) if asked is not None else (0, size)
        if span is None:
            return self.say(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        start, end = span
        self.send_response(200 if asked is None else 206)
        headers |= {"ETag": f'"{file.etag}"', "Content-Length": str(end - start)}
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if asked is not None:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            whole = send_body(self.connection, file, start, end, faults, self._sent)
            self.close_connection |= not whole
        return None

    def _sent(self, file: File, size: int) -> None:
        self.hub.count_served(self.repo_id, file.path, size)

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()
