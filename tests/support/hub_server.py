"""A stand-in of the hub's HTTP API, not the hub: what an upload by huggingface_hub 2.4 asks of it.

It follows that client and the hub's documents, and was never compared with the hub itself. It has
the routes of git-lfs, by which the client uploads with HF_HUB_DISABLE_XET=1. By default the client
sends large files by xet instead, a protocol of chunks in a binary of its own (hf_xet), which is not
here: the rest of an upload is the same.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LARGE = re.compile(r".*\.(safetensors|bin|model)")


@dataclass
class Repository:
    """A repository's files by branch, and the messages of its commits."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(
        default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list[str] = field(default_factory=list)


class HubServer:
    """The stand-in's state.

    writers: the owner that each token may write for; other tokens are unknown. faults: statuses by
    a pattern of method and path: answered so, in place of the route; 0: never answered. requests:
    method and path of each. blobs: what came by git-lfs, by its sha256; received: those in order.
    """

    def __init__(self) -> None:
        self.writers = {"hf_writer": "owner", "hf_reader": ""}
        self.repositories: dict[str, Repository] = {}
        self.faults: dict[str, int] = {}
        self.requests: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.received: list[str] = []
        self.endpoint = ""
        self.ending = threading.Event()

    @contextlib.contextmanager
    def serving(self) -> Iterator[HubServer]:
        """Answer on a free port of this machine."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.ending.set()
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        self.body = self._read_body()
        for pattern, status in self.hub.faults.items():
            if re.search(pattern, request):
                if status == 0:
                    self.hub.ending.wait()
                    self.close_connection = True
                else:
                    self._answer(status, {"error": f"as told: {status}"})
                return
        if path.startswith("/blobs/"):
            # The storage behind the hub, which asks for no token.
            self._store(path.removeprefix("/blobs/"))
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.writers:
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
            return
        self.owner = self.hub.writers[token]
        for pattern, route in ROUTES.items():
            if match := re.fullmatch(pattern, request):
                route(self, *match.groups())
                return
        self._answer(404, {"error": f"no route for {request}"})

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, value: object, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)),
                           **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def _files(self, name: str, branch: str, write: bool = True) -> dict[str, bytes] | None:
        """The files of a branch; None, and answered, where there are none for this token."""
        repository, owner = self.hub.repositories.get(name), name.partition("/")[0]
        if repository is None or (repository.private and owner != self.owner):
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif write and owner != self.owner:
            self._answer(403, {"error": f"You don't have the right to write to {owner}"})
        elif branch not in repository.branches:
            self._answer(404, {"error": f"no branch {branch}"}, X_Error_Code="RevisionNotFound")
        else:
            return repository.branches[branch]
        return None

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if asked["organization"] != self.owner:
            self._answer(403, {"error": "You don't have the right to create a model there"})
        elif name in self.hub.repositories:
            self._answer(409, {"error": "You already created this model repo", **url})
        else:
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.hub.repositories[name] = Repository(private)
            self._answer(200, url)

    def _info(self, name: str, branch: str | None) -> None:
        files = self._files(name, branch or "main", write=False)
        if files is not None:
            self._answer(200, {
                "id": name, "modelId": name, "sha": "0" * 40, "tags": [],
                "private": self.hub.repositories[name].private,
                "siblings": [{"rfilename": path} for path in files]})

    def _branch(self, name: str, branch: str) -> None:
        files = self._files(name, "main")
        if files is None:
            return
        branches = self.hub.repositories[name].branches
        if branch in branches:
            self._answer(409, {"error": "Reference already exists"})
        else:
            branches[branch] = dict(files)
            self._answer(200, {})

    def _validate(self) -> None:
        """Of what the hub checks: a mapping, and a license of its list."""
        text = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        data = yaml.safe_load(block[1]) if block else {}
        licenses = (None, "apache-2.0", "mit", "llama3.2", "other")
        errors = []
        if not isinstance(data, dict):
            errors.append("metadata must be a mapping")
        elif data.get("license") not in licenses:
            errors.append('"license" must be one of the list')
        self._answer(400 if errors else 200,
                     {"errors": [{"message": message} for message in errors], "warnings": []})

    def _preupload(self, name: str, branch: str) -> None:
        files = self._files(name, branch)
        if files is None:
            return
        answers = []
        for each in json.loads(self.body)["files"]:
            path, is_large = each["path"], LARGE.fullmatch(each["path"])
            old = files.get(path)
            oid = None if old is None else (hashlib.sha256(old) if is_large else hashlib.sha1(
                b"blob %d\0" % len(old) + old)).hexdigest()
            answers.append({"path": path, "uploadMode": "lfs" if is_large else "regular",
                            "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": answers})

    def _batch(self, name: str) -> None:
        if self._files(name, "main") is None:
            return
        self._answer(200, {"transfer": "basic", "objects": [
            {**each} if each["oid"] in self.hub.blobs else
            {**each, "actions": {"upload": {"href": f"{self.hub.endpoint}/blobs/{each['oid']}"}}}
            for each in json.loads(self.body)["objects"]]})

    def _store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._answer(400, {"error": "another content"})
            return
        self.hub.blobs[oid] = self.body
        self.hub.received.append(oid)
        self._answer(200, {})

    def _commit(self, name: str, branch: str) -> None:
        files = self._files(name, branch)
        if files is None:
            return
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.repositories[name].commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                raise AssertionError(f"nothing is to be deleted: {line}")
        self._answer(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{'0' * 40}",
                           "commitOid": "0" * 40, "success": True})


NAME = r"([^/ ]+/[^/ ]+)"
ROUTES = {
    r"POST /api/repos/create": _Handler._create,
    rf"GET /api/models/{NAME}(?:/revision/(.+))?": _Handler._info,
    rf"POST /api/models/{NAME}/branch/(.+)": _Handler._branch,
    r"POST /api/validate-yaml": _Handler._validate,
    rf"POST /api/models/{NAME}/preupload/(.+)": _Handler._preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": _Handler._batch,
    rf"POST /api/models/{NAME}/commit/(.+)": _Handler._commit,
}
