"""A chat-completions endpoint on a loopback port that also misbehaves: what it does next is scripted."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(content):
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}}],
    }


class ChatServer:
    """Answers `answer(prompt)`, after the `faults`, which are taken one a request: (status, body, headers), or seconds
    to be slow.

    A body is bytes, what JSON holds, or an iterator of bytes, which goes out in chunks.
    """

    def __init__(self, answer):
        self.answer = answer
        self.faults = []
        self.bodies = []
        self.headers = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    def next_fault(self, body, headers):
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
            return self.faults.pop(0) if self.faults else None


def handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = server.next_fault(body, dict(self.headers))
            status, said, headers = self.reply(body, fault)
            with server.lock:
                server.busy -= 1  # before the client can send its next request
            chunked = hasattr(said, "__next__")
            data = b"" if chunked else said if isinstance(said, bytes) else json.dumps(said).encode()
            length = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(len(data))}
            try:
                self.send_response(status)
                for name, value in {**length, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
                for part in said if chunked else ():
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                self.wfile.write(b"0\r\n\r\n" if chunked else b"")
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client has given up

        def reply(self, body, fault):
            if isinstance(fault, float):
                server.stopping.wait(fault)
                fault = None
            if fault is None and self.path != "/v1/chat/completions":
                fault = (404, {"error": f"no {self.path}"}, {})
            return fault or (200, completion(server.answer(body["messages"][0]["content"])), {})

    return Handler


@contextmanager
def chatting(answer):
    """A server and its address; it stops by itself."""
    chat = ChatServer(answer)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(chat))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield chat, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        chat.stopping.set()
        deadline = time.monotonic() + 5
        while chat.busy and time.monotonic() < deadline:
            time.sleep(0.005)
        server.shutdown()
        server.server_close()
        thread.join()
