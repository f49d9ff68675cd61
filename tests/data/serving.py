"""A real web server for shards, and a network in front of it that is not to be relied on."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

_CONFIG = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{ root {root}; }}
        location /whole/ {{ alias {root}/; max_ranges 0; }}
        location /secret/ {{ deny all; }}
    }}
}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Nginx:
    """Serves a folder; can be killed and started again on the same port."""

    def __init__(self, root: Path, folder: Path) -> None:
        binary = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
        if binary is None:
            pytest.skip("nginx is not installed (Debian: nginx-light)")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "access.log"
        folder.mkdir()
        folder.chmod(0o755)
        (folder / "nginx.conf").write_text(_CONFIG.format(folder=folder, port=self.port, root=root))
        self._command = [binary, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(500):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self._process.poll() is None, "nginx ended"
            time.sleep(0.02)
        raise AssertionError("nginx does not listen")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def requests(self) -> list[str]:
        """The paths that were asked for, with their status."""
        return [line.split('"')[1].split()[1] + line.split('"')[2][:4] for line in self._log.read_text().splitlines()]


class BadNetwork:
    """A proxy: of the connections through it every fourth is refused, cut in a response, or held up, in turn."""

    def __init__(self, port: int, hold: float) -> None:
        self._upstream, self._hold = port, hold
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.faults = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client, number % 4), daemon=True).start()
            number += 1

    def _serve(self, client: socket.socket, fault: int) -> None:
        with client, contextlib.suppress(OSError):
            self.faults += fault > 0
            if fault == 1:
                return
            with socket.create_connection(("127.0.0.1", self._upstream)) as server:
                threading.Thread(target=self._copy, args=(client, server), daemon=True).start()
                if fault == 3:
                    time.sleep(self._hold)
                # Every connection ends some time: no response is the last one by announcement.
                self._copy(server, client, 30_000 if fault == 2 else 100_000)

    def _copy(self, source: socket.socket, target: socket.socket, limit: int = 2**60) -> None:
        with contextlib.suppress(OSError):
            while limit > 0 and (content := source.recv(min(limit, 65_536))):
                target.sendall(content)
                limit -= len(content)

    def close(self) -> None:
        self._listener.close()
