# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A stand-in for the Hugging Face Hub: repositories, commits, LFS and pull requests over HTTP.

`start_hub` starts one for the process that calls it, before huggingface_hub is imported. For another process, set
HF_ENDPOINT to `HubServer.url` and HF_HUB_DISABLE_XET=1. Status codes and headers follow the real Hub: 404 and 401 with
X-Error-Code, safetensors as LFS, commits as NDJSON, 412 if the parent of a commit is no longer the head.

    python tests/support/hub_server.py SCRIPT [ARGUMENTS]

runs a script with such a Hub, where it is logged in as "user", and lists the Hub's files at the end.
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


@dataclass(frozen=True)
class Blob:
    """A file of a commit; `lfs` if its content came by LFS."""

    content: bytes
    lfs: bool = False

    @property
    def oid(self):
        """SHA-256 for LFS, the git hash otherwise."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool
    # commits: oid -> (message, files); refs: branch or pull request -> oid
    commits: dict[str, tuple[str, dict[str, Blob]]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref, message, files):
        contents = sorted((name, blob.oid) for name, blob in files.items())  # caches of clients go by the oid
        oid = hashlib.sha1(f"{len(self.commits)} {ref} {message} {contents}".encode()).hexdigest()
        self.commits[oid] = (message, files)
        self.refs[ref] = oid
        return oid

    def files(self, revision):
        return self.commits[self.refs.get(revision, revision)][1]


class Hub:
    """The contents of the Hub: `repos` by "user/name", and `tokens`, the user of each token."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.repos = {}
        self.lfs = {}  # uploaded contents by SHA-256


class HubServer(ThreadingHTTPServer):
    """Serves a `Hub` on a free port of this machine, as a context manager."""

    daemon_threads = True

    def __init__(self, hub):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.lock = hub, threading.Lock()

    @property
    def url(self):
        return "http://{}:{}".format(*self.server_address)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()


def start_hub(user):
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
    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    ROUTES = [
        ("POST", "/api/repos/create", "create"),
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/validate-yaml", "validate_yaml"),
        ("POST", "/api/models/{repo}/branch/{revision}", "branch"),
        ("POST", "/api/models/{repo}/preupload/{revision}", "preupload"),
        ("POST", "/api/models/{repo}/commit/{revision}", "commit"),
        ("GET", "/api/models/{repo}/tree/{revision}(?:/.*)?", "tree"),
        ("GET", "/api/models/{repo}/revision/{revision}", "info"),
        ("GET", "/api/models/{repo}", "info"),
        ("POST", "/{repo}.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", "/lfs/{repo}/{oid}", "lfs_put"),
        ("GET", "/{repo}/resolve/{revision}/{path}", "resolve"),
        ("HEAD", "/{repo}/resolve/{revision}/{path}", "resolve"),
    ]
    PARTS = {"repo": r"[\w.-]+/[\w.-]+?", "revision": "[^/]+", "oid": r"\w+", "path": ".+"}

    def handle_request(self):
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.query = parse_qs(url.query)
            try:
                self.user = self.server.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
                name, parts = self.route(url.path)
                getattr(self, f"do_{name}")(body, **parts)
            except _Error as error:
                self.send(error.status, {"error": str(error)}, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def route(self, path):
        for method, pattern, name in self.ROUTES:
            pattern = re.sub(r"\{(\w+)\}", lambda part: f"(?P<{part[1]}>{self.PARTS[part[1]]})", pattern)
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return name, {key: unquote(value) for key, value in match.groupdict().items()}
        raise _Error(404, f"Sorry, we can't find the page: {path}")

    def log_message(self, *args):
        pass

    def send(self, status, body, headers=None):
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def at(self, name, revision):
        """A repository, the commit of a revision, and its files; a private one for its owner alone."""
        repo = self.server.hub.repos.get(name)
        if repo is None or repo.private and self.user != name.split("/")[0]:  # the Hub does not tell the two apart
            raise _Error(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, oid, repo.files(oid)

    # Accounts and repositories

    def do_whoami(self, body):
        self.send(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def do_create(self, body):
        request = json.loads(body)
        owner = request.get("organization") or self.user
        name = f"{owner}/{request['name']}"
        answer = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.hub.repos:
            return self.send(409, {**answer, "error": "You already created this model repo"})
        private = request.get("visibility") == "private" or bool(request.get("private"))
        repo = self.server.hub.repos[name] = Repo(private)
        repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})
        self.send(200, answer)

    def do_branch(self, body, repo, revision):
        start = (json.loads(body) if body else {}).get("startingPoint", "main")
        found, oid, _ = self.at(repo, start)
        if revision in found.refs:
            return self.send(409, {"error": f"Reference already exists: {revision}"})
        found.refs[revision] = oid
        self.send(200, {})

    def do_info(self, body, repo, revision="main"):
        found, oid, files = self.at(repo, revision)
        siblings = [{"rfilename": path} for path in files]
        self.send(200, {"id": repo, "sha": oid, "private": found.private, "siblings": siblings, "tags": []})

    # Files

    def do_tree(self, body, repo, revision):
        answer = []
        for path, blob in self.at(repo, revision)[2].items():
            lfs = {"lfs": {"oid": blob.oid, "size": len(blob.content), "pointerSize": 130}} if blob.lfs else {}
            answer.append({"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid, **lfs})
        self.send(200, answer)

    def do_resolve(self, body, repo, revision, path):
        _, oid, files = self.at(repo, revision)
        if path not in files:
            raise _Error(404, "Entry not found", "EntryNotFound")
        blob = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.oid}"'}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        self.send(200, blob.content, headers)

    # Commits

    def do_validate_yaml(self, body):
        match = re.match(r"\s*---\r?\n(.*?)\r?\n---", json.loads(body)["content"], re.DOTALL)
        data, errors = yaml.safe_load(match[1]) or {}, []
        models = data.get("base_model") or []
        for model in models if isinstance(models, list) else [models]:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)):
                errors.append({"message": f'"base_model" with value "{model}" is not valid. Use a model id.'})
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def do_preupload(self, body, repo, revision):
        files, answer = self.at(repo, revision)[2], []
        for path in [entry["path"] for entry in json.loads(body)["files"]]:
            mode = "lfs" if path.endswith((".safetensors", ".bin", ".pt")) else "regular"
            oid = files[path].oid if path in files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": answer})

    def do_lfs_batch(self, body, repo):
        objects = []
        for entry in json.loads(body)["objects"]:
            oid, actions = entry["oid"], {}
            if oid not in self.server.hub.lfs:
                actions = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{repo}/{oid}"}}}
            objects.append({"oid": oid, "size": entry["size"], **actions})
        self.send(200, {"transfer": "basic", "objects": objects})

    def do_lfs_put(self, body, repo, oid):
        self.server.hub.lfs[oid] = body
        self.send(200, b"")

    def do_commit(self, body, repo, revision):
        found, head, files = self.at(repo, revision)
        files, ref, answer = dict(files), revision, {"hookOutput": "", "success": True}
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                summary = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise _Error(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            else:
                files[value["path"]] = Blob(self.server.hub.lfs[value["oid"]], lfs=True)
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
            ref, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{self.server.url}/{repo}/discussions/{number}"
        oid = found.commit(ref, summary, files)
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
