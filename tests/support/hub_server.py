# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A stand-in for the Hugging Face Hub, spoken to over HTTP: what pushing and pulling models asks of the real one.

Set HF_ENDPOINT to `HubServer.url` and HF_HUB_DISABLE_XET=1 before huggingface_hub is imported, so in a process of its
own; `start_hub` does it for the process that calls it. The answers (status, headers, bodies) follow the real Hub: 404
and 401 with X-Error-Code, safetensors as LFS whatever their size, commits as NDJSON, 412 when the parent of a commit
is no longer the head.

    python tests/support/hub_server.py SCRIPT [ARGUMENTS]

runs a script with such a Hub, where it is logged in as "user", and shows what the Hub has at the end.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import runpy
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from tempfile import TemporaryDirectory
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


FRONT_MATTER = re.compile(r"^\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
MODEL_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True)
class Blob:
    """A file of a commit; `lfs` if its content came by LFS."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What the client compares with its own file: SHA-256 for LFS, the git hash otherwise."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool
    # commits: oid -> (message, files); refs: branch or pull request -> oid
    commits: dict[str, tuple[str, dict[str, Blob]]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, message: str, files: dict[str, Blob]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {ref} {message}".encode()).hexdigest()
        self.commits[oid] = (message, files)
        self.refs[ref] = oid
        return oid

    def files(self, revision: str) -> dict[str, Blob]:
        return self.commits[self.refs.get(revision, revision)][1]


class Hub:
    """What the Hub holds. It outlives the servers that serve it.

    Attributes:
        tokens: the user that each token belongs to.
        repos: by id, "user/name".
        lfs: contents that were uploaded by LFS, in a commit or not, by SHA-256.
        requests: "METHOD path" of all requests.
    """

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []


class HubServer(ThreadingHTTPServer):
    """Serves a `Hub` on a free port of this machine, as a context manager.

    Args:
        hub: what it serves.
        dies_at: a regex for "METHOD path". At the first request that it matches, the server is gone: neither that
            request nor any later one is answered.
    """

    daemon_threads = True

    def __init__(self, hub: Hub, dies_at: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.dies_at, self.dead = hub, dies_at, False
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.server_address)

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.shutdown()
        self.server_close()


def start_hub(user: str) -> Hub:
    """Starts a Hub for this process, which is logged in as `user`. It ends with the process, as does its cache.

    Raises:
        RuntimeError: huggingface_hub is imported, and would go to the real Hub.
    """
    if "huggingface_hub" in sys.modules:
        raise RuntimeError("Restart Python or the kernel: huggingface_hub was imported, and would go to the real Hub.")
    server = HubServer(Hub({"hf_user": user}))
    server.cache = TemporaryDirectory(prefix="hub")  # kept as long as the server
    os.environ |= {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_user", "HF_HOME": server.cache.name}
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return server.__enter__().hub


class _Error(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    ROUTES = [
        ("POST", "/api/repos/create", "create"),
        ("DELETE", "/api/repos/delete", "delete"),
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/validate-yaml", "validate_yaml"),
        ("POST", "/api/models/{repo}/branch/{revision}", "branch"),
        ("POST", "/api/models/{repo}/preupload/{revision}", "preupload"),
        ("POST", "/api/models/{repo}/commit/{revision}", "commit"),
        ("GET", "/api/models/{repo}/tree/{revision}(?:/.*)?", "tree"),
        ("POST", "/api/models/{repo}/paths-info/{revision}", "paths_info"),
        ("GET", "/api/models/{repo}/refs", "list_refs"),
        ("GET", "/api/models/{repo}/revision/{revision}", "info"),
        ("GET", "/api/models/{repo}", "info"),
        ("POST", "/{repo}.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", "/lfs/{repo}/{oid}", "lfs_put"),
        ("GET", "/{repo}/resolve/{revision}/{path}", "resolve"),
        ("HEAD", "/{repo}/resolve/{revision}/{path}", "resolve"),
    ]
    PARTS = {"{repo}": r"(?P<repo>[\w.-]+/[\w.-]+?)", "{revision}": r"(?P<revision>[^/]+)", "{oid}": r"(?P<oid>\w+)"}

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        request = f"{self.command} {url.path}"
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with server.lock:
            server.dead = server.dead or bool(server.dies_at and re.search(server.dies_at, request))
            if server.dead:
                self.close_connection = True
                return
            server.hub.requests.append(request)
            self.query = parse_qs(url.query)
            try:
                self.user = self.authenticate()
                name, parts = self.route(url.path)
                getattr(self, f"do_{name}")(body, **parts)
            except _Error as error:
                headers = {"X-Error-Message": error.message}
                if error.code:
                    headers["X-Error-Code"] = error.code
                self.send(error.status, {"error": error.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def route(self, path: str) -> tuple[str, dict[str, str]]:
        for method, pattern, name in self.ROUTES:
            for part, regex in {**self.PARTS, "{path}": "(?P<path>.+)"}.items():
                pattern = pattern.replace(part, regex)
            match = re.fullmatch(pattern, path) if method == self.command else None
            if match:
                return name, {key: unquote(value) for key, value in match.groupdict().items()}
        raise _Error(404, f"Sorry, we can't find the page: {path}")

    def log_message(self, *args) -> None:
        pass

    def send(self, status: int, body: bytes | dict | list, headers: dict[str, str] | None = None) -> None:
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who may do what

    def authenticate(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.server.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise _Error(401, "Invalid credentials in Authorization header")
        return user

    def repo(self, name: str, write: bool = False) -> Repo:
        repo = self.server.hub.repos.get(name)
        owner = name.split("/")[0]
        if repo is None or repo.private and self.user != owner:
            # the Hub does not tell the two apart, and answers 401 to those who are not logged in
            raise _Error(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        # anybody who is logged in may open a pull request
        if write and self.user != owner and not ("create_pr" in self.query and self.user):
            raise _Error(403, "Forbidden: you don't have write access to this repository")
        return repo

    @staticmethod
    def resolve_revision(repo: Repo, revision: str) -> str:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # Accounts and repositories

    def do_whoami(self, body: bytes) -> None:
        if self.user is None:
            raise _Error(401, "Invalid username or password.")
        self.send(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def do_create(self, body: bytes) -> None:
        request = json.loads(body)
        name = f"{request.get('organization') or self.user}/{request['name']}"
        if self.user is None:
            raise _Error(401, "Invalid username or password.")
        if name.split("/")[0] != self.user:
            raise _Error(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        url = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.hub.repos:
            self.send(409, {**url, "error": "You already created this model repo"})
            return
        private = request.get("visibility") == "private" or bool(request.get("private"))
        repo = self.server.hub.repos[name] = Repo(private)
        repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        self.send(200, url)

    def do_delete(self, body: bytes) -> None:
        request = json.loads(body)
        name = f"{request.get('organization') or self.user}/{request['name']}"
        self.repo(name, write=True)
        del self.server.hub.repos[name]
        self.send(200, {})

    def do_branch(self, body: bytes, repo: str, revision: str) -> None:
        found = self.repo(repo, write=True)
        if revision in found.refs:
            self.send(409, {"error": f"Reference already exists: {revision}"})
            return
        start = (json.loads(body) if body else {}).get("startingPoint", "main")
        found.refs[revision] = self.resolve_revision(found, start)
        self.send(200, {})

    def do_list_refs(self, body: bytes, repo: str) -> None:
        refs = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in self.repo(repo).refs.items()
            if not name.startswith("refs/pr/")
        ]
        self.send(200, {"branches": refs, "converts": [], "tags": []})

    def do_info(self, body: bytes, repo: str, revision: str = "main") -> None:
        found = self.repo(repo)
        oid = self.resolve_revision(found, revision)
        siblings = [{"rfilename": path} for path in found.files(oid)]
        info = {"id": repo, "modelId": repo, "sha": oid, "private": found.private, "siblings": siblings, "tags": []}
        self.send(200, info)

    # Files

    def describe(self, path: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 130}
        return entry

    def do_tree(self, body: bytes, repo: str, revision: str) -> None:
        found = self.repo(repo)
        files = found.files(self.resolve_revision(found, revision))
        self.send(200, [self.describe(path, blob) for path, blob in files.items()])

    def do_paths_info(self, body: bytes, repo: str, revision: str) -> None:
        found = self.repo(repo)
        files = found.files(self.resolve_revision(found, revision))
        form = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        self.send(200, [self.describe(path, files[path]) for path in form["paths"] if path in files])

    def do_resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        found = self.repo(repo)
        oid = self.resolve_revision(found, revision)
        blob = found.files(oid).get(path)
        if blob is None:
            raise _Error(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "none"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        self.send(200, blob.content, headers)

    # Commits

    def do_validate_yaml(self, body: bytes) -> None:
        match = FRONT_MATTER.match(json.loads(body)["content"])
        errors, warnings = [], []
        try:
            data = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            data, errors = {}, [f"Invalid YAML: {error}"]
        if not data and not errors:
            warnings = ["empty or missing yaml metadata in repo card"]
        models = data.get("base_model") or []
        for model in models if isinstance(models, list) else [models]:
            if not MODEL_ID.match(str(model)):
                errors.append(f'"base_model" with value "{model}" is not valid. Use a model id from the Hub.')
        for result in [result for model in data.get("model-index") or [] for result in model["results"]]:
            if not (result["task"].get("type") and result["dataset"].get("type") and result["dataset"].get("name")):
                errors.append('"model-index[0].results[0]" must have a task and a dataset')
        answer = {"errors": [{"message": text} for text in errors], "warnings": [{"message": w} for w in warnings]}
        self.send(400 if errors else 200, answer)

    def do_preupload(self, body: bytes, repo: str, revision: str) -> None:
        found = self.repo(repo, write=True)
        files = found.files(self.resolve_revision(found, revision))
        answer = []
        for entry in json.loads(body)["files"]:
            path = entry["path"]
            mode = "lfs" if path.endswith((".safetensors", ".bin", ".pt")) or entry["size"] > 5_000_000 else "regular"
            oid = files[path].oid if path in files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": answer})

    def do_lfs_batch(self, body: bytes, repo: str) -> None:
        self.repo(repo, write=self.user is None)  # whoever is logged in may upload, for pull requests
        objects = []
        for entry in json.loads(body)["objects"]:
            oid = entry["oid"]
            entry = {"oid": oid, "size": entry["size"]}
            if oid not in self.server.hub.lfs:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{repo}/{oid}"}}
            objects.append(entry)
        self.send(200, {"transfer": "basic", "objects": objects})

    def do_lfs_put(self, body: bytes, repo: str, oid: str) -> None:
        # as on the real Hub, where this is a signed address, no token comes along
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Error(400, "The content does not have the announced SHA-256")
        self.server.hub.lfs[oid] = body
        self.send(200, b"")

    def do_commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self.repo(repo, write=True)
        head = self.resolve_revision(found, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head) != head:
            raise _Error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(found.files(head))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.hub.lfs:
                    raise _Error(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = Blob(self.server.hub.lfs[value["oid"]], True)
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        answer = {"hookOutput": "", "success": True}
        ref = revision
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/{number}"
        oid = found.commit(ref, header["summary"], files)
        self.send(200, {**answer, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python hub_server.py SCRIPT [ARGUMENTS]")
    hub = start_hub("user")
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
    for name, repo in hub.repos.items():
        print(f"{name} on the stand-in for the Hub:", *sorted(repo.files("main")), sep="\n    ")
