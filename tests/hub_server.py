"""As much of the Hugging Face Hub as pushing and pulling small files takes, on a loopback port, for the official
client.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories as lists of commits, each a dictionary of files, and the blobs that large files are uploaded as
    beforehand.

    `faults` maps a path's ending to what to send in its place; `broken` maps a method and a part of the path ("PUT
    /lfs/") to what befalls the next such requests, one each: a status, a status with headers, "cut" for a connection
    that dies half-way through the body, or "drip" for a body of one byte at a time.
    """

    def __init__(self):
        self.commits = {}
        self.refs = {}
        self.token = None
        self.faults = {}
        self.broken = {}
        self.blobs = {}
        self.requests = []
        self.stopping = threading.Event()

    def fault(self, command, path):
        """What befalls this request, if anything."""
        found = next((faults for where, faults in self.broken.items() if faults and where in f"{command} {path}"), None)
        return found.pop(0) if found else None

    def commit(self, repo, branch, files, parent=None):
        body = {**self.commits.get(parent or self.refs.get((repo, branch)), {}), **files}
        sha = hashlib.sha1(repr((repo, sorted(body.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha] = {path: data for path, data in body.items() if data is not None}
        self.refs[repo, branch] = sha
        return sha

    def sha(self, repo, revision):
        return self.refs.get((repo, revision), revision if revision in self.commits else None)


def handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def reply(self, status, body=b"", **headers):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD" and self.dripping:
                self.drip(data)
            elif self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if self.close_connection else data)

        def drip(self, data):
            self.close_connection = True
            for i in range(len(data)):
                if hub.stopping.wait(0.05):
                    break
                try:
                    self.wfile.write(data[i : i + 1])
                except (BrokenPipeError, ConnectionResetError):
                    break  # the client has given up

        def read(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def serve(self):
            path = unquote(urlsplit(self.path).path)
            fault = hub.fault(self.command, path)
            self.close_connection, self.dripping = fault == "cut", fault == "drip"
            if self.close_connection and self.command != "GET":
                return None
            body = self.read()
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if isinstance(fault, (int, tuple)):
                status, headers = fault if isinstance(fault, tuple) else (fault, {})
                return self.reply(status, {"error": "Service Unavailable"}, **headers)
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.reply(
                    401, {"error": "Invalid username or password."}, X_Error_Message="Invalid username or password."
                )
            if path == "/api/repos/create":
                made = json.loads(body)
                repo = "/".join(filter(None, (made.get("organization"), made["name"])))
                hub.refs.setdefault((repo, "main"), None)
                hub.commit(repo, "main", {".gitattributes": b""})
                return self.reply(200, {"url": f"http://{self.headers['Host']}/{repo}", "name": repo, "id": repo})
            if path == "/api/validate-yaml":
                return self.reply(200, {"errors": [], "warnings": []})
            if path.endswith(".git/info/lfs/objects/batch"):
                wanted = json.loads(body)["objects"]
                return self.reply(
                    200, {"transfer": "basic", "objects": [{**each, **self.actions(each["oid"])} for each in wanted]}
                )
            if path.startswith("/lfs/"):
                hub.blobs[path.removeprefix("/lfs/")] = body
                return self.reply(200)
            if path.startswith("/api/models/"):
                return self.api(path.removeprefix("/api/models/").split("/"), body)
            repo, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            return self.file(repo, revision, name)

        def actions(self, oid):
            return (
                {}
                if oid in hub.blobs
                else {"actions": {"upload": {"href": f"http://{self.headers['Host']}/lfs/{oid}"}}}
            )

        def api(self, parts, body):
            repo, what, revision = "/".join(parts[:2]), (parts[2:] or ["revision"])[0], (parts[3:] or ["main"])[0]
            if what == "branch":
                hub.refs[repo, revision] = hub.refs[repo, "main"]
                return self.reply(200, {})
            if what == "tag":
                hub.refs[repo, json.loads(body)["tag"]] = hub.sha(repo, revision)
                return self.reply(200, {})
            if what == "preupload":
                files = [
                    {"path": file["path"], "uploadMode": _mode(file), "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self.reply(200, {"files": files, "commitOid": hub.sha(repo, revision)})
            if what == "commit":
                files, lines = {}, [json.loads(line) for line in body.splitlines()]
                for line in lines[1:]:
                    value = line["value"]
                    blob = hub.blobs.get(value.get("oid"))
                    files[value["path"]] = base64.b64decode(value["content"]) if line["key"] == "file" else blob
                create_pr = "create_pr=1" in self.path
                sha = hub.commit(repo, "refs/pr/1" if create_pr else revision, files, hub.sha(repo, revision))
                host = f"http://{self.headers['Host']}/{repo}"
                extra = {"pullRequestUrl": f"{host}/discussions/1"} if create_pr else {}
                return self.reply(200, {"commitUrl": f"{host}/commit/{sha}", "commitOid": sha, **extra})
            sha = hub.sha(repo, revision)
            if sha is None:
                missing = "RepoNotFound" if (repo, "main") not in hub.refs else "RevisionNotFound"
                return self.reply(404, {"error": missing}, X_Error_Code=missing)
            files = hub.commits[sha]
            if what == "tree":
                return self.reply(
                    200,
                    [
                        {"type": "file", "path": path, "size": len(data), "oid": _etag(data)}
                        for path, data in files.items()
                    ],
                )
            return self.reply(
                200,
                {
                    "id": repo,
                    "modelId": repo,
                    "sha": sha,
                    "private": False,
                    "tags": [],
                    "siblings": [{"rfilename": p} for p in files],
                },
            )

        def file(self, repo, revision, name):
            sha = hub.sha(repo, revision)
            if sha is None or name not in hub.commits[sha]:
                return self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            data = hub.commits[sha][name]
            sent = next((fault for ending, fault in hub.faults.items() if name.endswith(ending)), data)
            headers = {"ETag": f'"{_etag(data)}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
            if start:
                return self.reply(
                    206, sent[start:], Content_Range=f"bytes {start}-{len(sent) - 1}/{len(sent)}", **headers
                )
            return self.reply(200, sent, **headers)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    return Handler


def _mode(file):
    return "lfs" if file["path"].endswith(".safetensors") else "regular"


def _etag(data):
    return hashlib.sha1(data).hexdigest()


@contextmanager
def running():
    """A Hub and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        hub.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
