"""Segments pictures with the model.onnx beside this file: python predict.py PICTURE ...

Needs numpy, pillow and onnxruntime alone. Writes NAME.overlay.png and NAME.json of each: the
segments with a score, an area, a box [x, y, width, height] and a mask as COCO's run lengths.

Letters: C channel, Q query, K class, H W size of the picture, h w size in the model.
"""

import argparse
import colorsys
import json
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def read(path):
    """A picture [H, W, 3] uint8, upright, on white where it is transparent."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert would cut off at 255
        deep = np.asarray(image, np.float32).clip(0, 65535)
        image = Image.fromarray((deep / 65535 * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def size_in_model(size, takes):
    """(h, w) that a picture (H, W) is resized to."""
    short, long = takes["shortest_edge"], takes["longest_edge"]
    if not (takes["size"] or takes["within"] or short or long):
        return size
    if takes["size"]:
        size = takes["size"]
    elif takes["within"]:
        scale = min(most / side for side, most in zip(size, takes["within"]))
        size = [max(1, int(side * scale)) for side in size]
    elif takes["multiple"] and short:
        exact = short
        if long and max(size) / min(size) * short > long:
            exact = long * min(size) / max(size)
        if round(exact) != min(size):
            sides = max(1, round(exact)), max(1, int(exact * max(size) / min(size)))
            size = sides if size[0] <= size[1] else sides[::-1]
    else:
        scale = short / min(size) if short else min(1, long / max(size))
        scale = min(scale, long / max(size)) if long else scale
        if short or scale < 1:
            size = [max(1, int(side * scale + 0.5)) for side in size]
    return [ceil(side / (takes["multiple"] or 1)) * (takes["multiple"] or 1) for side in size]


def pixels_of(image, takes):
    """A picture [C, h, w] float32 as the model takes it, not yet padded."""
    h, w = size_in_model((image.height, image.width), takes)
    kind = takes["resample"].split("-")[0].upper()
    x = np.asarray(image.resize((w, h), Image.Resampling[kind]), np.float32) / 255
    mean, std = np.float32(takes["mean"]), np.float32(takes["std"])
    return ((x - mean) / std).transpose(2, 0, 1)


def padded(x, takes):
    """Padded below and to the right as the model was trained."""
    divisor = 1 if takes["multiple"] else takes["divisor"]
    size = takes["pad_size"] or [ceil(n / divisor) * divisor for n in x.shape[1:]]
    fill = -np.float32(takes["mean"]) / np.float32(takes["std"]) * takes["black"]
    out = np.broadcast_to(fill[:, None, None], (len(x), *size)).astype(np.float32)
    out[:, : x.shape[1], : x.shape[2]] = x
    return out


def resized(x, size):
    """Maps [..., h, w], bilinearly."""
    for axis, n in zip((-2, -1), size):
        m = x.shape[axis]
        at = np.maximum((np.arange(n) + 0.5) * (m / n) - 0.5, 0)
        low = np.minimum(at.astype(int), m - 1)
        share = (at - low).astype(np.float32)
        share = share[:, None] if axis == -2 else share
        high = np.take(x, np.minimum(low + 1, m - 1), axis)
        x = np.take(x, low, axis) * (1 - share) + high * share
    return x


def sigmoid(x):
    """1 / (1 + e^-x), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def softmax(x):
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_windows(run, x, size, takes):
    """The likeliest class [H, W], from the mean of the windows of pixels [C, h, w]; without
    windows the whole picture is one."""
    side, step, by_pixels = takes["window"], takes["stride"], takes["form"] == "pixels"
    (h, w), total, count = x.shape[1:], None, None
    if side and by_pixels and min(h, w) < side:
        h, w = (side, int(w / h * side)) if h < w else (int(h / w * side), side)
        x = resized(x, (h, w))
    tall, wide = (side, side) if side else (h, w)
    for top in starts(h, tall, step):
        for left in starts(w, wide, step):
            place = slice(top, top + tall), slice(left, left + wide)
            window = padded(x[:, *place], takes)
            classes, *masks = (r[0] for r in run(window[None]))
            maps = resized(classes if by_pixels else masks[0], window.shape[1:])[:, :tall, :wide]
            if not by_pixels:
                maps = np.tensordot(softmax(classes)[:, :-1].T, sigmoid(maps), 1)
            if total is None:
                total, count = (
                    np.zeros((len(maps), h, w), np.float32),
                    np.zeros((h, w), np.float32),
                )
            total[:, *place] += maps
            count[place] += 1
    return resized(total / count, size).argmax(0)


