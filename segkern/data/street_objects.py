"""What stands and moves in a street: cars, people, trees, lamps and signs, drawn as polygons.

Letters: H W image size; x y z metres to the right of the camera, above the ground and ahead;
u v column and row of a pixel.

An object is a function that draws it on a canvas at a depth. What is left to chance about it is
drawn before, so that no draw depends on what is visible. Parts that would be smaller than a pixel
or two are left out.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from ..structures.labels import VOID
from .street_surfaces import CAR, PERSON, POLE, SIGN, TREE, Street

FIRST = 16  # id of the first car or person; lower ids are labels

_PAINTS = [(30, 32, 36), (205, 205, 205), (120, 124, 130), (150, 25, 25), (30, 55, 120)]
_PAINTS += [(215, 215, 210), (60, 62, 66), (40, 90, 70), (190, 160, 60), (90, 95, 100)]
_CLOTHES = [(40, 45, 70), (25, 25, 28), (130, 40, 45), (190, 185, 175), (70, 90, 60)]
_CLOTHES += [(60, 110, 150), (170, 130, 60), (95, 90, 88)]
_SKIN = [(205, 165, 140), (120, 85, 65)]
_SIGNS = [(190, 30, 35), (25, 75, 165), (225, 190, 40), (215, 215, 210), (20, 110, 70)]
_TYRE, _SHADOW, _BARK, _PLATE = (28, 28, 30), (38, 38, 42), (72, 60, 50), (215, 215, 205)


class Canvas:
    """A picture, and beside it whom each pixel belongs to: a label or an id of `labels`.

    Attributes:
        picture, owner: images of Pillow.
        labels: of the ids from FIRST on.
    """

    def __init__(self, image: np.ndarray, owner: np.ndarray, street: Street):
        self.picture, self.owner = Image.fromarray(image), Image.fromarray(owner)
        self.pens = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.owner)
        self.street = street
        self.labels: list[int] = []

    def new(self, label: int) -> int:
        """The id of another car or person."""
        self.labels.append(label)
        return FIRST + len(self.labels) - 1

    def pixels(self, metres: float, z: float) -> float:
        """What a length measures at a depth."""
        return self.street.f * metres / z

    def seen(self, z: float, *colours) -> list[tuple[int, ...]]:
        """Colours as they are seen through the haze."""
        share, horizon = np.exp(-z / self.street.haze), self.street.horizon
        mixed = share * np.array(colours) + (1 - share) * horizon
        return list(map(tuple, mixed.astype(int).tolist()))

    def face(self, points, colour, owner: int | None) -> None:
        """A polygon between points (x, y, z); without an owner, paint on what is there."""
        self._draw("polygon", [self.street.at(*p) for p in points], colour, owner)

    def upright(self, x, y, z, colour, owner: int | None = None) -> None:
        """A rectangle that faces the camera, x and y from and to; at least a pixel wide."""
        u0, v1 = map(round, self.street.at(x[0], y[0], z))
        u1, v0 = map(round, self.street.at(x[1], y[1], z))
        self._draw("rectangle", (u0, v0, max(u0, u1 - 1), max(v0, v1 - 1)), colour, owner)

    def disc(self, x, y, z, radius, colour, owner: int | None = None) -> None:
        """A disc that faces the camera."""
        (u, v), r = self.street.at(x, y, z), self.pixels(radius, z)
        self._draw("ellipse", (u - r, v - r, u + r, v + r), colour, owner)

    def bonnet(self, rng) -> None:
        """The car that the camera is in, which is void."""
        H, W = self.street.height, self.street.width
        rise, half = H * rng.uniform(0.05, 0.12), W * rng.uniform(0.3, 0.5)
        box = (W / 2 - half, H - rise, W / 2 + half, H + 3 * rise)
        self._draw("ellipse", box, _PAINTS[rng.integers(len(_PAINTS))], VOID)

    def _draw(self, shape: str, place, colour, owner: int | None) -> None:
        for pen, ink in zip(self.pens, (colour, owner)):
            if ink is not None:
                getattr(pen, shape)(place, ink)


def objects(rng, street: Street) -> list[tuple[float, Callable]]:
    """Depths, and what draws the object there, called with a canvas and the depth; far first."""
    things = []
    for side, edge in zip((-1, 1), street.road):
        if rng.random() < 0.75:  # parked along the kerb
            z, away = rng.uniform(3, 9), rng.random() < 0.5
            while z < 55:
                if rng.random() < 0.65:
                    things.append((z, _car(rng, edge - side * rng.uniform(1.05, 1.3), away)))
                z += rng.uniform(5, 7.5)
        if rng.random() < 0.55:
            apart, z = rng.uniform(6, 14), rng.uniform(3, 12)
            while z < 60:
                things.append((z, _tree(rng, edge + side * rng.uniform(0.6, 1.2))))
                z += apart * rng.uniform(0.8, 1.2)
        for z in rng.uniform(3.5, 35, rng.integers(1, 5)).tolist():
            things.append((z, _post(rng, edge + side * rng.uniform(0.3, 0.7), -side)))
        wide = abs(street.walls[(side + 1) // 2] - edge)
        for z in rng.uniform(3.5, 30, rng.integers(5)).tolist():
            things.append((z, _person(rng, edge + side * rng.uniform(0.4, wide - 0.3))))
    for _ in range(rng.integers(3)):  # driving
        ours = rng.random() < 0.5
        x = rng.uniform(-0.3, 0.5) if ours else rng.uniform(-3.6, -2.8)
        if x > street.road[0] + 1:
            things.append((rng.uniform(7, 50), _car(rng, x, ours)))
    for _ in range(rng.integers(3) * (rng.random() < 0.4)):  # crossing
        things.append((rng.uniform(5, 20), _person(rng, rng.uniform(*street.road))))
    return sorted((t for t in things if t[0] < street.end - 1), key=lambda t: -t[0])


def _pick(rng, colours) -> np.ndarray:
    """One of some colours, somewhat lighter or darker."""
    return np.array(colours[rng.integers(len(colours))]) * rng.uniform(0.8, 1.2)


def _car(rng, x: float, away: bool) -> Callable:
    """A car along the street that shows its back (`away`) or its front."""
    half, long, high = rng.uniform(0.8, 0.95), rng.uniform(3.6, 4.8), rng.uniform(1.35, 1.75)
    waist, roof = 0.62 * high, 0.82 * half
    start = long * rng.uniform(0.02, 0.3)  # of the cabin
    paint, glass = _pick(rng, _PAINTS), rng.uniform(0.7, 1.5) * np.array((40, 46, 54))
    lamps = (170, 30, 30) if away else (235, 235, 220)

    def car(canvas, z):
        me = canvas.new(CAR)
        back, flank, top, pane, tyre, shadow, lamp, plate = canvas.seen(
            z, paint, 0.8 * paint, 1.15 * paint, glass, _TYRE, _SHADOW, lamps, _PLATE
        )
        a, b, end = x - half, x + half, z + long
        side = a if x > 0 else b  # the one that is seen
        z0, z1 = z + start, z + 0.75 * long
        z2, z3 = z0 + 0.4, z1 - 0.5  # the roof
        canvas.face([(a - 0.1, 0, z), (b + 0.1, 0, z), (b, 0, end), (a, 0, end)], shadow, None)
        canvas.face([(a, waist, z), (b, waist, z), (b, waist, end), (a, waist, end)], top, me)
        points = [(side, 0.2, z), (side, waist, z), (side, waist, end), (side, 0.2, end)]
        canvas.face(points, flank, me)
        c, d = x - roof, x + roof
        inner = c if x > 0 else d
        points = [(side, waist, z0), (side, waist, z1), (inner, high, z3), (inner, high, z2)]
        canvas.face(points, pane, me)
        canvas.face([(c, high, z2), (d, high, z2), (d, high, z3), (c, high, z3)], top, me)
        canvas.face([(c, high, z2), (d, high, z2), (b, waist, z0), (a, waist, z0)], pane, me)
        fine = canvas.pixels(0.4, z) > 2.5
        for wheel in (0.8, long - 0.8) if fine else ():
            arch = ((0, -0.25), (0.5, -0.3), (0.6, 0), (0.5, 0.3), (0, 0.25))
            canvas.face([(side, y, z + wheel + dz) for y, dz in arch], tyre, me)
        canvas.upright((a, b), (0.2, waist), z, back, me)
        for left in (a, b - 0.4):
            canvas.upright((left, left + 0.4), (0, 0.3), z, tyre, me)
            canvas.upright((left, left + 0.35), (0.6 * waist, 0.85 * waist), z, lamp)
        if fine:
            canvas.upright((x - 0.26, x + 0.26), (0.4, 0.52), z, plate)

    return car


def _person(rng, x: float) -> Callable:
    """Somebody who stands or walks."""
    high, wide = rng.uniform(1.5, 1.9), rng.uniform(0.2, 0.28)
    clothes = [_pick(rng, kind) for kind in (_CLOTHES, _CLOTHES, _SKIN)]
    step, lean = rng.uniform(0, 0.22), x + rng.uniform(-0.05, 0.05)

    def person(canvas, z):
        me = canvas.new(PERSON)
        legs, coat, skin = canvas.seen(z, *clothes)
        hip, neck = 0.5 * high, 0.84 * high
        for foot in (x - step, x + step):
            leg = [
                (foot - 0.09, 0, z),
                (foot + 0.09, 0, z),
                (x + 0.13, hip, z),
                (x - 0.13, hip, z),
            ]
            canvas.face(leg, legs, me)
        chest = [(lean + wide, neck, z), (lean - wide, neck, z)]
        canvas.face([(x - 0.17, 0.95 * hip, z), (x + 0.17, 0.95 * hip, z), *chest], coat, me)
        canvas.disc(lean, 0.92 * high, z, 0.115, skin, me)

    return person


def _tree(rng, x: float) -> Callable:
    """A trunk and a crown of ragged outline."""
    high, wide = rng.uniform(4.5, 9), rng.uniform(1.2, 2.4)
    leaf = np.array((66, 92, 46)) * rng.uniform(0.7, 1.25) + rng.uniform(-8, 14, 3)
    base, middle = 0.32 * high, 0.66 * high
    angles, radii = np.linspace(0, 2 * np.pi, 19)[:-1], rng.uniform(0.75, 1.1, 18)
    us = (x + wide * radii * np.cos(angles)).tolist()
    vs = (middle + (middle - base) * radii * np.sin(angles)).tolist()
    spots, shades = rng.uniform(-0.55, 0.55, (9, 2)).tolist(), rng.uniform(0.72, 1.25, (9, 1))

    def tree(canvas, z):
        bark, green, *others = canvas.seen(z, _BARK, leaf, *(shades * leaf))
        canvas.upright((x - 0.13, x + 0.13), (0, middle), z, bark, TREE)
        canvas.face([(u, v, z) for u, v in zip(us, vs)], green, TREE)
        if canvas.pixels(wide, z) > 6:
            for (dx, dy), shade in zip(spots, others):
                y = middle + (middle - base) * dy
                canvas.disc(x + wide * dx, y, z, 0.3 * wide, shade)

    return tree


def _post(rng, x: float, inward: int) -> Callable:
    """A lamp, a bare pole, a traffic light or a traffic sign."""
    kind = rng.choice(("lamp", "pole", "light", "disc", "triangle", "square"))
    high = {"lamp": rng.uniform(5, 8), "pole": rng.uniform(0.9, 4)}.get(
        kind, rng.uniform(2.3, 3.2)
    )
    metal = np.array((112, 114, 116)) * rng.uniform(0.5, 1.3)
    half, board = rng.uniform(0.05, 0.09), _pick(rng, _SIGNS)
    on = int(rng.integers(3))

    def post(canvas, z):
        steel, plate, mark, case, lit = canvas.seen(
            *(z, metal, board, 0.5 * board + 110, (30, 34, 32)),
            (90, 220, 120) if on == 2 else (240, 90, 60),
        )
        canvas.upright((x - half, x + half), (0, high), z, steel, POLE)
        if kind == "lamp":
            canvas.upright(sorted((x, x + 1.6 * inward)), (high - 0.12, high), z, steel, POLE)
        elif kind == "light":
            canvas.upright((x - 0.18, x + 0.18), (high - 0.9, high), z, case, SIGN)
            canvas.disc(x, high - 0.2 - 0.25 * on, z, 0.1, lit)
        elif kind == "disc":
            canvas.disc(x, high, z, 0.38, plate, SIGN)
            canvas.disc(x, high, z, 0.22, mark)
        elif kind == "triangle":
            low, top = high - 0.3, high + 0.42
            canvas.face([(x - 0.42, low, z), (x + 0.42, low, z), (x, top, z)], plate, SIGN)
        elif kind == "square":
            canvas.upright((x - 0.34, x + 0.34), (high - 0.4, high + 0.4), z, plate, SIGN)
            canvas.upright((x - 0.2, x + 0.2), (high - 0.1, high + 0.1), z, mark)

    return post
