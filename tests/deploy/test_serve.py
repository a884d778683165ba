"""The service: forms of answers, options, limits, keys; over HTTP, in this process."""

import asyncio
import base64
import io
import json
import logging
import re
import signal
import socket
import sys
import time
from contextlib import ExitStack

import httpx
import numpy as np
import pytest
import supervision
from PIL import Image

import segkern
from segkern import cli
from segkern.deploy.serve import ServeConfig, gate, pages, run, settings
from segkern.deploy.serve.pictures import FORMATS
from segkern.io.overlay import label_map
from support.models import Squares, half_bright
from support.serving import (
    BROKEN,
    HALF,
    JPEG,
    MEGABYTE,
    NAMES,
    PNG,
    assert_same,
    broken,
    file_of,
    in_thread,
    picture,
    png_head,
    post,
    send,
    wait_until,
)
from support.tiffs import tiff


@pytest.fixture(scope="module")
def server(model):
    """Without a key; limits that tests reach."""
    limits = {"max_bytes": 2**21, "max_pixels": 200_000, "receive_timeout": 2.0}
    with in_thread(lambda: model, **limits) as found:
        yield found


# --- forms of answers -----------------------------------------------------------------------

QUERIES = {
    "": {},
    "task=panoptic&threshold=0.25": {"task": "panoptic", "threshold": 0.25},
    "task=instance": {"task": "instance"},
    "task=instance&top_k=2&threshold=0.5": {"task": "instance", "top_k": 2, "threshold": 0.5},
    "task=semantic": {"task": "semantic"},
}


@pytest.mark.parametrize("query", QUERIES)
def test_json_is_what_segment_finds(query, server, model):
    pixels = picture(50, 70)
    answer = post(server, query, file_of(pixels))
    assert answer.status_code == 200
    assert answer.json() == segkern.segment(model, pixels, **QUERIES[query]).to_json()


def test_a_form_of_several_pictures_is_a_list(server, model):
    several = [picture(50, 70), picture(30, 40, seed=1), picture(50, 70, seed=2)]
    files = [("any", (f"{i}.png", file_of(x))) for i, x in enumerate(several)]
    answer = httpx.post(f"{server.url}/segment", files=files, timeout=60)
    for found, pixels in zip(answer.json(), several, strict=True):
        assert_same(found, segkern.segment(model, pixels).to_json())
    one = httpx.post(f"{server.url}/segment", files=files[:1], timeout=60)
    assert one.json()["task"] == "panoptic"


def test_label_maps_and_overlays(server, model):
    pixels = picture(50, 70)
    result = segkern.segment(model, pixels)
    for form, wanted in (("png", label_map(result)), ("overlay", result.plot())):
        answer = post(server, f"format={form}", file_of(pixels))
        assert answer.headers["content-type"] == "image/png"
        found = Image.open(io.BytesIO(answer.content))
        assert found.mode == wanted.mode
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_roboflows_form_opens_in_supervision(task, server, model):
    pixels = picture(50, 70)
    answer = post(server, f"format=roboflow&task={task}&threshold=0.1", file_of(pixels)).json()
    result = segkern.segment(model, pixels, task, threshold=0.1)
    assert answer["image"] == {"width": 70, "height": 50}
    assert answer["time"] > 0
    found = supervision.Detections.from_inference(answer)
    wanted = result.to_supervision()
    assert len(found) == len(answer["predictions"]) > 0
    some = [i for i, s in enumerate(result.segments) if s.area]
    np.testing.assert_array_equal(found.xyxy, wanted.xyxy[some])
    np.testing.assert_array_equal(found.class_id, wanted.class_id[some])
    np.testing.assert_allclose(found.confidence, wanted.confidence[some], atol=1e-6)
    assert list(found.data["class_name"]) == [NAMES[k] for k in found.class_id]
    for mask, i in zip(found.mask, some):
        own = wanted.mask[i]
        rest = own & ~mask  # pieces apart from the largest
        assert mask.any()
        assert rest.sum() < own.sum() / 2


