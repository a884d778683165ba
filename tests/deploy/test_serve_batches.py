"""Micro-batches and limits of the service: no room, no time, another model, clients that leave."""

import asyncio
import logging
import threading

import httpx
import numpy as np
import pytest

import segkern
from segkern.deploy.serve.batches import Batches, Job
from segkern.deploy.serve.models import Models, Served
from segkern.deploy.serve.pictures import Body, decode
from segkern.structures.settings import Options
from support.models import Squares, half_bright
from support.serving import (
    assert_same,
    file_of,
    in_thread,
    leave,
    picture,
    quick_model,
    wait_until,
)

HALF = file_of(half_bright())
JPEG = file_of(picture(90, 120), "JPEG")
PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def model():
    return quick_model()


def post(server, query="", data=HALF, **more):
    more = {"headers": PNG, "timeout": 60} | more
    return httpx.post(f"{server.url}/segment?{query}", content=data, **more)


class Gated(Squares):
    """Works when it is let to; says how many pictures came at once."""

    def __init__(self):
        super().__init__()
        self.open, self.batches = threading.Event(), []
        self.open.set()

    def predict(self, pixel_values):
        assert self.open.wait(30)
        self.batches.append(len(pixel_values))
        return super().predict(pixel_values)


@pytest.fixture
def gated():
    """A server with little room, and its model."""
    model = Gated()
    with in_thread(lambda: model, queue=3, batch=2, timeout=1.5, wait_ms=1) as server:
        model.batches.clear()
        yield server, model
        model.open.set()


def test_no_answer_in_time_and_no_room(gated):
    server, model = gated
    model.open.clear()
    found = []
    asking = [threading.Thread(target=lambda: found.append(post(server))) for _ in range(3)]
    for thread in asking:
        thread.start()
    wait_until(lambda: server.app.state.places.taken["pictures"] == 3)
    busy = post(server)
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    assert "3 pictures are under way" in busy.json()["detail"]
    for thread in asking:
        thread.join()
    assert [x.status_code for x in found] == [504] * 3
    assert found[0].json()["detail"] == "no answer within 1.5 seconds"
    model.open.set()
    wait_until(lambda: server.app.state.places.taken == {"pictures": 0, "pixels": 0})
    assert post(server).status_code == 200
    assert len(model.batches) <= 3  # those that were given up before their batch did not run


def test_no_room_for_pixels():
    with in_thread(Squares, max_pixels=2400) as server:
        assert post(server).status_code == 200
        five = httpx.post(f"{server.url}/segment", files=[("a", HALF)] * 5, timeout=60)
        assert five.status_code == 429
        assert "pixels are under way" in five.json()["detail"]
        assert httpx.post(f"{server.url}/segment", files=[("a", HALF)] * 4, timeout=60).is_success


@pytest.mark.slow
@pytest.mark.long
def test_a_client_that_goes_away_takes_its_picture_with_it(gated, caplog):
    server, model = gated
    model.open.clear()
    first = threading.Thread(target=lambda: post(server))
    first.start()
    wait_until(lambda: server.app.state.places.taken["pictures"] == 1)
    with caplog.at_level(logging.INFO, "segkern.serve"):
        asyncio.run(leave(server.url, HALF, after=0.3))
        wait_until(lambda: server.app.state.places.taken["pictures"] <= 1)
        wait_until(lambda: "status=499" in caplog.text)
    model.open.set()
    first.join()
    assert sum(model.batches) == 1


# --- batches --------------------------------------------------------------------------------


def jobs(model, count, size=(40, 60), task="panoptic", options=None, generation=1):
    served = Served(model, generation)
    for i in range(count):
        body = Body(file_of(picture(*size, seed=i)))
        one = decode(body, model.config.input, 10**6, keep=False)
        yield Job(served, task, options or Options(), one.input)


def test_batches_are_of_equal_pictures_and_give_what_each_gives_alone(model):
    calls, predict = [], model.predict
    batches = Batches(4, 0.5)
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
        found = [futures[i].result(60) for i in range(12)]
    finally:
        del model.predict
        batches.close()
    assert sorted(calls) == [1, 2, 2, 3, 4]
    assert [x.together for x in found] == [4] * 4 + [1] + [3] * 3 + [2] * 4
    for job, done in zip(every, found):
        pixels = {5: (33, 90), 6: (33, 90), 7: (33, 90)}.get(every.index(job), (40, 60))
        seed = [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 1][every.index(job)]
        wanted = segkern.segment(model, picture(*pixels, seed), job.task, options=job.options)
        assert_same(done.result.to_json(), wanted.to_json())


def test_a_full_batch_does_not_wait_and_a_lone_picture_waits_no_longer(model):
    batches = Batches(2, 0.3)
    try:
        full = [batches.put(job) for job in jobs(model, 2)]
        assert max(f.result(60).queued for f in full) < 0.3
        (alone,) = (batches.put(job) for job in jobs(model, 1))
        assert 0.3 <= alone.result(60).queued < 5
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
