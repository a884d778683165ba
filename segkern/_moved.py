"""Modules that have moved: who imports one under its old name is told the new one."""

from importlib.abc import MetaPathFinder

HOME = {
    "checkpoint": "training.checkpoint",
    "demo": "recipes.demo",
    "evaluate": "evaluation.evaluate, and the function is segkern.evaluate",
    "explain": "models.segmenter.explain",
    "files": "io.atomic_files",
    "graphs": "runtime.cuda_graphs",
    "images": "io.images",
    "infer": "inference.segment and segkern.inference.postprocess",
    "meters": "evaluation.panoptic, segkern.evaluation.instance and segkern.evaluation.semantic",
    "nn.backbone": "nn.backbones",
    "nn.bands": "nn.resized_cross_entropy and segkern.nn.bilinear",
    "nn.memory": "nn.recompute",
    "nn.swin": "nn.backbones.swin",
    "nn.targets": "structures.targets",
    "optimizer": "training.optimizer",
    "pictures": "io.overlay and segkern.io.plots",
    "predict": "inference.predict_files",
    "process": "runtime.device and segkern.runtime.interrupt",
    "results": "structures.segmentation",
    "rle": "io.rle",
    "step": "training.step",
    "testing": "gone; it was for segkern's own tests",
    "train": "training.loop, and the function is segkern.train",
    "trainlog": "training.log",
    "weights.fit": "weights.state_dicts",
    "weights.huggingface": "models.mask2former.huggingface",
    "weights.huggingface_keys": "models.mask2former.huggingface_keys",
    "weights.names": "weights.timm_names",
    "weights.segmenter": "models.segmenter.original",
    "windows": "inference.sliding_window",
}


def message(name: str) -> str:
    """What to say of an old name, such as "segkern.infer"."""
    home = HOME[name.removeprefix("segkern.")]
    return f"{name} is {home}" if home.startswith("gone") else f"{name} is now segkern.{home}"


class Finder(MetaPathFinder):
    """Knows the old names only."""

    def find_spec(self, fullname, path=None, target=None):
        """Raises ModuleNotFoundError that names the new place; of other names finds nothing."""
        if fullname.startswith("segkern.") and fullname.removeprefix("segkern.") in HOME:
            raise ModuleNotFoundError(message(fullname), name=fullname)
        return None