def test_roboflows_form_of_labels(server, model):
    pixels = picture(50, 70)
    answer = post(server, "format=roboflow&task=semantic", file_of(pixels)).json()
    ids = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["segmentation_mask"]))))
    wanted = segkern.segment(model, pixels, "semantic").segmentation.numpy()
    np.testing.assert_array_equal(ids, wanted)
    assert answer["class_map"] == {str(k): name for k, name in NAMES.items()}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_is_taken(kind, server):
    buffer = io.BytesIO()
    Image.fromarray(half_bright()).save(buffer, kind)
    assert post(server, data=buffer.getvalue()).json()["size"] == [40, 60]


def test_pictures_are_turned_upright(server):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(half_bright()).save(buffer, "JPEG", exif=exif)
    assert post(server, data=buffer.getvalue()).json()["size"] == [60, 40]


def test_pictures_of_many_bands():
    """As a TIFF of five pages or of five bands, for a model that takes five."""
    pixels, buffer = np.random.default_rng(0).integers(0, 255, (40, 60, 5), np.uint8), io.BytesIO()
    frames = [Image.fromarray(pixels[..., i]) for i in range(5)]
    frames[0].save(buffer, "TIFF", save_all=True, append_images=frames[1:])

    def five():
        return Squares(mean=(0.5,) * 5, std=(0.25,) * 5)

    with in_thread(five) as server:
        for data in (buffer.getvalue(), tiff(pixels)):
            found = post(server, data=data)
            assert found.json() == segkern.segment(five(), pixels).to_json()
        bands = tiff(pixels, more={277: [10**9]}.items())
        for data, status, reason in (
            (HALF, 415, "not a picture that is taken (TIFF)"),
            (tiff(pixels[..., :4]), 422, "must have 5 channels, got 4"),
            (bands, 413, "60 x 40 pixels of 1000000000 bands, at most"),
        ):
            refused = post(server, data=data)
            assert refused.status_code == status
            assert reason in refused.json()["detail"]


# --- what is refused ------------------------------------------------------------------------

WRONG = {
    "threshold=1.5": "threshold: input should be less than or equal to 1, got '1.5'",
    "threshold=nan": "threshold: ",
    "threshold=much": "threshold: input should be a valid number",
    "top_k=0": "top_k: input should be greater than or equal to 1, got '0'",
    "top_k=1000000000": "top_k: ",
    "task=depth": "task: input should be 'panoptic', 'instance' or 'semantic', got 'depth'",
    "task=semantic&threshold=0.5": "threshold must be left out where task is 'semantic'",
    "top_k=3": "top_k must be left out where task is 'panoptic'",
    "format=pickle": "format: input should be 'json', 'roboflow', 'png' or 'overlay'",
    "treshold=0.5": "options must be of task, threshold, top_k, format, got 'treshold'",
    "url=http://localhost": "got 'url'",
}


