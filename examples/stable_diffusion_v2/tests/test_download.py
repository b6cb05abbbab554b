"""Downloads from a server of our own: whole, broken off and continued, refused, and without room."""

import contextlib
import hashlib
import os
import shutil
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ldm.config import versions
from ldm.download import download
from ldm.errors import UserError
from ldm.files import claimed

CONTENT = bytes(range(256)) * 9000  # more than two chunks


@pytest.fixture
def server():
    """Settings of a server: ranges (whether it knows them), cut (after so many bytes it hangs up), said (what it says
    of its version), heeds (whether it knows If-Range), and the requests that it saw."""

    class Handler(BaseHTTPRequestHandler):
        ranges, cut, requests, said, heeds = True, None, [], {}, True

        def do_GET(self):  # noqa: N802
            asked = self.headers.get("Range")
            self.requests.append(asked)
            if self.path != "/model.ckpt":
                return self.send_error(404)
            if_range = self.headers.get("If-Range")
            fits = not if_range or not self.heeds or if_range in self.said.values()
            asked = asked if self.ranges and fits else None
            start = int(asked[6:-1]) if asked else 0
            if start >= len(CONTENT):
                return self.send_error(416)
            self.send_response(206 if asked else 200)
            for name, value in self.said.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            return self.wfile.write(CONTENT[start : self.cut])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.requests = []
    Handler.url = f"http://127.0.0.1:{server.server_port}"
    yield Handler
    server.shutdown()
    server.server_close()


def test_the_whole_file_comes(server, tmp_path):
    download(f"{server.url}/model.ckpt", tmp_path / "models/model.ckpt")
    assert (tmp_path / "models/model.ckpt").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["model.ckpt"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(server, tmp_path, ranges):
    server.cut, server.ranges = 1_500_000, ranges
    with pytest.raises(UserError, match="goes on from there"):
        download(f"{server.url}/model.ckpt", tmp_path / "model.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.ckpt.partial", "model.ckpt.partial.json"]
    server.cut = None
    download(f"{server.url}/model.ckpt", tmp_path / "model.ckpt")
    assert (tmp_path / "model.ckpt").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1500000-"]


@pytest.mark.parametrize("heeds", [True, False])
@pytest.mark.parametrize(
    ("first", "later"),
    [
        ({"ETag": '"1"'}, {"ETag": '"2"'}),
        ({"ETag": 'W/"1"'}, {"ETag": 'W/"2"'}),
        ({"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, {"Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}),
        ({}, {}),  # nothing but another length
    ],
)
def test_two_versions_are_never_joined(server, tmp_path, monkeypatch, first, later, heeds):
    server.cut, server.said, server.heeds = 1_500_000, first, heeds
    with pytest.raises(UserError, match="goes on from there"):
        download(f"{server.url}/model.ckpt", tmp_path / "model.ckpt")
    other = CONTENT[::-1] + b"x" * (not first)
    monkeypatch.setitem(globals(), "CONTENT", other)
    server.cut, server.said = None, later
    download(f"{server.url}/model.ckpt", tmp_path / "model.ckpt")
    assert (tmp_path / "model.ckpt").read_bytes() == other
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


@pytest.mark.parametrize("said", [{"ETag": '"1"'}, {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}])
def test_the_same_version_goes_on(server, tmp_path, said):
    server.cut, server.said = 1_500_000, said
    for cut in (1_500_000, None):
        server.cut = cut
        with pytest.raises(UserError) if cut else contextlib.nullcontext():
            download(f"{server.url}/model.ckpt", tmp_path / "model.ckpt")
    assert (tmp_path / "model.ckpt").read_bytes() == CONTENT and server.requests == [None, "bytes=1500000-"]


def test_a_file_is_fetched_by_one_process_at_a_time(server, tmp_path):
    with claimed(tmp_path, "model.ckpt"), pytest.raises(UserError, match=f"process {os.getpid()} on .* is at work in"):
        download(f"{server.url}/model.ckpt", tmp_path / "model.ckpt")
    assert not server.requests


def test_a_partial_file_that_is_too_long_is_begun_anew(server, tmp_path):
    (tmp_path / "model.ckpt.partial").write_bytes(CONTENT + b"more")
    download(f"{server.url}/model.ckpt", tmp_path / "model.ckpt")
    assert (tmp_path / "model.ckpt").read_bytes() == CONTENT


def test_what_cannot_be_had(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="answered 404 .* by hand"):
        download(f"{server.url}/other.ckpt", tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="cannot download .*nothing was written"):
        download("http://127.0.0.1:9/model.ckpt", tmp_path / "model.ckpt")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1 << 20))
    with pytest.raises(UserError, match="0.0 GiB of disk left"):
        download(f"{server.url}/model.ckpt", tmp_path / "model.ckpt")
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("right", [True, False])
def test_the_digits_in_the_name(server, tmp_path, caplog, right):
    digits = hashlib.sha256(CONTENT).hexdigest()[:8] if right else "01234567"
    download(f"{server.url}/model.ckpt", tmp_path / f"model-{digits}.ckpt")
    assert ("its name says" in caplog.text) == (not right)


