"""Models cut to what they need, with what that costs: decoder layers, queries, weights.

Fewer layers and fewer queries save time. Weights that are 0 save nothing but bytes, and those only
where the file is compressed.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..evaluation.evaluate import check_dataset, found, options_of
from ..inference.segment import check
from ..io.atomic_files import new_place, write_json
from ..models import open_model, smaller
from ..models.protocol import SegmentationModel
from ..runtime.modes import evaluated
from ..structures.logits import QueryLogits
from ..structures.settings import Options, Views
from .figures import Measure, sizes

FILE = "pruning.json"  # in the folder of the model


def prune(
    model: SegmentationModel,
    out: str | Path,
    layers: int | None = None,
    queries: int | None = None,
    zeros: float | None = None,
    everywhere: bool = False,
    keep: Sequence[str] = (),
    dataset=None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    options: Options | None = None,
    runs: int = 5,
    progress: bool = True,
) -> dict:
    """Writes a smaller model, and measures both.

    Layers are cut first, then the queries chosen that are left the most segments in the data
    (ties: the greater sum of scores, then the earlier), then the least weights set to 0. The
    result is trained on with `train` and `init`, as any model; `keep_zeros` there keeps the zeros.

    Args:
        model: is not changed.
        out: folder for the model, in the format of its `save_pretrained`, and for pruning.json;
            there is nothing yet.
        layers: decoder layers that stay, each of which makes a prediction.
        queries: that stay, the fixed one of a model that learns tasks together counted in; needs
            `dataset`.
        zeros: share of the weights of linear layers and convolutions that become 0, in (0, 1).
        everywhere: that share in each tensor; False takes the least weights of all together.
        keep: patterns of names of weights that stay as they are, besides the sensitive ones
            (`models.smaller.SENSITIVE` and the class head).
        dataset: to measure and to choose queries on: samples by index, as `evaluate` takes them.
        tasks, limit, options: of `evaluate`.
        runs: of which `ms` is the median.
        progress: show bars.

    Returns:
        plain types, which pruning.json holds, too: layers, queries (places of those that stay),
        zeros (share, count, of how many) where they were asked for, and rows, before and after:
        the figure of each task, ms an image, mb and gzip_mb, the size of the weights.

    Raises:
        TypeError: no model by `models.protocol`.
        ValueError: nothing is asked for, it is out of range or not for this model, or `out` is
            there; nothing is written then.
        OSError: `out` cannot be written.
    """
    if layers is None and queries is None and zeros is None:
        raise ValueError("prune: layers, queries or zeros must be given, got none of them")
    options = Options() if options is None else options
    tasks = check("prune", model, tasks, options, Views())
    if dataset is not None:
        check_dataset(dataset, model.config, tasks, "prune: dataset")
    cut, report = model, {}
    if layers is not None:
        cut, report["layers"] = smaller.with_layers(cut, layers), layers
    if queries is not None:
        _check_queries(model, queries, dataset)
    if zeros is not None and not 0 < zeros < 1:
        raise ValueError(f"prune: zeros must be a share in (0, 1), got {zeros}")
    names = smaller.weights_of_layers(cut, keep)
    measure = Measure(dataset, tasks, limit, options, runs, progress)
    with new_place("prune: out", out) as temporary:
        if queries is not None:
            kept = used_queries(cut, dataset, tasks, queries - smaller.parts_of(cut).fixed, limit)
            cut, report["queries"] = smaller.with_queries(cut, kept), kept
        if zeros is not None:
            cut = smaller.copied(cut)
            count = smaller.zero_weights(cut, zeros, everywhere, keep)
            total = sum(w.numel() for w in names.values())
            report["zeros"] = {"share": zeros, "count": count, "of": total}
        whole = temporary.parent / "before"
        model.save_pretrained(whole)
        before = measure("before", model) | sizes(whole)
        cut.save_pretrained(temporary)
        opened = open_model(temporary).to(model.device)
        report["rows"] = [before, measure("after", opened) | sizes(temporary)]
        write_json(temporary / FILE, report)
    return report


def _check_queries(model: SegmentationModel, queries: int, dataset) -> None:
    fixed, free = smaller.parts_of(model).fixed, smaller.free_queries(model)
    if not fixed < queries < fixed + free:
        raise ValueError(
            f"prune: queries must be more than {fixed} and fewer than the {fixed + free} there "
            f"are, got {queries}"
        )
    if dataset is None:
        raise ValueError("prune: dataset must be given to choose queries on, got None")


class Watched(nn.Module):
    """A model that shows what goes into `predict` and what comes out.

    Args:
        model: in whatever mode, which stays; seen in evaluation mode.
        see: called with pixel_values and the logits of each run.
    """

    def __init__(self, model: SegmentationModel, see):
        super().__init__()
        self.training = False
        self.model, self.config, self.see = evaluated(model), model.config, see

    def inputs(self, task: str, batch: int) -> tuple[Tensor, ...]:
        """The model's."""
        return self.model.inputs(task, batch)

    def predict(self, pixel_values: Tensor, *inputs: Tensor):
        """The model's, seen."""
        logits = self.model.predict(pixel_values, *inputs)
        self.see(pixel_values, logits)
        return logits


class Uses:
    """How many segments each query was left in the merge of a panoptic result, without a
    threshold: those that have another class than "no object" and are the best one somewhere in
    their mask."""

    def __init__(self, count: int):
        self.segments = torch.zeros(count, dtype=torch.int64)
        self.scores = torch.zeros(count, dtype=torch.float64)

    def __call__(self, pixel_values: Tensor, logits: QueryLogits) -> None:
        """Counts the images of a batch in."""
        classes = logits.classes.double().softmax(-1)
        score, label = classes.max(-1)
        real = label < classes.shape[2] - 1
        masks = logits.masks.double()
        if logits.features is not None:
            masks = torch.einsum("bqc,bchw->bqhw", masks, logits.features.double())
        value = (masks.sigmoid() * score[..., None, None]).flatten(2)
        value = value.masked_fill(~real[..., None], -1)
        best, query = value.max(1)  # [B, h w]
        inside = (masks.flatten(2).gather(1, query[:, None])[:, 0] >= 0) & (best >= 0)
        for b in range(len(query)):
            self.segments[query[b][inside[b]].unique().cpu()] += 1
        self.scores += (1 - classes[..., -1]).sum(0).cpu()

    def most(self, count: int, free: int) -> list[int]:
        """The most used of the first `free` queries, in their order."""
        rows = [(-int(self.segments[q]), -float(self.scores[q]), q) for q in range(free)]
        return sorted(q for *_, q in sorted(rows)[:count])


def used_queries(
    model: SegmentationModel,
    dataset,
    tasks: Sequence[str],
    count: int,
    limit: int | None = None,
) -> list[int]:
    """The places of the queries that are left the most segments in a data set, all tasks together.

    Args:
        model: with queries.
        dataset: as of `evaluate`.
        tasks: for which the model runs.
        count: how many.
        limit: the first so many images; None for all.

    Returns:
        `count` places in ascending order, the same for the same model and data.
    """
    uses = Uses(model.config.num_queries)
    watched, wanted = Watched(model, uses), options_of(tasks, Options(), 100)
    _, stuff = check_dataset(dataset, model.config, tasks, "prune: dataset")
    for i in range(len(dataset) if limit is None else min(limit, len(dataset))):
        list(found(watched, [dataset[i]], wanted, Views(), stuff, cuda_graphs=False))
    return uses.most(count, smaller.free_queries(model))
