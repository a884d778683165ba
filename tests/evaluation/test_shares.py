"""Several processes measure what one measures, to the last bit; an error of one is everybody's."""

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler

from segkern import recipes
from segkern.cli import main
from segkern.data import Digits, DigitsConfig
from segkern.evaluation import evaluate as evaluation
from segkern.evaluation.evaluate import evaluate
from segkern.evaluation.panoptic import truth_map
from segkern.evaluation.shares import as_list
from segkern.models import Mask2Former, Mask2FormerConfig, Segmenter, SegmenterConfig
from segkern.runtime.processes import of_group
from segkern.training.validation import Validation
from support.painted import Painted, random_scenes
from support.processes import in_processes

COUNT = 24  # of two and a half batches


def figures(value):
    """All that is measured, as the file has it: how long it took is left out."""
    took = ("seconds", "images_per_second")
    return json.dumps({k: v for k, v in value.items() if k not in took}, indent=2)


def alike(scenes):
    """Half of the scores are equal, so that AP depends on the order of the images."""
    for sample in scenes.samples[::2]:
        sample["pixel_values"][2] = 0.5
    return scenes


def measured(scenes, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = evaluate(
            Painted(), scenes, progress=False, batch_size=9, overlap_threshold=0.0, **options
        )
    return figures(value)


def shuffled(scenes, rank=0):
    """A loader whose order is another in each process."""
    order = np.random.default_rng(rank).permutation(COUNT).tolist()
    return DataLoader(scenes, 5, sampler=order, collate_fn=as_list)


class Kept(Painted):
    """Says which process wrote it."""

    def save_pretrained(self, folder):
        Path(folder).mkdir()
        Path(folder, f"of {torch.distributed.get_rank()}").touch()


def validated(scenes, folder):
    """What training reads of an evaluation that all processes make together."""
    config = replace(recipes.digits(task="panoptic"), evaluate_scenes=COUNT)
    validation = Validation(scenes, config, folder, 0, False, of_group())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return validation(Kept(), 7)


def several(rank):
    folder = Path(os.environ["SEGKERN_TEST_FOLDER"])
    scenes = alike(random_scenes(COUNT))
    found = {
        "all": measured(scenes),
        "some": measured(scenes, limit=11),
        "few": measured(scenes, limit=1),
        "shuffled": measured(shuffled(scenes, rank)),
        "alone": measured(scenes, shared=False),
        "validated": validated(scenes, folder),
        "digits": digits(),
    }
    made = mock.patch.object(evaluation, "writable_folder", wraps=evaluation.writable_folder)
    with made as calls:
        found["written"] = measured(scenes, limit=1, out=folder / "figures/one.json")
    found["looks"] = calls.call_count
    for name, spoil in (("bad", 20), ("worse", 3)):
        broken = alike(random_scenes(COUNT))
        broken.samples[spoil].pop("masks")
        try:
            found[name] = measured(broken)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    sampler = DistributedSampler(scenes)
    try:
        measured(DataLoader(scenes, 5, sampler=sampler, collate_fn=as_list))
    except ValueError as error:
        found["sampler"] = str(error)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def three(run, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGKERN_TEST_FOLDER", str(run))
        return in_processes(several, tmp_path_factory.mktemp("three"), 3)


@pytest.mark.parametrize("name", ["all", "some", "few", "shuffled", "alone"])
def test_three_processes_measure_what_one_does(name, three):
    scenes = alike(random_scenes(COUNT))
    source = shuffled(scenes) if name == "shuffled" else scenes
    limit = {"some": 11, "few": 1}.get(name)
    want = measured(source, limit=limit)
    assert json.loads(want)["images"] == (limit or COUNT)
    assert [three[rank][name] for rank in range(3)] == [want] * 3


def test_the_first_process_alone_makes_the_folder(three, run):
    assert [three[rank]["looks"] for rank in range(3)] == [1, 0, 0]
    written = figures(json.loads((run / "figures/one.json").read_text()))
    assert [three[rank]["written"] for rank in range(3)] == [written] * 3
    assert written == three[0]["few"]


def test_validation_in_training_is_shared_and_the_first_keeps_the_best(three, run):
    metrics, text = three[0]["validated"]
    assert [three[rank]["validated"] for rank in (1, 2)] == [(metrics, text)] * 2
    assert text.startswith("step 7: pq 0.")
    assert text.endswith(", the best pq so far")
    assert sorted(path.name for path in (run / "best").iterdir()) == ["metrics.json", "of 0"]
    want = evaluate(Painted(), alike(random_scenes(COUNT)), ("panoptic",), progress=False)
    assert metrics["pq"] == want["things"]["pq"]


def test_an_error_of_one_process_is_raised_by_all(three):
    for name in ("bad", "worse"):
        assert three[0][name] == three[1][name] == three[2][name]
        assert three[0][name].startswith("ValueError: evaluate: tasks must be ('semantic',) for")


def test_a_sampler_that_repeats_samples_is_refused(three):
    assert "without DistributedSampler, which repeats samples" in three[0]["sampler"]


def test_sums_do_not_depend_on_the_order():
    """Rounded sums would: in some order of forty images they differ."""
    scenes = random_scenes(40)
    want = json.loads(measured(scenes, tasks=("panoptic",)))
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(scenes))
        mixed = random_scenes(40)
        mixed.samples = [scenes.samples[i] for i in order]
        got = json.loads(measured(mixed, tasks=("panoptic",)))
        assert (got["classes"], got["pq"], got["dice"]) == (
            want["classes"],
            want["pq"],
            want["dice"],
        )


class PaintedDigits:
    """Scenes of digits whose input is a prediction with faults, for the model `Painted`."""

    def __init__(self, count):
        self.scenes, self.count = Digits(DigitsConfig(task="panoptic"), "val"), count
        self.classes, self.stuff = self.scenes.classes, self.scenes.stuff

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        rng, scene = np.random.default_rng(i), self.scenes[i]
        ids, labels, _ = truth_map(scene, self.stuff)
        wrong = rng.random(len(labels)) < 0.3
        found = np.where(wrong, rng.integers(0, 11, len(labels)), labels)
        ids = np.roll(ids, rng.integers(-2, 3, 2), (0, 1))
        doubt = np.full(ids.shape, rng.integers(0, 5))  # equal in many images
        pixels = np.stack((ids, np.append(0, found)[ids], doubt)).astype(np.float32)
        return {k: v for k, v in scene.items() if k != "image"} | {"pixel_values": pixels}


def digits():
    """Figures of predictions with faults on 120 scenes, and of a model on 12."""
    torch.manual_seed(0)
    model = Mask2Former(replace(Mask2FormerConfig.tiny(11), num_queries=8, decoder_layers=1))
    model.config.stuff = (10,)
    scenes = Digits(DigitsConfig(task="panoptic"), "val")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        painted = evaluate(Painted(9, 11), PaintedDigits(120), progress=False)
        modelled = evaluate(model, scenes, limit=12, progress=False, threshold=0.0)
    for name in ("pq", "dice", "ap", "boundary_ap", "mask_f1", "miou"):
        assert 0.01 < painted[name] < 0.95
    assert painted["best_threshold"] is not None
    assert modelled["instances"] > 12
    return figures(painted), figures(modelled)


def test_scenes_are_measured_alike_by_one_and_three_processes(three):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the three has
    try:
        want = digits()
    finally:
        torch.set_num_threads(threads)
    assert json.loads(want[0])["images"] == 120
    assert [three[rank]["digits"] for rank in range(3)] == [want] * 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model that is not trained, and maps of two classes, of which the last but one picture
    cannot be read in `bad`."""
    folder = tmp_path_factory.mktemp("data")
    sizes = {"image_size": (16, 16), "patch_size": 8, "window_size": 16, "window_stride": 16}
    sizes |= {"embed_dim": 64, "depth": 1, "num_heads": 1, "decoder_layers": 1}
    settings = {"num_labels": 2, "shortest_edge": 16, "backbone_pretrained": False}
    Segmenter(SegmenterConfig(**settings, **sizes)).save_pretrained(folder / "model")
    for name in ("good", "bad"):
        for kind in ("images", "labels"):
            (folder / name / kind / "val").mkdir(parents=True)
        (folder / name / "classes.txt").write_text("black\nwhite\n")
        for i in range(40):
            values = np.random.default_rng(i).integers(0, 2, (16, 16), np.uint8)
            Image.fromarray(60 * values).save(folder / name / f"images/val/{i:02d}.png")
            Image.fromarray(values).save(folder / name / f"labels/val/{i:02d}.png")
    cut = folder / "bad/images/val/38.png"
    cut.write_bytes(cut.read_bytes()[:60])
    return folder


def told(data, name, out, capfd):
    """What the command writes in two processes, which this one starts, and its exit code."""
    options = ["--data", str(data / name), "--layout", "plain", "--out", str(out)]
    command = ["evaluate", str(data / "model"), *options]
    capfd.readouterr()
    return command, main([*command, "--processes", "2"]), capfd.readouterr()


@pytest.mark.slow
def test_the_command_measures_in_processes_of_its_own(data, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command, code, said = told(data, "good", tmp_path / "two.json", capfd)
    assert code == 0, said.err
    assert said.out.count("40 images") == 1
    assert said.out.count("written: ") == 1
    assert main([*command[:-1], str(tmp_path / "one.json")]) == 0
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert one["images"] == 40
    assert 0 < one["miou"] < 1
    assert figures(two) == figures(one)


@pytest.mark.slow
def test_a_bad_picture_of_one_process_ends_all_and_is_told_once(data, tmp_path, capfd):
    _, code, said = told(data, "bad", tmp_path / "bad.json", capfd)
    assert code == 2
    lines = [line for line in said.err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("segkern: error: ")
    assert "images/val/38.png: not a readable image" in lines[0]
    assert "Traceback" not in said.err
    assert not (tmp_path / "bad.json").exists()
