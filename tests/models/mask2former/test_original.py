"""Checkpoints of Mask2Former's original code: names, sizes, and what a pickle may hold."""

import pickle
import re
from ast import literal_eval
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
import torch

from segkern.models import Mask2Former, Mask2FormerConfig, initialize, open_model
from segkern.models.mask2former import original
from segkern.weights.state_dicts import misfits
from support.detectron2_files import BACK

KEYS = Path(__file__).parents[2] / "expected/mask2former_original_keys.txt"
SWIN = {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 3, 6), "window_size": 4}


def as_the_original(model):
    """The state dict of a model under the original's names, as arrays."""
    state = OrderedDict()
    for name, value in model.state_dict().items():
        if name == "criterion.seed" or name.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in BACK:
            name, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                break
        name = re.sub(r"(?<=backbone\.res)\d", lambda found: str(int(found[0]) + 1), name)
        if found := re.fullmatch(r"(.*_attn\.)([qkv])_proj\.(weight|bias)", name):
            state.setdefault(f"{found[1]}in_proj_{found[3]}", {})[found[2]] = value
        else:
            state[name] = value
    joined = {
        name: torch.cat([value[part] for part in "qkv"]) if isinstance(value, dict) else value
        for name, value in state.items()
    }
    out = OrderedDict((name, value.numpy()) for name, value in joined.items())
    out._metadata = OrderedDict({"": {"version": 2}})
    return out


class OfNumPy1(pickle._Pickler):
    """Names NumPy's functions as its versions below 2, which wrote the published files."""

    def save_global(self, obj, name=None):
        module = getattr(obj, "__module__", "")
        if not str(module).startswith("numpy._core."):
            return super().save_global(obj, name)
        module = module.replace("_core", "core")
        if self.proto >= 4:
            self.save(module)
            self.save(obj.__name__)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{module}\n{obj.__name__}\n".encode())
        return self.memoize(obj)

    dispatch = pickle._Pickler.dispatch | {FunctionType: save_global}


def written(path, model, protocol=3, pickler=pickle.Pickler):
    """A file as Detectron2's tools write it: weights, who made them and how names are matched."""
    content = {"model": as_the_original(model), "__author__": "someone"}
    content |= {"matching_heuristics": True, "iteration": np.int64(9)}
    with path.open("wb") as file:
        pickler(file, protocol).dump(content)
    return path


def small(backbone="swin_tiny", options=SWIN, labels=133):
    config = Mask2FormerConfig.tiny(labels)
    return replace(
        config, backbone=backbone, backbone_options=options, num_queries=9, size_divisor=32
    )


def test_every_name_of_a_published_checkpoint_has_its_place():
    rows = [line.split("\t") for line in KEYS.read_text().splitlines() if line[0] != "#"]
    state = {name: torch.empty(literal_eval(shape), device="meta") for name, shape in rows}
    weights = original.from_original(state)
    settings = original.read_sizes(weights, "model.pkl") | original.dataset_of(133, "model.pkl")
    config = Mask2FormerConfig(**settings)
    assert config == Mask2FormerConfig.preset("swin_tiny")
    with torch.device("meta"):
        own = Mask2Former(config).state_dict()
    own.pop("criterion.seed")
    assert misfits(weights, own) == []


SMALL = {
    "swin": small(),
    "resnet": small("resnet50", {"freeze_norm": True}, 80),
    "own classes": small(labels=7),
}


@pytest.mark.filterwarnings("ignore:.*which no published")
@pytest.mark.parametrize("kind", SMALL)
def test_a_pickle_of_arrays_opens_to_the_same_model(kind, tmp_path):
    torch.manual_seed(0)
    model = Mask2Former(SMALL[kind]).eval()
    path = written(tmp_path / "model_final.pkl", model, protocol=2 if kind == "swin" else 4)
    opened = open_model(str(path))
    for name, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(opened(x).class_queries_logits, model(x).class_queries_logits)
    assert opened.config.stuff == (tuple(range(80, 133)) if kind == "swin" else ())
    assert (opened.config.shortest_edge, opened.config.longest_edge) == (800, 1333)


@pytest.mark.parametrize(
    ("protocol", "numpy"), [(3, "below 2"), (4, "below 2"), (5, "below 2"), (5, "2")]
)
def test_pickles_of_every_protocol_and_of_older_numpy(protocol, numpy, tmp_path):
    torch.manual_seed(0)
    model = Mask2Former(SMALL["swin"])
    pickler = OfNumPy1 if numpy == "below 2" else pickle.Pickler
    path = written(tmp_path / "model_final.pkl", model, protocol, pickler)
    content = path.read_bytes()
    assert (b"numpy.core" in content, b"numpy._core" in content) == (numpy != "2", numpy == "2")
    opened = Mask2Former.from_pretrained(path).state_dict()
    assert all(torch.equal(opened[name], value) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_training_starts_from_it(tmp_path):
    path = written(tmp_path / "model_final.pkl", Mask2Former(small()))
    said = initialize(Mask2Former(small(labels=3)), path)
    assert "new is the class head (133 labels there, 3 here)" in said
    with pytest.warns(UserWarning, match="has 7 classes, which no published checkpoint has"):
        open_model(written(tmp_path / "other.pkl", Mask2Former(small(labels=7))))


HEAD = "sem_seg_head.predictor.class_embed.weight"


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"model": Evil()}), "holds a builtins.print, which is code and not run"),
        (pickle.dumps({"model": {"weight": np.zeros(2)}}), "is no checkpoint of Mask2Former"),
        (pickle.dumps({"model": {HEAD: np.zeros((4, 8))}}), r"no checkpoint .*query_feat"),
        (pickle.dumps({"model": {HEAD: "weights"}}), "no checkpoint of Mask2Former"),
        (pickle.dumps(np.zeros(99))[:40], "not a whole pickle of arrays"),
        (b"", "not a whole pickle of arrays"),
    ],
    ids=["code", "another model", "a model like it", "no numbers", "cut short", "empty"],
)
def test_other_pickles_are_refused(content, message, tmp_path, capsys):
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Mask2Former.from_pretrained(path)
    with pytest.raises(ValueError, match=r"nothing.pkl: no such file"):
        Mask2Former.from_pretrained(tmp_path / "nothing.pkl")
    assert "run" not in capsys.readouterr().out
