"""Results in the forms of other tools: supervision's detections, COCO's annotations, results and
panoptic PNGs.

They are methods of `Segmentation`, which says what each returns.
"""

from collections.abc import Mapping, Sequence
from operator import index

import numpy as np
from PIL import Image

_ROOM = 2**24  # ids that a panoptic PNG can hold


def supervision_detections(result):
    """`Segmentation.to_supervision`."""
    try:
        import supervision
    except ImportError as error:
        raise ImportError(
            "to_supervision: needs supervision, which is not installed: pip install supervision"
        ) from error
    segments = result.segments
    masks = np.zeros((len(segments), *result.segmentation.shape), bool)
    for i, mask in enumerate(masks):
        mask[:] = result.mask(i).cpu().numpy()
    scored = all(s.score is not None for s in segments)
    return supervision.Detections(
        xyxy=result.boxes.cpu().numpy().astype(np.float32),
        mask=masks,
        confidence=np.array([s.score for s in segments], np.float32) if scored else None,
        class_id=np.array([s.label_id for s in segments], np.int64),
        data={"class_name": np.array([result.name(s.label_id) for s in segments], str)},
    )


def coco_annotations(
    result,
    image_id: int,
    category_ids: Mapping[int, int] | Sequence[int] | None,
    first_id: int,
) -> list[dict]:
    """`Segmentation.to_coco` with kind "annotations"."""
    rows = [s for s in result.to_json()["segments"] if s["area"]]
    return [
        {
            "id": _integer("to_coco: first_id", first_id) + i,
            "image_id": _integer("to_coco: image_id", image_id),
            "category_id": _category("to_coco", result, s["label_id"], category_ids),
            "segmentation": s["segmentation"],
            "area": s["area"],
            "bbox": s["bbox"],
            "iscrowd": 0,
        }
        for i, s in enumerate(rows)
    ]


def coco_results(
    result, image_id: int, category_ids: Mapping[int, int] | Sequence[int] | None
) -> list[dict]:
    """`Segmentation.to_coco` with kind "results"."""
    if any(s.score is None for s in result.segments):
        raise ValueError(
            f'to_coco: kind must be "annotations" for a {result.task} result, whose segments have '
            'no score, got "results"'
        )
    rows = zip(result.segments, result.to_json()["segments"])
    return [
        {
            "image_id": _integer("to_coco: image_id", image_id),
            "category_id": _category("to_coco", result, s.label_id, category_ids),
            "segmentation": row["segmentation"],
            "score": float(s.score),
        }
        for s, row in rows
    ]


def panoptic_png(
    result, category_ids: Mapping[int, int] | Sequence[int] | None
) -> tuple[Image.Image, list[dict]]:
    """`Segmentation.to_panoptic_png`."""
    from scipy import ndimage  # here, because it takes long to import

    ids, shift = result.segmentation.cpu().numpy(), int(result.task == "semantic")
    ids = ids + shift  # a semantic map has no void, and its first label is 0
    if ids.max(initial=0) >= _ROOM:
        raise ValueError(f"to_panoptic_png: ids must be below {_ROOM}, got {ids.max()}")
    areas, places = np.bincount(ids.ravel()), ndimage.find_objects(ids)
    segments = []
    for s in result.segments:
        i = s.id + shift
        if i >= len(areas) or areas[i] == 0:
            continue  # covered by others, or empty
        rows, columns = places[i - 1]
        segments.append(
            {
                "id": i,
                "category_id": _category("to_panoptic_png", result, s.label_id, category_ids),
                "area": int(areas[i]),
                "bbox": [
                    columns.start,
                    rows.start,
                    columns.stop - columns.start,
                    rows.stop - rows.start,
                ],
                "iscrowd": 0,
            }
        )
    colours = np.stack((ids & 255, ids >> 8 & 255, ids >> 16), 2).astype(np.uint8)
    return Image.fromarray(colours), segments


def _category(
    caller: str, result, label: int, ids: Mapping[int, int] | Sequence[int] | None
) -> int:
    """The category of a label.

    Raises:
        TypeError: `ids` is neither mapping nor sequence, or has no integer for the label.
        ValueError: it has nothing for the label.
    """
    if ids is None:
        return label
    name = f"{caller}: category_ids"
    try:
        found = ids[label]
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{name} must have every label of the result, got none for {label} "
            f"({result.name(label)})"
        ) from error
    except TypeError as error:
        raise TypeError(f"{name} must be a mapping or a sequence, got {ids!r}") from error
    return _integer(f"{name}[{label}]", found)


def _integer(name: str, value) -> int:
    """Python's own, which JSON can hold, also of NumPy's."""
    try:
        return index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {value!r}") from error