def starts(size, window, step):
    """Where windows begin along a side; the last one ends with it."""
    if not step:
        gaps = ceil(size / window) - 1
        return [i * (size - window) // max(gaps, 1) for i in range(gaps + 1)]
    return [*range(0, size - window, step), size - window]


def segments_of(run, image, takes):
    """The segments of a picture: (id, label, score, mask [H, W] bool), and for the overlay."""
    size, x = (image.height, image.width), pixels_of(image, takes)
    stuff, task = set(takes["stuff"]), takes["task"]
    if takes["form"] == "pixels" or (takes["window"] and task == "semantic"):
        labels = by_windows(run, x, size, takes)
        return [(int(k), int(k), None, labels == k) for k in np.unique(labels)]
    whole = padded(x, takes)
    classes, masks = (r[0] for r in run(whole[None]))
    chances = softmax(classes)

    def in_model(masks):
        return resized(masks, whole.shape[1:])[:, : x.shape[1], : x.shape[2]]

    def at_size(masks):
        return resized(in_model(masks), size)

    if task == "semantic":
        early = takes["resize"] == "scores"  # summed in the model's size, then resized
        shares = sigmoid(in_model(masks) if early else at_size(masks))
        scores = np.tensordot(chances[:, :-1].T, shares, 1)
        labels = (resized(scores, size) if early else scores).argmax(0)
        return [(int(k), int(k), None, labels == k) for k in np.unique(labels)]
    if task == "instance":
        K, found = chances.shape[1] - 1, []
        for pair in np.argsort(-chances[:, :-1].ravel(), kind="stable")[: takes["top_k"]]:
            (query, label), score = divmod(int(pair), K), chances[:, :-1].flat[pair]
            if label not in stuff:
                logits = at_size(masks[query : query + 1])[0]
                mask = logits > 0
                score = score * (sigmoid(logits) * mask).sum() / (mask.sum() + 1e-6)
                found.append((label, float(score), mask))
        found = sorted((f for f in found if f[1] >= takes["threshold"]), key=lambda f: -f[1])
        return [(i, *one) for i, one in enumerate(found, 1)]
    labels, scores = chances.argmax(1), chances.max(1)
    kept = np.flatnonzero((labels < chances.shape[1] - 1) & (scores > takes["threshold"]))
    if not len(kept):
        return []
    logits = at_size(masks[kept])
    winner = (scores[kept, None, None] * sigmoid(logits)).argmax(0)
    found = []
    for i, query in enumerate(kept):
        won, label, score = winner == i, int(labels[query]), float(scores[query])
        mask = won & (logits[i] >= 0)
        if not mask.any() or won.sum() < takes["overlap_threshold"] * (logits[i] >= 0).sum():
            continue
        same = [n for n, f in enumerate(found) if label in stuff and f[1] == label]
        if same:  # stuff of a label is one segment
            number, _, best, before = found[same[0]]
            found[same[0]] = number, label, max(best, score), before | mask
        else:
            found.append((len(found) + 1, label, score, mask))
    return found


def as_json(found, image, takes, names):
    """The result in plain types."""
    segments = []
    for number, label, score, mask in found:
        ys, xs = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        box = [0, 0, 0, 0]
        if len(ys):
            box = [xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]]
        flat = mask.ravel(order="F")  # COCO counts down the columns, zeros first
        edges = np.flatnonzero(np.diff(np.concatenate(([False], flat)).astype(np.int8)))
        counts = np.diff(np.concatenate(([0], edges, [flat.size])))
        segments.append(
            {
                "id": number,
                "label_id": label,
                "label": names.get(str(label), str(label)),
                "score": None if score is None else round(score, 6),
                "isthing": label not in takes["stuff"],
                "area": int(mask.sum()),
                "bbox": [int(n) for n in box],
                "segmentation": {"size": list(mask.shape), "counts": counts.tolist()},
            }
        )
    return {"task": takes["task"], "size": [image.height, image.width], "segments": segments}


def overlay(found, image):
    """The picture in grey with its segments in colour, the best on top."""
    out = np.asarray(image.convert("L").convert("RGB"), np.float32)
    for number, _, _, mask in reversed(found):
        colour = np.float32(colorsys.hsv_to_rgb(number * 0.618 % 1, 0.7, 1)) * 255
        out[mask] = 0.5 * np.asarray(image.convert("L"), np.float32)[mask][:, None] + 0.5 * colour
    return Image.fromarray(out.astype(np.uint8))


def names_of(paths):
    """Names of results: stems, made unique by _2, _3 and so on."""
    names = {}
    for path in paths:
        name, number = path.stem, 1
        while name.casefold() in names:
            number += 1
            name = f"{path.stem}_{number}"
        names[name.casefold()] = name
    return list(names.values())


def main():
    """Segments the pictures that the command line names."""
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results"))
    given, here = parser.parse_args(), Path(__file__).parent
    takes = json.loads((here / "preprocessing.json").read_text(encoding="utf-8"))
    names = json.loads((here / "labels.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(str(here / "model.onnx"))
    given.out.mkdir(parents=True, exist_ok=True)
    for path, name in zip(given.pictures, names_of(given.pictures)):
        image = read(path)
        found = segments_of(lambda x: session.run(None, {"pixel_values": x}), image, takes)
        target = given.out / f"{name}.json"
        target.write_text(json.dumps(as_json(found, image, takes, names)), encoding="utf-8")
        overlay(found, image).save(given.out / f"{name}.overlay.png")
        print(f"{path}: {len(found)} segments; written: {target}")


if __name__ == "__main__":
    main()
