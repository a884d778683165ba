"""Training from shards: the run from the files with the same order, also resumed, and what it
says of pictures that it cannot read."""

import contextlib
import io
import json
import warnings
from dataclasses import replace
from functools import partial

import pytest
from test_loop import same

from segkern.cli import main
from segkern.data import ViewConfig, build_dataset
from segkern.models import Mask2FormerConfig
from segkern.training import checkpoint
from segkern.training.config import TrainConfig
from segkern.training.loop import train
from support.processes import in_two_processes
from support.shards import rewrite, shards_of, write_numbered

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
N = 6
# two passes, in which what rounding moves stays small
STEADY = {"steps": 6, "optimizer": "sgd", "lr": 1e-4, "min_lr": 1e-4}


def config(output, data, **changes):
    model = Mask2FormerConfig.tiny(2)
    model.num_queries, model.train_num_points, model.decoder_layers = 4, 16, 1
    model.importance_sample_ratio = 0.0  # points chosen by their loss change by a bit of it
    model.hidden_dim = model.feature_size = model.mask_feature_size = 32
    model.id2label, model.stuff = {0: "box", 1: "ground"}, (1,)
    data = replace(data, views=ViewConfig((32, 32), (0.8, 1.2)))
    settings = {"steps": 4, "batch_size": 2, "log_every": 1, "tensorboard": False, "device": "cpu"}
    settings |= {"lr": 1e-3, "min_lr": 1e-3, "warmup": 0}  # the same rates, however long
    return TrainConfig(output=output, data=data, model=model, **(settings | changes))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The files, and shards of them."""
    root = tmp_path_factory.mktemp("numbered")
    source = write_numbered(root / "set", N)
    return source, replace(shards_of(source, root / "shards"), buffer=4)


def losses(folder):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.mark.slow
def test_the_commands_take_them(sets, tmp_path, capsys):
    """Trained with evaluations, measured, shown."""
    shards, run = sets[1], tmp_path / "run"
    train(config(run, shards, steps=2, evaluate_every=1), progress=False)
    assert main(["evaluate", str(run), "--out", str(tmp_path / "a.json")]) == 0
    other = ["--data", shards.root, "--out", str(tmp_path / "b.json")]
    assert main(["evaluate", str(run), *other]) == 0
    assert "found data of kind shards (panoptic)" in capsys.readouterr().out
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["images"] == b["images"] == 2
    assert a["classes"] == b["classes"]
    assert main(["data", "show", shards.root, "--out", str(tmp_path), "--size", "32", "32"]) == 0
    assert (tmp_path / "views.png").is_file()


@pytest.mark.slow
def test_losses_are_those_of_the_files(sets, tmp_path):
    """With loaders, and stopped in the middle of a pass."""
    source, shards = sets
    settings = config(tmp_path / "files", source)
    files = build_dataset(settings.data, "train", settings.model)
    files.shuffled = build_dataset(shards, "train").shuffled
    train(settings, dataset=files, progress=False)
    wanted = losses(tmp_path / "files")
    assert [step for step, _ in wanted] == [1, 2, 3, 4]
    run = tmp_path / "shards"
    train(config(run, shards, steps=2, workers=2), progress=False)
    train(config(run, shards), resume=run, progress=False)
    found = dict(losses(run))
    assert [found[step] for step, _ in wanted] == [loss for _, loss in wanted]
    same(*(checkpoint.load(tmp_path / x)["tensors"] for x in ("files", "shards")))


def spoil_first(source, root):
    """Shards whose first picture is none."""
    shards = shards_of(source, root)
    name = build_dataset(shards, "train").shards[0].file

    def spoilt(held):
        return [(name, b"none" if name == "000000001.png" else data) for name, data in held]

    rewrite(root / name, spoilt)
    return shards


def half(folder, shards, rank):
    """What a process of two prints while it trains."""
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train(config(folder, shards, workers=1, sync_batch_norm=True, **STEADY))
    return " ".join(said.getvalue().split())


@pytest.mark.slow
def test_two_processes_share_the_samples_of_shards(sets, tmp_path):
    """Two passes: the losses are those of one process, and the first says what either could not
    read."""
    shards = spoil_first(sets[0], tmp_path / "shards")
    train(config(tmp_path / "one", shards, **STEADY), progress=False)
    (tmp_path / "group").mkdir()
    run = partial(half, tmp_path / "two", shards)
    said = in_two_processes(run, tmp_path / "group", patience=400)
    assert said[1] == ""
    assert said[0].count("1 of 6 pictures of the pass could not be read: ") == 2
    one, two = (dict(losses(tmp_path / name)) for name in ("one", "two"))
    assert [*one] == [1, 2, 3, 4, 5, 6]
    assert two == pytest.approx(one, rel=1e-4)


def test_a_run_says_at_the_end_of_a_pass_what_it_could_not_read(sets, tmp_path, capsys):
    shards = spoil_first(sets[0], tmp_path / "shards")
    capsys.readouterr()
    train(config(tmp_path / "run", shards, steps=3))
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 6 pictures of the pass could not be read" in printed
    assert "000000001" in printed
