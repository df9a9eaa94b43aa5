"""Shared by all tests: two threads, a seed for each test, torchvision, and a server of files."""

from __future__ import annotations

import functools
import http.server
import threading

import pytest
import torch

from convnn_geo.extras import prepare_torchvision

torch.set_num_threads(2)
prepare_torchvision()  # so that tests may import it plainly


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def torchvision():
    return pytest.importorskip("torchvision")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    """Address of a server of this machine, and the folder that it serves."""
    folder = tmp_path / "server"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/", folder
        running.shutdown()
        thread.join()
