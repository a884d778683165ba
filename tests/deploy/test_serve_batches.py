"""Micro-batches and limits of the service: no room, no time, another model, clients that leave."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest

import segkern
from segkern.deploy.serve.batches import Batches, Job
from segkern.deploy.serve.models import Models, Served
from segkern.deploy.serve.pictures import Body, decode
from segkern.structures.settings import Options
from support.models import Squares, half_bright
from support.serving import HALF, assert_same, file_of, in_thread, picture, post, wait_until


def form(server, count):
    """Asks for the segments of so many pictures at once."""
    return httpx.post(f"{server.url}/segment", files=[("a", HALF)] * count, timeout=60)


class Gated(Squares):
    """Works when it is let to; says how many pictures came at once."""

    def __init__(self):
        super().__init__()
        self.open, self.batches = threading.Event(), []
        self.open.set()

    def predict(self, pixel_values):
        self.batches.append(len(pixel_values))
        assert self.open.wait(60)
        return super().predict(pixel_values)


@contextmanager
def gated(**settings):
    """A server, and its model, which does not work yet."""
    model = Gated()
    with in_thread(lambda: model, **{"batch": 2, "timeout": 60} | settings) as server:
        model.batches.clear()
        model.open.clear()
        try:
            yield server, model
        finally:
            model.open.set()


def test_no_room_for_pictures():
    with gated(queue=3) as (server, model), ThreadPoolExecutor(3) as pool:
        held = server.app.state.places.taken
        found = [pool.submit(post, server) for _ in range(3)]
        wait_until(lambda: held["pictures"] == 3)
        busy = post(server)
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
        assert "3 pictures are under way" in busy.json()["detail"]
        never = form(server, 4)
        assert never.status_code == 413
        assert "at most 3 pictures, got 4" in never.json()["detail"]
        model.open.set()
        assert [x.result().status_code for x in found] == [200] * 3
        wait_until(lambda: held == {"pictures": 0, "pixels": 0})


def test_no_room_for_pixels():
    with gated(max_pixels=2400) as (server, model), ThreadPoolExecutor(1) as pool:
        never = form(server, 5)
        assert never.status_code == 413
        assert "at most 9600 pixels, got 12000" in never.json()["detail"]
        found = pool.submit(form, server, 4)
        wait_until(lambda: server.app.state.places.taken["pixels"] == 9600)
        busy = post(server)
        assert busy.status_code == 429
        assert "9600 pixels are under way" in busy.json()["detail"]
        model.open.set()
        assert found.result().status_code == 200


def test_no_answer_in_time():
    """While the model has other work; what was given up is not done when it is free."""
    with gated(timeout=0.5) as (server, model):
        batches = server.app.state.batches
        other = batches.put(next(jobs(model, 1)))
        wait_until(lambda: model.batches == [1])
        for _ in range(2):
            late = post(server)
            assert late.status_code == 504
            assert late.json()["detail"] == "no answer within 0.5 seconds"
        assert len(batches) == 0
        model.open.set()
        assert other.result(60).together == 1
    assert model.batches == [1]


def test_what_waits_for_the_model_goes_together():
    with gated() as (server, model), ThreadPoolExecutor(3) as pool:
        found = [pool.submit(post, server)]
        wait_until(lambda: model.batches == [1])
        found += [pool.submit(post, server) for _ in range(2)]
        wait_until(lambda: len(server.app.state.batches) == 2)
        model.open.set()
        assert [x.result().status_code for x in found] == [200] * 3
        assert model.batches == [1, 2]


def test_a_client_that_goes_away_takes_its_picture_with_it(caplog):
    """While the model has other work."""
    head = "POST /segment HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: "
    with gated() as (server, model), ThreadPoolExecutor(1) as pool:
        batches = server.app.state.batches
        other = pool.submit(post, server)
        wait_until(lambda: model.batches == [1])
        with caplog.at_level(logging.INFO, "segkern.serve"):
            with server.connect() as line:
                line.sendall(f"{head}{len(HALF)}\r\n\r\n".encode() + HALF)
                wait_until(lambda: len(batches) == 1)
            wait_until(lambda: "status=499" in caplog.text)
        assert len(batches) == 0
        model.open.set()
        assert other.result().status_code == 200
    assert model.batches == [1]


# --- batches --------------------------------------------------------------------------------


def jobs(model, count, size=(40, 60), task="panoptic", options=None, generation=1):
    served = Served(model, generation)
    for i in range(count):
        body = Body(file_of(picture(*size, seed=i)))
        one = decode(body, model.config.input, 10**6, keep=False)
        yield Job(served, task, options or Options(), one.input)


def test_batches_are_of_equal_pictures_and_give_what_each_gives_alone(model):
    calls, predict = [], model.predict
    batches = Batches(4, 3600)
    try:
        every = [
            *jobs(model, 5),
            *jobs(model, 3, (33, 90)),
            *jobs(model, 2, task="semantic"),
            *jobs(model, 2, options=Options(0.2)),
        ]
        model.predict = lambda x: calls.append(len(x)) or predict(x)
        order = [0, 5, 8, 10, 1, 6, 9, 11, 2, 7, 3, 4]  # they come mixed
        futures = {i: batches.put(every[i]) for i in order}
    finally:
        batches.close()
        del model.predict
    found = [futures[i].result() for i in range(12)]
    assert sorted(calls) == [1, 2, 2, 3, 4]
    assert [x.together for x in found] == [4] * 4 + [1] + [3] * 3 + [2] * 4
    for job, done in zip(every, found):
        pixels = {5: (33, 90), 6: (33, 90), 7: (33, 90)}.get(every.index(job), (40, 60))
        seed = [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 1][every.index(job)]
        wanted = segkern.segment(model, picture(*pixels, seed), job.task, options=job.options)
        assert_same(done.result.to_json(), wanted.to_json())


def test_a_full_batch_does_not_wait(model):
    batches = Batches(2, 3600)
    try:
        full = [batches.put(job) for job in jobs(model, 2)]
        assert [f.result(60).together for f in full] == [2, 2]
    finally:
        batches.close()


def test_a_lone_picture_waits_no_longer_than_it_is_told(model):
    batches = Batches(2, 0.3)
    try:
        (alone,) = jobs(model, 1)
        start = time.monotonic()
        assert batches.put(alone).result(60).queued >= 0.3
        assert alone.arrived >= start  # in the queue, whenever it was made
    finally:
        batches.close()
    with pytest.raises(RuntimeError, match="closed"):
        batches.put(next(jobs(model, 1)))


def test_one_that_fails_fails_alone():
    class Picky(Squares):
        def predict(self, pixel_values):
            if pixel_values.mean() > 1.5 or len(pixel_values) > 1:
                raise RuntimeError("too bright or too many")
            return super().predict(pixel_values)

    model, batches = Picky(), Batches(3, 5)
    served = Served(model, 1)
    white = np.full((40, 60, 3), 255, np.uint8)
    try:
        futures = []
        for pixels in (half_bright(), white, half_bright()):
            one = decode(Body(file_of(pixels)), model.config.input, 10**6, keep=False)
            futures.append(batches.put(Job(served, "panoptic", Options(), one.input)))
        assert futures[0].result(30).result.summary() == "1 ground, 1 square"
        assert futures[2].result(30).together == 1
        with pytest.raises(RuntimeError, match="too bright"):
            futures[1].result(30)
    finally:
        batches.close()


def test_what_waits_is_done_when_the_queue_is_closed(model):
    batches = Batches(64, 60)
    futures = [batches.put(job) for job in jobs(model, 3)]
    batches.close()
    assert all(f.done() and f.result().together == 3 for f in futures)


# --- models ---------------------------------------------------------------------------------


def test_requests_that_came_before_keep_their_model():
    """While a model works, another takes its place."""
    old, new, opened = Gated(), Squares(), []
    new.config.labels.names[1] = "box"
    models = Models(lambda: (opened.append(1), old if len(opened) == 1 else new)[1])
    models.load()
    batches = Batches(4, 0)
    old.open.clear()
    one = decode(Body(HALF), old.config.input, 10**6, keep=False).input
    before = batches.put(Job(models.current, "panoptic", Options(), one))
    assert models.load().generation == 2
    after = batches.put(Job(models.current, "panoptic", Options(), one))
    old.open.set()
    try:
        assert before.result(30).result.summary() == "1 ground, 1 square"
        assert after.result(30).result.summary() == "1 ground, 1 box"
    finally:
        batches.close()


def test_a_model_that_gives_no_numbers_is_not_taken():
    class Broken(Squares):
        def predict(self, pixel_values):
            found = super().predict(pixel_values)
            return found._replace(classes=found.classes * float("nan"))

    with pytest.raises(ValueError, match="class_logits must be finite"):
        Models(Broken).load()