@pytest.mark.parametrize("query", WRONG)
def test_wrong_options_are_named(query, server):
    answer = post(server, query)
    assert answer.status_code == 422
    assert WRONG[query] in answer.json()["detail"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_requests_have_a_reason(kind, server):
    status, body = asyncio.run(broken(server.url, kind))
    assert status == BROKEN[kind]
    if status:
        assert len(json.loads(body)["detail"]) > 10
    assert post(server).status_code == 200


FORMS = {
    "an address": ({"data": {"image": "http://localhost/a.png"}}, 415, "or a form of files"),
    "a path": ({"files": {"image": (None, "/etc/passwd")}}, 422, "'image' of the form must be a"),
    "nothing": ({"content": b"--x--\r\n"}, 400, "the form has no file"),
    "no boundary": ({"headers": {"Content-Type": "multipart/form-data"}}, 400, "cannot be read"),
    "damaged": ({"content": b"--y\r\nwhat"}, 400, "the form cannot be read"),
    "too many": ({"files": [("a", HALF)] * 17}, 400, "Too many files"),
    "two overlays": ({"files": [("a", HALF)] * 2, "params": {"format": "png"}}, 422, "got 2"),
    "an EPS": (
        {"files": {"a": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}},
        415,
        "not a",
    ),
    "a pickle": ({"content": b"\x80\x04.", "headers": {"Content-Type": "a/b"}}, 415, "got a/b"),
    "compressed": ({"headers": PNG | {"Content-Encoding": "gzip"}}, 415, "must not be compressed"),
    "one of two": ({"files": [("a", HALF), ("b", JPEG[:900])]}, 422, "image 1: "),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_are_refused(name, server):
    given, status, reason = FORMS[name]
    if "files" not in given and "data" not in given:
        own = {"headers": {"Content-Type": "multipart/form-data; boundary=x"}, "content": HALF}
        given = own | given
    answer = httpx.post(f"{server.url}/segment", timeout=60, **given)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["detail"]


def test_paths_and_methods_that_are_none(server):
    assert httpx.get(f"{server.url}/segment").status_code == 405
    assert httpx.get(f"{server.url}/../etc/passwd").status_code == 404
    odd = httpx.get(f"{server.url}/a%0Ab", headers={"X-Request-ID": "x\ty"})
    assert odd.status_code == 404
    assert re.fullmatch("[0-9a-f]{32}", odd.headers["x-request-id"])


def test_pixels_are_counted_by_the_head(server):
    """The rest of the file, which is not there, is not asked for."""
    for width, status, reason in ((501, 413, "501 x 400 pixels, at most 200000"), (500, 422, "")):
        answer = post(server, data=png_head(width, 400))
        assert answer.status_code == status
        assert reason in answer.json()["detail"]


def test_pixels_are_the_services_to_limit(server, monkeypatch):
    """Whatever Pillow's limit is, for which it warns or refuses."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert post(server).status_code == 200


def test_pages_of_other_sites_cannot_post(server):
    assert post(server, headers=PNG | {"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert post(server, headers=PNG | {"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_a_picture_that_the_model_cannot_pad_is_refused():
    with in_thread(lambda: Squares(pad_size=(160, 160))) as server:
        answer = post(server, data=file_of(picture(40, 170)))
        assert answer.status_code == 422
        assert "pad_size must be at least an image's size" in answer.json()["detail"]
        assert post(server).status_code == 200


def test_a_client_that_waits_to_be_asked_sends_no_body(server, monkeypatch):
    """As curl does with large files: refused by its length, it is not asked for it."""
    head = f"Content-Type: image/png\r\nContent-Length: {2**30}\r\nExpect: 100-continue"
    monkeypatch.setattr(gate, "_LINGER", 50.0)
    start = time.monotonic()
    status, _ = asyncio.run(send(server.url, head))
    assert status == 413
    assert time.monotonic() - start < 40  # no waiting for what does not come


# --- keys, figures, pages -------------------------------------------------------------------


def test_a_key_is_needed_where_there_is_one(monkeypatch):
    monkeypatch.setenv(settings.KEY_VARIABLE, "right-key-of-tests")
    with in_thread(Squares) as server:
        for path in ("/", "/health", "/ready", "/docs", "/openapi.json"):
            assert httpx.get(server.url + path).status_code == 200, path
        for path in ("/model", "/metrics", "/none"):
            answer = httpx.get(server.url + path)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in ("wrong-key", "right-key-of-test", "right-key-of-tests ü", ""):
            headers = PNG | {"X-API-Key": key.encode()}
            assert post(server, headers=headers).status_code == 401
        status, _ = asyncio.run(send(server.url, "Content-Length: 3000000", [MEGABYTE] * 3))
        assert status == 401
        for name, value in (("X-API-Key", "{}"), ("Authorization", "Bearer {}")):
            headers = PNG | {name: value.format("right-key-of-tests")}
            assert post(server, headers=headers).status_code == 200
            assert (
                httpx.post(f"{server.url}/reload", headers=headers).json()["status"] == "reloaded"
            )


def test_who_has_no_key_takes_no_room(monkeypatch):
    """More requests than there is room for let the server wait for their bodies."""
    monkeypatch.setenv(settings.KEY_VARIABLE, "right-key-of-tests")
    head = "POST {} HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\n"
    with in_thread(Squares, queue=1) as server, ExitStack() as stack:
        for path in ("/segment", "/health", "/model") * 2:
            line = stack.enter_context(server.connect())
            line.sendall(head.format(path).encode())
            assert line.recv(12) in (b"HTTP/1.1 401", b"HTTP/1.1 405")
        headers = PNG | {"X-API-Key": "right-key-of-tests"}
        assert post(server, headers=headers).status_code == 200


def test_without_a_key_nobody_reloads(server):
    answer = httpx.post(f"{server.url}/reload")
    assert answer.status_code == 403
    assert settings.KEY_VARIABLE in answer.json()["detail"]


@pytest.mark.parametrize("key", ["short", "has a space in it", "ümlaut-ümlaut", "x" * 257])
def test_keys_that_are_none(key, monkeypatch):
    monkeypatch.setenv(settings.KEY_VARIABLE, key)
    with pytest.raises(ValueError, match="must be 8 to 256 printable ASCII"):
        settings.api_key()


def test_figures_headers_and_the_model(server, caplog):
    with caplog.at_level(logging.INFO, "segkern.serve"):
        answer = post(server, headers=PNG | {"X-Request-ID": "mine-7"})
        wait_until(lambda: "id=mine-7" in caplog.text)
    assert answer.headers["x-request-id"] == "mine-7"
    stages = ("receive", "decode", "queue", "model", "encode")
    assert re.findall(r"(\w+);dur=", answer.headers["server-timing"]) == list(stages)
    line = next(r.getMessage() for r in caplog.records if "id=mine-7" in r.getMessage())
    assert "method=POST path=/segment status=200" in line
    assert all(f" {stage}=" in line for stage in stages)
    text = httpx.get(f"{server.url}/metrics").text
    for name in (
        "segkern_requests_total",
        "segkern_stage_seconds_bucket",
        "segkern_pictures_held",
    ):
        assert f"\n{name}" in text
    about = httpx.get(f"{server.url}/model").json()
    assert about["name"] == "made-up"  # no path of the server
    assert [x["name"] for x in about["labels"]] == list(NAMES.values())
    assert about["tasks"] == ["panoptic", "instance", "semantic"]


def test_pages_load_nothing_from_elsewhere(server):
    for path in ("/", "/docs"):
        answer = httpx.get(server.url + path)
        assert not re.search(r"(src|href)=.?https?:|@import|url\(", answer.text)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        policy = answer.headers["content-security-policy"]
        assert policy == pages.policy_of(answer.text)
        assert policy.startswith(
            "default-src 'none'; script-src 'sha256-" if path == "/" else "def"
        )
        assert "unsafe" not in policy
    text = httpx.get(f"{server.url}/docs").text
    for word in (
        "/segment",
        "?threshold",
        "number, 0 to 1",
        "panoptic, instance, semantic",
        "413",
    ):
        assert word in text
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert schema["openapi"].startswith("3.")
    assert "multipart/form-data" in schema["paths"]["/segment"]["post"]["requestBody"]["content"]


WRONG_SETTINGS = {
    "batch": (0, "batch must be at least 1, got 0"),
    "queue": (2.5, "queue must be an integer, got 2.5"),
    "port": (70000, "port must be at most 65535, got 70000"),
    "wait_ms": (-1, r"wait_ms must be in \[0, 10000\], got -1"),
    "timeout": (0, "timeout must be above 0"),
    "threads": (0, "threads must be at least 1, got 0"),
    "max_pixels": (True, "max_pixels must be an integer, got True"),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_wrong_settings_are_named(name):
    value, message = WRONG_SETTINGS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        ServeConfig("model", **{name: value})


def test_what_cannot_be_served_is_an_error(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM), logging.getLogger("segkern.serve").handlers[:]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port}"):
            run.serve(ServeConfig("nowhere", port=port))
    with pytest.raises(ValueError, match=r"config\.json"):
        run.serve(ServeConfig(str(tmp_path), host="0.0.0.0", port=0))
    assert "event=open host=0.0.0.0: anyone" in capsys.readouterr().err
    after = signal.getsignal(signal.SIGTERM), logging.getLogger("segkern.serve").handlers
    assert before == after


def test_missing_packages_come_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "segkern.deploy.serve.run", None)
    monkeypatch.delitem(sys.modules, "segkern.deploy.serve.run")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"pip install uvicorn \(or .* '\.\[serve\]'"):
        cli.serve("nowhere")
