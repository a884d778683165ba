"""`Processor`: what transformers' image processors do, for its models and for ours.

Letters: B image, C channels, H W size of an image in the batch, n segment.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..io.atomic_files import write_json
from ..models.preprocessor import (
    DEFAULTS,
    find_preprocessor,
    is_old,
    known_kind,
    read_preprocessor,
    write_preprocessor,
)
from ..structures.settings import InputConfig, Options
from ..weights.folders import find_folder, read_json
from . import processor_inputs as inputs
from . import processor_outputs as outputs_
from .processor_batch import EOMT, ONEFORMER, SEGFORMER, Batch, arranged, converted

_KINDS = {  # of the model types in config.json
    "mask2former": "Mask2FormerImageProcessor",
    "maskformer": "MaskFormerImageProcessor",
    "oneformer": "OneFormerImageProcessor",
    "segformer": "SegformerImageProcessor",
    "eomt": "EomtImageProcessor",
    "eomt_dinov3": "EomtImageProcessor",
}
_TYPES = ("image_processor_type", "feature_extractor_type")


class Processor:
    """Pictures to a model's input, and its output to segments, as transformers' image processors
    do it: one may stand in place of the other, with a model of either.

    Pixels are those of transformers' default (torchvision) processors: resized in 8 bits where 8
    bits came, with antialiasing. Its Pillow ones round otherwise: some values are a step of 255
    apart, bicubic and Lanczos ones up to two. Results are those of `segkern.postprocess`, which
    differ from transformers' where these are at fault:

    - mask logits go to the result's size at once, not by way of 384 x 384 (Mask2Former);
    - padding is cut away, not stretched into the result: `target_sizes` are the images' own sizes,
      from which follows where each ends in its batch;
    - no two segments have one id, and a label that is fused has one entry;
    - a panoptic segment must win its share of the pixels that are in its mask by the mask alone,
      not by mask times score, and keeps only pixels that are;
    - maps are whole numbers on the outputs' device, whether anything was found or not;
    - masks of instances are resized as logits; where instances overlap, the map shows the better
      one;
    - masks of `segmentation_maps` are padded with 0, never with `ignore_index`, and what is padded
      has no label.

    Attributes:
        kind: class of transformers' whose manners it has, such as "Mask2FormerImageProcessor".
        size, do_resize, resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std,
            size_divisor, pad_size, do_pad, do_split_image, do_reduce_labels, ignore_index: the
            fields of its file, those that its kind has; each may be set.

    Args:
        kind: as the attribute.
        fields: of preprocessor_config.json; what is missing has transformers' default. Others are
            kept for `save_pretrained`.

    Raises:
        ValueError: a kind or a value that is not known here (names it).
    """

    def __init__(self, kind: str = "Mask2FormerImageProcessor", **fields):
        if kind not in DEFAULTS:
            raise ValueError(f"Processor: kind must be one of {', '.join(DEFAULTS)}, got {kind!r}")
        self.kind = kind
        self._set(fields, "Processor", old=False)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "Processor":
        """Opens the processor of a checkpoint.

        Args:
            name_or_folder: a folder with preprocessor_config.json, or that file, or the folder of
                a training run; or a name on the hub, of which no weights are downloaded.

        Raises:
            ValueError: there is no such file, or it says what is not known here (names it).
        """
        name = f"Processor.from_pretrained: {name_or_folder}"
        path = Path(name_or_folder).expanduser()
        folder = path.parent if path.is_file() else find_folder(name_or_folder, weights=False)
        found, config = find_preprocessor(folder), {}
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
        if found is None:
            raise ValueError(f"{name} has no preprocessor_config.json")
        processor = cls.__new__(cls)
        default = _KINDS.get(config.get("model_type"), "Mask2FormerImageProcessor")
        processor.kind = known_kind(found, default, name)
        fields = {field: value for field, value in found.items() if field not in _TYPES}
        processor._set(fields, name, is_old(config))
        return processor

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes preprocessor_config.json, which transformers' AutoImageProcessor reads, too.

        Args:
            folder: is made if it is not there.

        Raises:
            OSError: the file cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        fields = {k: v for k, v in self._fields().items() if v is not None}
        write_json(
            folder / "preprocessor_config.json", {"image_processor_type": self.kind} | fields
        )

    def __call__(
        self,
        images,
        segmentation_maps=None,
        instance_id_to_semantic_id: dict[int, int] | list[dict[int, int]] | None = None,
        task_inputs: str | list[str] | None = None,
        return_tensors: str | None = "pt",
        **fields,
    ) -> Batch:
        """Pictures, and maps of what is in them, to a model's input.

        Args:
            images: one or a list of paths, PIL images, arrays or tensors [H, W], [H, W, C] or
                [C, H, W], or one array or tensor of 4 dimensions for all. Values are taken as they
                are, so that floats in [0, 1] want do_rescale=False.
            segmentation_maps: of each image a PIL image, array or tensor [H, W] of labels, or of
                ids of instances; or one array or tensor [B, H, W].
            instance_id_to_semantic_id: label of each id, for all images or a list of one for each;
                None where maps hold labels.
            task_inputs: OneFormer: "panoptic", "instance" or "semantic", one for all or one an
                image; None is "panoptic".
            return_tensors: "pt" for tensors, "np" for arrays, None for lists of tensors.
            fields: of the processor, for this call.

        Returns:
            pixel_values [B, C, H, W] and, where the kind has them: pixel_mask [B, H, W] int64, 1
            where the image is; patch_offsets, image, begin and end of each window; task_inputs,
            sentences; and for maps mask_labels, B of [n, H, W] float32, and class_labels, B of [n]
            int64; or labels [B, H, W] int64 (SegFormer).

        Raises:
            TypeError: a field that the kind has not, or wrong dtypes.
            ValueError: wrong shapes, numbers or values, or images of several sizes where the kind
                does not pad and tensors are wanted.
        """
        if return_tensors not in ("pt", "np", None):
            raise ValueError(
                f"Processor: return_tensors must be 'pt', 'np' or None, got {return_tensors!r}"
            )
        if unknown := sorted(fields.keys() - self._fields().keys()):
            raise TypeError(f"Processor: a {self.kind} has no {unknown[0]}")
        settings = self._settings(fields)
        takes, more = self._input(settings), settings["processing"]
        images = inputs.each(images, 3)
        if not images:
            raise ValueError("Processor: images must not be empty, got none")
        raw = not more.do_rescale and not more.do_normalize
        pixels, sizes = [], []
        for i, image in enumerate(images):
            picture = inputs.read_picture(image, f"Processor: images[{i}]", takes.channels)
            if picture.is_floating_point() and more.do_rescale and picture.max() <= 1:
                warnings.warn(
                    f"Processor: images[{i}] has floats up to {picture.max():.3g}, and do_rescale "
                    "multiplies them: do_rescale=False takes them as they are",
                    stacklevel=2,
                )
            sizes.append(tuple(picture.shape[1:]))
            pixels.append(inputs.pixels_of(picture, takes, raw))
        maps, names = None, instance_id_to_semantic_id
        if isinstance(names, list) and len(names) != len(images):
            raise ValueError(
                f"Processor: instance_id_to_semantic_id must be {len(images)}, as images, "
                f"got {len(names)}"
            )
        if segmentation_maps is not None:
            maps = self._maps(segmentation_maps, sizes, takes, more)
        out = arranged(self.kind, pixels, maps, settings, takes, names)
        if self.kind == ONEFORMER:
            tasks = (
                [task_inputs or "panoptic"] if not isinstance(task_inputs, list) else task_inputs
            )
            if bad := [task for task in tasks if task not in ("panoptic", "instance", "semantic")]:
                raise ValueError(
                    "Processor: task_inputs must be panoptic, instance or semantic, "
                    f"got {bad[0]!r}"
                )
            tasks = tasks * len(images) if len(tasks) == 1 else tasks
            if len(tasks) != len(images):
                raise ValueError(
                    f"Processor: task_inputs must be 1 or {len(images)}, as images, "
                    f"got {len(tasks)}"
                )
            out["task_inputs"] = [f"the task is {task}" for task in tasks]
        elif task_inputs is not None:
            raise ValueError(f"Processor: task_inputs must be left out for a {self.kind}")
        return converted(out, return_tensors)

    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes=None,
        return_segmentation_scores: bool = False,
    ) -> list:
        """The likeliest label of each pixel.

        Args:
            outputs: of a model of transformers or of ours: class_queries_logits and
                masks_queries_logits, or logits.
            target_sizes: B pairs of height and width, or [B, 2]: the images' own sizes, which the
                results get. None gives the logits' size; EoMT needs them.
            return_segmentation_scores: also the scores of all labels.

        Returns:
            B times [H, W] int64, or `SemanticOutput`s.

        Raises:
            ValueError: other outputs or sizes.
        """
        scores, takes = return_segmentation_scores, self._input()
        if getattr(outputs, "class_queries_logits", None) is None:
            outputs_.expect_logits(outputs, "logits")
            logits = outputs.logits
            sizes = outputs_.sizes_of(target_sizes, len(logits))
            return outputs_.semantic(outputs_.pixel_maps(logits, sizes, scores), scores)
        windows = getattr(outputs, "patch_offsets", None)
        if windows is not None and len(windows):
            sizes = outputs_.sizes_of(target_sizes, 1 + max(int(place[0]) for place in windows))
            side = self._settings()["shortest_edge"]
            found = outputs_.window_maps(outputs, sizes, takes, side, scores)
        else:
            sizes = self._sizes(outputs, target_sizes)
            options = Options(return_scores=scores)
            results = outputs_.found_segments(outputs, "semantic", sizes, takes, (), options)
            found = [(result.segmentation, result.scores) for result in results]
        return outputs_.semantic(found, scores)

    def post_process_instance_segmentation(
        self,
        outputs,
        threshold: float | None = None,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes=None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
    ) -> list[dict]:
        """Instances of every label.

        Args:
            outputs: as for `post_process_semantic_segmentation`.
            threshold: score, that of the label times that of the mask, from which on an instance
                counts; None is 0.5, and 0.8 for EoMT.
            mask_threshold, overlap_mask_area_threshold: not read, as in transformers.
            target_sizes: as there.
            return_coco_annotation: in place of the map the run lengths of each of its ids.
            return_binary_maps: in place of the map [n, H, W] float32, in which masks may overlap.

        Returns:
            B times segmentation, [H, W] int32 of ids, -1 for none (OneFormer: from 1, 0 for none),
            and segments_info: id, label_id, was_fused (not of EoMT) and score, best first.

        Raises:
            ValueError: other outputs or sizes, or both returns.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError(
                "Processor: return_coco_annotation and return_binary_maps must not both be true"
            )
        results = self._found(outputs, "instance", target_sizes, threshold)
        first, told = int(self.kind == ONEFORMER), self.kind != EOMT
        returns = return_coco_annotation, return_binary_maps
        return [outputs_.instances(result, first, told, *returns) for result in results]

    def post_process_panoptic_segmentation(
        self,
        outputs,
        threshold: float | None = None,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse=None,
        target_sizes=None,
        stuff_classes=None,
    ) -> list[dict]:
        """Segments that do not overlap.

        Args:
            outputs: as for `post_process_semantic_segmentation`.
            threshold: score of its label above which a query counts; None is 0.5, and 0.8 for
                EoMT.
            mask_threshold: 0.5.
            overlap_mask_area_threshold: share of its own mask that a query must win.
            label_ids_to_fuse: labels of which all is one segment; None for none.
            target_sizes: as there.
            stuff_classes: EoMT's name for label_ids_to_fuse.

        Returns:
            B times segmentation, [H, W] int32 of ids from 1, 0 for none (EoMT: from 0, -1 for
            none), and segments_info: id, label_id, was_fused (not of EoMT) and score.

        Raises:
            ValueError: other outputs, sizes or labels, or another mask_threshold.
        """
        if mask_threshold != 0.5:
            raise ValueError(f"Processor: mask_threshold must be 0.5, got {mask_threshold}")
        outputs_.expect_logits(outputs, "class_queries_logits")
        fused = set(label_ids_to_fuse or ()) | set(stuff_classes or ())
        labels = outputs.class_queries_logits.shape[2] - 1
        if not fused <= set(range(labels)):
            name = "label_ids_to_fuse" if label_ids_to_fuse else "stuff_classes"
            raise ValueError(
                f"Processor: {name} must be labels in [0, {labels}), got {sorted(fused)}"
            )
        rest = overlap_mask_area_threshold, sorted(fused)
        results = self._found(outputs, "panoptic", target_sizes, threshold, *rest)
        first = int(self.kind != EOMT)
        return [
            {
                "segmentation": result.segmentation - 1 + first,
                "segments_info": outputs_.segments_info(result, first, fused if first else None),
            }
            for result in results
        ]

    def _found(self, outputs, task, target_sizes, threshold, overlap=None, stuff=()):
        if threshold is None:
            threshold = 0.8 if self.kind == EOMT else 0.5
        options, sizes = Options(threshold, overlap), self._sizes(outputs, target_sizes)
        return outputs_.found_segments(outputs, task, sizes, self._input(), stuff, options)

    def _sizes(self, outputs, target_sizes) -> list[tuple[int, int]] | None:
        outputs_.expect_logits(outputs, "class_queries_logits", "masks_queries_logits")
        if target_sizes is None and self.kind == EOMT:
            raise ValueError("Processor: target_sizes must be given for an EoMT, got None")
        return outputs_.sizes_of(target_sizes, len(outputs.class_queries_logits))

    def _set(self, fields: dict, name: str, old: bool) -> None:
        """Takes the fields of a file, with defaults for what is missing and without those that
        have a name of this class.

        Raises:
            ValueError: a value that is not known here.
        """
        settings = read_preprocessor(fields, self.kind, name, old)
        try:
            self._input(settings)
        except ValueError as error:
            raise ValueError(f"{name}: preprocessor_config.json: {error}") from error
        known = write_preprocessor(settings, self.kind)
        rest = {"pad_size": None, "ignore_index": None}
        if self.kind == EOMT:
            rest |= {"do_pad": False, "do_split_image": False}
        for field, value in ({**rest, **fields} | known).items():
            if field not in (*_TYPES, "kind") and not hasattr(type(self), field):
                setattr(self, field, value)

    def _fields(self) -> dict:
        return {field: value for field, value in vars(self).items() if field != "kind"}

    def _settings(self, fields: dict | None = None) -> dict:
        """By the names of models' configs.

        Raises:
            ValueError: a value that is not known here.
        """
        return read_preprocessor(self._fields() | (fields or {}), self.kind, "Processor")

    def _input(self, settings: dict | None = None) -> InputConfig:
        settings = settings or self._settings()
        short, long = settings["shortest_edge"], settings["longest_edge"]
        more, square = settings["processing"], None
        if self.kind == EOMT and more.do_pad and short is not None:
            square = short, long or short
        return more.input(
            InputConfig(
                settings["image_mean"],
                settings["image_std"],
                short,
                long,
                settings.get("size_divisor", 1),
                black=self.kind == EOMT,
                pad_size=square,
            )
        )

    def _maps(self, given, sizes: list[tuple[int, int]], takes: InputConfig, more) -> list[Tensor]:
        """Maps of labels, resized, [H, W] int64 each.

        Raises:
            TypeError, ValueError: not as many as images, or not of their sizes or dtypes.
        """
        given = inputs.each(given, 2 if len(sizes) > 1 else 3)
        if len(given) != len(sizes):
            raise ValueError(
                f"Processor: segmentation_maps must be {len(sizes)}, as images, got {len(given)}"
            )
        needs = self.kind not in (SEGFORMER, EOMT)  # an EoMT's has no do_reduce_labels
        if more.do_reduce_labels and more.ignore_index is None and needs:
            raise ValueError("Processor: ignore_index must be given with do_reduce_labels")
        maps = []
        for i, one in enumerate(given):
            labels = inputs.read_labels(one, f"Processor: segmentation_maps[{i}]")
            if tuple(labels.shape) != sizes[i]:
                raise ValueError(
                    f"Processor: segmentation_maps[{i}] must be {sizes[i][0]} x {sizes[i][1]}, as "
                    f"its image, got {list(labels.shape)}"
                )
            if more.do_reduce_labels and self.kind == SEGFORMER:
                labels = inputs.reduced(labels, 255)
                labels = torch.where(labels == 254, 255, labels)
            maps.append(inputs.resized_labels(labels, takes.resized(tuple(labels.shape))))
        return maps
