"""A web server on localhost that fails as servers do."""

from __future__ import annotations

import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("error", "drop", "truncate", "reset", "garble", "endless")


class FaultyServer(ThreadingHTTPServer):
    """Serves the files of a folder at ``url``.

    Args:
        root: the folder.
        certificate: a file of certificate and key, for https.
        fault: which of FAULTS, a redirect "-> ADDRESS" or an HTTP status an answer suffers, by file name and number of
            the request for that file from 0; None for a good answer.
    """

    daemon_threads = True

    def __init__(
        self,
        root: Path,
        fault: Callable[[str, int], str | None] = lambda name, number: None,
        certificate: Path | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        scheme = "https" if certificate else "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.root, self.fault = root, fault
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.url = f"{scheme}://127.0.0.1:{self.server_port}/data"

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def do_GET(self) -> None:
        name = self.path.removeprefix("/data/")
        with self.server.lock:
            number = self.server.requests[name]
            self.server.requests[name] += 1
        fault = self.server.fault(name, number)
        file = self.server.root / name
        if fault == "error":
            self.send_error(500)
        elif fault == "reset":
            # SO_LINGER of 0 s: the connection ends with a reset, before any answer
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        elif fault and fault.startswith("-> "):
            self.send_response(302)
            self.send_header("Location", fault[3:])
            self.end_headers()
        elif fault and fault.isdigit():
            self.send_error(int(fault))
        elif not file.is_file():
            self.send_error(404)
        else:
            self._answer(file.read_bytes(), fault)

    def _answer(self, data: bytes, fault: str | None) -> None:
        middle = len(data) // 2
        self.send_response(200)
        if fault != "endless":
            self.send_header("Content-Length", str(middle if fault == "truncate" else len(data)))
        self.end_headers()
        if fault in ("drop", "truncate"):
            data = data[:middle]
        elif fault == "garble":
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        elif fault == "endless":
            data = data + bytes(100_000)
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
