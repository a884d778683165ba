"""Results as answers: JSON of ours and of Roboflow's conventions, label maps, drawings."""

import base64
import json
import uuid
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image

from ...io.contours import outline
from ...io.overlay import label_map
from ...structures.segmentation import Segmentation

JSON = "application/json"
FORMATS = {"json": JSON, "roboflow": JSON, "png": "image/png", "overlay": "image/png"}


def encode(results: Sequence[Segmentation], form: str, seconds: float) -> bytes:
    """Results in one of `FORMATS`.

    Args:
        results: of one picture, or of several as a list, of JSON only.
        form: "json" is what `Segmentation.to_json` returns, "roboflow" what `roboflow` does, "png"
            the label map as `io.overlay.label_map` draws it, "overlay" what `plot` draws.
        seconds: that the work took, which Roboflow's form holds.
    """
    if form == "png":
        return _png(label_map(results[0]))
    if form == "overlay":
        return _png(results[0].plot())
    found = [x.to_json() if form == "json" else roboflow(x, seconds) for x in results]
    content = found[0] if len(found) == 1 else found
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def roboflow(result: Segmentation, seconds: float) -> dict:
    """A result as Roboflow's inference API gives it.

    Instance and panoptic: `predictions` with x and y of the box's centre, width, height,
    confidence, class, class_id, detection_id, and points, the outer contour of the mask's largest
    piece, at least three; segments without a pixel are left out. Semantic: segmentation_mask, a
    PNG of label ids in base64, and class_map, names by the ids as text.
    """
    H, W = result.segmentation.shape
    size = {"time": round(seconds, 6), "image": {"width": W, "height": H}}
    if result.task == "semantic":
        ids = result.segmentation.cpu().numpy()
        ids = ids.astype(np.uint8 if ids.max(initial=0) < 256 else np.uint16)
        labels = (result.names or {}).keys() | {s.label_id for s in result.segments}
        return size | {
            "segmentation_mask": base64.b64encode(_png(Image.fromarray(ids))).decode("ascii"),
            "class_map": {str(label): result.name(label) for label in sorted(labels)},
        }
    predictions = []
    for i, (s, box) in enumerate(zip(result.segments, result.boxes.tolist())):
        if not s.area:
            continue
        x0, y0, x1, y1 = box
        points = outline(result.mask(i).cpu().numpy()).tolist()
        points += points[-1:] * (3 - len(points))  # readers want a polygon also of a line
        predictions.append(
            {
                "x": (x0 + x1) / 2,
                "y": (y0 + y1) / 2,
                "width": x1 - x0,
                "height": y1 - y0,
                "confidence": round(s.score, 6),
                "class": result.name(s.label_id),
                "class_id": s.label_id,
                "detection_id": str(uuid.uuid4()),
                "points": [{"x": x, "y": y} for x, y in points],
            }
        )
    return size | {"predictions": predictions}


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