def test_nothing_is_fetched_without_being_asked(server, tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "SCRIPTS", tmp_path)
    monkeypatch.setattr(versions, "PUBLISHED", server.url)
    monkeypatch.setitem(versions.VERSIONS, "2.1", versions.Version("configs/v2-inference.yaml", "model.ckpt"))
    with pytest.raises(UserError, match=f"--download, or get it from {server.url}/model.ckpt and put it into"):
        versions.find_checkpoint("2.1")
    assert not server.requests
    assert versions.find_checkpoint("2.1", fetch=True) == str(tmp_path / "models/model.ckpt")
    assert (tmp_path / "models/model.ckpt").read_bytes() == CONTENT


def test_models_of_others_are_not_fetched_but_found(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "SCRIPTS", tmp_path)
    monkeypatch.setattr(versions, "search", lambda path: tmp_path / path if (tmp_path / path).exists() else None)
    page = "no models/sd_xl_base_1.0.safetensors for --version xl, .*get it from https://huggingface.co/stabilityai/"
    for fetch in (False, True):
        with pytest.raises(UserError, match=page):
            versions.find_checkpoint("xl", fetch)
        with pytest.raises(UserError, match="xl-vpred is no single published file: give the path of such a model"):
            versions.find_checkpoint("xl-vpred", fetch)
    with pytest.raises(
        UserError, match="sd_xl_refiner_1.0.safetensors does not exist: get it from https://huggingface"
    ):
        versions.existing(str(tmp_path / "sd_xl_refiner_1.0.safetensors"))
    (tmp_path / "models").mkdir()
    for name in ("sd_xl_base_1.0_ms.ckpt", "sd_xl_base_1.0_0.9vae.safetensors", "sd_xl_base_1.0.safetensors"):
        (tmp_path / "models" / name).touch()
        assert versions.find_checkpoint("xl", prediction_type="eps") == str(tmp_path / "models" / name)


def test_a_login_page_is_no_checkpoint(server, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "CONTENT", b"\n<!DOCTYPE html><title>log in</title>")
    with pytest.raises(UserError, match="answered with a web page"):
        download(f"{server.url}/model.ckpt", tmp_path / "model.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_published_file_is_not_read_as_another_type(monkeypatch):
    """SD 2.0's file says nothing of its type, and the v config would take its eps for v."""
    monkeypatch.setitem(versions.VERSIONS, "2.0", versions.Version("configs/v2-inference.yaml", "not-there.ckpt"))
    with pytest.raises(UserError, match="--version 2.0 was trained with prediction_type 'eps', the config says 'v'"):
        versions.find_checkpoint("2.0", prediction_type="v")
    for fitting in ("eps", None):
        with pytest.raises(UserError, match="no models/not-there.ckpt"):
            versions.find_checkpoint("2.0", prediction_type=fitting)
    assert versions.find_checkpoint("tiny", prediction_type="v").endswith("tiny-vpred.safetensors")
