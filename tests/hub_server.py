"""The smallest server that huggingface_hub's own client takes for the Hub: loopback only, everything in memory.

Of the implementations that can be installed, one is a client of a binary that is not, the others only pass downloads on.
Files above `regular` bytes go through the LFS protocol, as on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITE, READ = "hf_write", "hf_read"


@dataclass
class Repository:
    """Branches, each a list of commits; a commit maps names to contents."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


class Hub:
    """The server's state, and switches by which tests make it fail."""

    def __init__(self, regular: int = 1000) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.unknown: list[str] = []
        self.regular = regular
        self.cut_uploads = 0
        self.cut_commits = 0
        self.cut_downloads = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository; empty where it has no commit."""
        repository = self.repositories[name]
        return repository.commits[repository.branches.get(revision, revision)]

    def commit(self, name: str, files: dict[str, bytes], revision: str = "main", message: str = "") -> str:
        """Add a commit; None removes nothing."""
        repository = self.repositories.setdefault(name, Repository())
        before = repository.commits.get(repository.branches.get(revision, ""), {})
        oid = hashlib.sha1(f"{name}{len(repository.commits)}{revision}".encode()).hexdigest()
        repository.commits[oid] = {**before, **files}
        repository.branches[revision] = oid
        repository.messages.append(message)
        return oid


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    # -- routes ---------------------------------------------------------------------------------------------------

    def _route(self, method: str) -> None:
        parts = urlsplit(self.path)
        self.asked = dict(p.partition("=")[::2] for p in parts.query.split("&") if p)
        routes = {
            r"GET /api/whoami-v2": self._whoami,
            r"POST /api/validate-yaml": self._validate,
            r"POST /api/repos/create": self._create,
            r"POST /api/models/(.+?/.+?)/branch/(.+)": self._branch,
            r"POST /api/models/(.+?/.+?)/preupload/(.+)": self._preupload,
            r"POST /api/models/(.+?/.+?)/commit/(.+)": self._commit,
            r"GET /api/models/(.+?/.+?)/revision/(.+)": self._info,
            r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)(/.+)?": self._tree,
            r"GET /api/models/([^/]+/[^/]+)": self._info,
            r"POST /(.+?/.+?)\.git/info/lfs/objects/batch": self._batch,
            r"PUT /blobs/([0-9a-f]{64})": self._upload,
            r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._resolve,
        }
        for pattern, answer in routes.items():
            match = re.fullmatch(pattern, f"{method} {parts.path}")
            if match:
                answer(*(unquote(one) for one in match.groups() if one is not None))
                return
        if re.match("/api/(models|repos)/|/.*(resolve|git)/", self.path):  # the client also asks what it can do without
            self.hub.unknown.append(f"{method} {self.path}")
        self._body()
        self._error(404, "EntryNotFound")

    def _whoami(self) -> None:
        if self._permission() is None:
            self._error(401, None)
            return
        self._json({"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": self._permission()}}})

    def _validate(self) -> None:
        assert json.loads(self._body())["content"].startswith("---")
        self._json({"errors": [], "warnings": []})

    def _create(self) -> None:
        asked = json.loads(self._body())
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self._may_write(name):
            return
        if name in self.hub.repositories:
            self._error(409, None, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=bool(private))
        self.hub.commit(name, {".gitattributes": b""}, message="initial commit")
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": "1"})

    def _branch(self, name: str, branch: str) -> None:
        self._body()
        if not self._may_write(name):
            return
        branches = self.hub.repositories[name].branches
        if branch in branches:
            self._error(409, None, {"error": "Reference already exists"})
            return
        branches[branch] = branches["main"]
        self._json({})

    def _preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self._body())
        if not self._may_write(name) or self._commit_of(name, revision) is None:
            return
        modes = [
            {
                "path": one["path"],
                "shouldIgnore": False,
                "uploadMode": "lfs" if one["size"] > self.hub.regular else "regular",
            }
            for one in asked["files"]
        ]
        self._json({"files": modes})

    def _batch(self, name: str) -> None:
        asked = json.loads(self._body())
        if not self._may_write(name):
            return
        objects = []
        for one in asked["objects"]:
            known = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.blobs:
                known["actions"] = {"upload": {"href": f"{self.hub.url}/blobs/{one['oid']}"}}
            objects.append(known)
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> None:
        if self.hub.cut_uploads:
            self.hub.cut_uploads -= 1
            self.rfile.read(500)
            self._cut()
            return
        body = self._body()
        if hashlib.sha256(body).hexdigest() != oid:
            self._error(400, None)
            return
        self.hub.uploads.append(oid)
        self.hub.blobs[oid] = body
        self._json({})

    def _commit(self, name: str, revision: str) -> None:
        if self.hub.cut_commits:
            self.hub.cut_commits -= 1
            self.rfile.read(500)
            self._cut()
            return
        lines = [json.loads(line) for line in self._body().splitlines()]
        if not self._may_write(name) or self._commit_of(name, revision) is None:
            return
        files, message = {}, ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        target = "refs/pr/1" if self.asked.get("create_pr") else revision
        oid = self.hub.commit(name, files, target, message)
        done = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}
        if self.asked.get("create_pr"):
            done["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/1"
        self._json(done)

    def _info(self, name: str, revision: str = "main") -> None:
        oid = self._readable(name, revision)
        if oid is None:
            return
        repository = self.hub.repositories[name]
        siblings = [{"rfilename": path} for path in repository.commits[oid]]
        self._json(
            {"id": name, "modelId": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []}
        )

    def _tree(self, name: str, revision: str, folder: str = "") -> None:
        oid = self._readable(name, revision)
        if oid is None:
            return
        if folder:  # no folder is ever published
            self._error(404, "EntryNotFound")
            return
        files = self.hub.repositories[name].commits[oid]
        self._json(
            [{"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()} for k, v in files.items()]
        )

    def _resolve(self, name: str, revision: str, path: str) -> None:
        oid = self._readable(name, revision)
        if oid is None:
            return
        content = self.hub.repositories[name].commits[oid].get(path)
        if content is None:
            self._error(404, "EntryNotFound", commit=oid)
            return
        first, status = 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", ""))
        if asked:
            first, status = int(asked[1]), 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", oid)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut_downloads and len(content) > self.hub.regular:
            self.hub.cut_downloads -= 1
            self.wfile.write(content[first : first + len(content) // 2])
            self._cut()
            return
        self.wfile.write(content[first:])

    # -- what routes share ------------------------------------------------------------------------------------------

    def _permission(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return {WRITE: "write", READ: "read"}.get(token)

    def _may_write(self, name: str) -> bool:
        permission = self._permission()
        if permission is None:
            self._error(401, None, {"error": "Invalid username or password."})
        elif permission != "write" or not name.startswith("me/"):
            self._error(
                403, None, {"error": "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"}
            )
        else:
            return True
        return False

    def _readable(self, name: str, revision: str) -> str | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._permission() is None):
            self._error(401, "RepoNotFound", {"error": "Repository not found"})
            return None
        return self._commit_of(name, revision)

    def _commit_of(self, name: str, revision: str) -> str | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._error(404, "RepoNotFound")
            return None
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            self._error(404, "RevisionNotFound")
            return None
        return oid

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str | None, value: Any = None, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code} if code else {}
        if commit:
            headers["X-Repo-Commit"] = commit
        self._json(value or {"error": code or str(status)}, status, headers)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)
