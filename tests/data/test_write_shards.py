"""Writing shards: sizes, stops in the middle, what is refused."""

import json

import numpy as np
import pytest

from segkern.cli import main
from segkern.data import CocoConfig, build_dataset, find_format, write_shards
from segkern.data.write_shards import STATE, size_in_bytes
from support.pictures import annotation, box, instance_rows, write_coco
from support.shards import write_cityscapes, write_numbered

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
N = 14
SIZE = 20_480


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    config = write_numbered(root, N)
    return config, {split: build_dataset(config, split) for split in ("train", "val")}


def write(source, target, **settings):
    config, splits = source
    settings = {"size": SIZE} | settings
    return write_shards(splits, target, config.task, config.views, **settings)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write(source, folder)
    return files(folder)


def test_shards_have_the_size_at_most(whole):
    sizes = [len(data) for name, data in whole.items() if name.endswith("tar")]
    assert len(sizes) == 4
    shards = json.loads(whole["index.json"])["splits"]
    assert {name: sum(row["samples"] for row in part) for name, part in shards.items()} == {
        "train": N,
        "val": 2,
    }
    assert max(sizes) == SIZE
    assert not [name for name in whole if name.startswith(".") or name == STATE]


def test_a_stopped_run_goes_on(source, whole, tmp_path):
    """After any shard, and after a kill in the middle of one."""
    for stop in (1, 2, 3):
        folder = tmp_path / str(stop)
        told = []

        def tell(text, told=told, stop=stop):
            told.append(text)
            if len(told) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write(source, folder, tell=tell)
        assert (folder / STATE).is_file()
        if stop == 2:  # killed before it was noted that the second is there
            state = json.loads((folder / STATE).read_text())
            del state["splits"]["train"][1:]
            (folder / STATE).write_text(json.dumps(state))
        kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
        assert len(kept) == stop
        left = folder / f".{'0a' * 16}.tar"
        left.write_bytes(b"half")
        told.clear()
        write(source, folder, tell=lambda text, told=told: told.append(text))
        assert len(told) == 4 - stop + (stop == 2)
        first = folder / "train-00000.tar"
        assert first.stat().st_mtime_ns == kept[first]
        assert files(folder) == whole


def test_a_run_that_was_stopped_is_no_data_set(source, tmp_path):
    def tell(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path, tell=tell)
    with pytest.raises(ValueError, match="shards whose writing was stopped: go on with `segkern"):
        find_format(tmp_path)
    with pytest.raises(ValueError, match="the first shards of a set of other size: write to"):
        write(source, tmp_path, size=2 * SIZE)
    config, splits = source
    with pytest.raises(ValueError, match="of other paths, pictures"):
        write((config, {"train": splits["val"], "val": splits["train"]}), tmp_path)


def test_what_was_written_before_a_stop_must_be_there(source, tmp_path):
    def tell(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path, tell=tell)
    state = (tmp_path / STATE).read_text()
    assert json.loads(state)["splits"]["train"][0][0] == "train-00000.tar"
    for wrong in ("{", "[]", '{"of": 1}', '{"of": {}, "splits": [1]}'):
        (tmp_path / STATE).write_text(wrong)
        with pytest.raises(ValueError, match=f"{STATE}: not what writing shards leaves"):
            write(source, tmp_path)
    (tmp_path / STATE).write_text(state)
    (tmp_path / "train-00000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-00000.tar: must be as it was written"):
        write(source, tmp_path)


def test_processes_write_the_same(source, whole, tmp_path):
    write(source, tmp_path, workers=2)
    assert files(tmp_path) == whole


def test_an_order_of_chance(source, tmp_path):
    write(source, tmp_path / "a", shuffle=True)
    write(source, tmp_path / "b", shuffle=True)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    data = build_dataset(find_format(tmp_path / "a")[0], "train")
    names = [data[i]["path"].rpartition("/")[2] for i in range(N)]
    assert names != sorted(names) == [f"{i:04}.png" for i in range(N)]


def test_what_is_there_is_not_overwritten(source, tmp_path):
    (tmp_path / "other.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must not hold shards of others, and has other.tar"):
        write(source, tmp_path)
    write(source, tmp_path / "new")
    with pytest.raises(ValueError, match=r"must not hold a data set, and has index.json"):
        write(source, tmp_path / "new")
    with pytest.raises(ValueError, match="size must be at least 1 byte, got 0"):
        write(source, tmp_path / "none", size=0)
    with pytest.raises(ValueError, match=r"task must be one of panoptic, .* got 'depth'"):
        write_shards(source[1], tmp_path / "none", "depth", source[0].views)
    with pytest.raises(TypeError, match=r"data sets of files \(Pictures\), got a list for train"):
        write((source[0], {"train": [1]}), tmp_path / "none")


def test_pictures_that_cannot_be_read_are_left_out(tmp_path, capsys):
    for split in ("train", "val"):
        write_coco(tmp_path / "set", name=split)
    (tmp_path / "set/train2017/b.png").write_bytes(b"no picture")
    target = tmp_path / "shards"
    assert main(["data", "shard", str(tmp_path / "set"), str(target), "--size", "1MB"]) == 0
    printed = capsys.readouterr().out
    assert "found data of kind coco (instance)" in printed
    assert "b.png: not an image that PIL can read; left out" in " ".join(printed.split())
    assert "train: 2 of 3 pictures in 1 shards" in printed
    data = build_dataset(find_format(target)[0], "train")
    wanted = build_dataset(CocoConfig(tmp_path / "set"), "train")
    assert [data[i]["path"] for i in (0, 1)] == [
        "train-00000.tar/a.png",
        "train-00000.tar/none.png",
    ]
    assert np.array_equal(data[1]["image"], wanted[2]["image"])


def test_many_findings_are_counted(tmp_path, capsys):
    rows = [annotation(i, 7, 77, box(1, 1, 9, 9)) for i in range(100, 130)]
    for split in ("train", "val"):
        write_coco(tmp_path / "set", instance_rows() + rows, name=split)
    assert main(["data", "shard", str(tmp_path / "set"), str(tmp_path / "shards")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("train: ") == 20 + 2
    assert "train: 10 more findings, which `segkern data check` names" in printed


def test_the_command(tmp_path, capsys):
    root, target = tmp_path / "set", tmp_path / "shards"
    write_cityscapes(root)
    command = ["data", "shard", str(root), str(target), "--task", "instance"]
    assert main([*command, "--size", "5 miles"]) == 2
    assert "must be a number of B, KB, MB, GB or GiB, got '5 miles'" in capsys.readouterr().err
    assert main(command) == 0
    assert f"train on it with --data.root {target}" in capsys.readouterr().out
    content = json.loads((target / "index.json").read_text())
    assert (content["task"], len(content["classes"])) == ("instance", 8)
    assert main(["data", "shard", str(target), str(tmp_path / "again")]) == 2
    assert "must hold files, and holds shards" in capsys.readouterr().err
    assert main(["data", "shard", str(tmp_path / "none"), str(tmp_path / "again")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 500_000_000), ("1.5 GiB", 3 * 2**29), ("64kib", 65536), ("7", 7), ("1 B", 1)],
)
def test_sizes(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "5 TB", "-1MB", "0", "1e3", "5,5MB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="size must be a number of B"):
        size_in_bytes(text)
