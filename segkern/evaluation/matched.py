"""Figures of models that find objects, as the paper of Seq2Seg counts them.

Letters: B image, Q query, K class, T target, H W image size.

    Every true object is matched with one query, by the least sum of dice loss - 0.1 p(class).
    class accuracy = share of true objects whose query finds the right one of K + 1 classes the
                     most likely, "no object" among them
    dice loss      = mean over true objects of 1 - (2 sum s t + 1) / (sum s + sum t + 1),
                     s = sigmoid of the query's mask logits at the image's size, t = the truth

No score is a threshold here, so no query is left out, and an object that the model does not see
counts with the query that is left for it.
Source: Schmidt-Mengin, Image Segmentation as a Sequence Problem, 2021.
"""

import torch
import torch.nn.functional as F

from ..models.protocol import SegmentationModel
from ..nn.mask_criterion import FullMaskCriterion
from ..runtime.modes import evaluated
from ..structures.targets import Targets

CLASS_WEIGHT = 0.1  # the paper's, in matching


@torch.inference_mode()
def matched(model: SegmentationModel, dataset, limit: int, batch_size: int = 16) -> dict:
    """Matches the queries of a model with the objects of a data set.

    Args:
        model: gives `QueryLogits`; its mode stays.
        dataset: samples of one size by index, with pixel_values, masks and labels: of things
            alone.
        limit: the first so many samples.
        batch_size: samples that go through the model together.

    Returns:
        class_accuracy and dice_loss, in [0, 1]; None where there is no object.
    """
    config = model.config
    device = next(model.parameters()).device
    criterion = FullMaskCriterion(config.num_labels, CLASS_WEIGHT, 0.0, 1.0).to(device)
    network = evaluated(model)
    objects, right, dice = 0, 0, 0.0
    for start in range(0, limit, batch_size):
        samples = [dataset[i] for i in range(start, min(start + batch_size, limit))]
        pixels = torch.stack([torch.as_tensor(s["pixel_values"]) for s in samples])
        H, W = pixels.shape[2:]
        below, beside = (a - b for a, b in zip(config.input.padded((H, W)), (H, W)))
        pixels, *masks = (
            F.pad(x, (0, beside, 0, below))
            for x in (pixels, *(torch.as_tensor(s["masks"]) for s in samples))
        )
        labels = [torch.as_tensor(s["labels"]) for s in samples]
        targets = Targets.from_lists(masks, labels, num_labels=config.num_labels).to(device)
        found = network.predict(pixels.to(device), *model.inputs("instance", len(samples)))
        given = found.classes[:, None], found.masks[:, None], found.features, targets
        query = criterion.match(*given)[0][:, 0]  # [B, T]
        guess = found.classes.argmax(2).gather(1, query.clamp(min=0))
        slots = torch.arange(query.shape[1], device=device) < targets.count[:, None]
        right += int(((guess == targets.labels) & (query >= 0) & slots).sum())
        count = int(targets.count.sum())
        unmatched = int(((query < 0) & slots).sum())  # where there are fewer queries
        dice += float(criterion(*given)[1]["loss_dice"][-1]) * max(count, 1) + unmatched
        objects += count
    if not objects:
        return {"class_accuracy": None, "dice_loss": None}
    return {"class_accuracy": right / objects, "dice_loss": dice / objects}
