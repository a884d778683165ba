"""The street itself: camera and weather, and sky, ground and walls, drawn pixel by pixel.

Letters: H W image size; x y z metres to the right of the camera, above the ground and ahead;
u v column and row of a pixel, f focal length in pixels.

    u = u0 + f x / z,  v = v0 - f (y - EYE) / z,  (u0, v0) where the street's lines meet

Ground and walls are planes: a row of the ground has one depth, and so has a column of a wall. What
is on them (marks, slabs, windows) keeps its perspective so.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

# in the order of the drawings' colours (io.overlay): sky blue, signs orange, trees green, cars
# red, road violet, poles teal, pavement pink, people yellow, buildings brown
CLASSES = ("sky", "sign", "tree", "car", "road", "pole", "pavement", "person", "building")
SKY, SIGN, TREE, CAR, ROAD, POLE, PAVEMENT, PERSON, BUILDING = range(len(CLASSES))
EYE = 1.5  # height of the camera

_TILE = 512  # side of the noise
# surfaces by number; from _FIXED on three for each building: wall, window, ground floor
_COLOURS = [(0, 0, 0), (92, 92, 96), (205, 205, 200), (150, 148, 144), (142, 138, 134)]
_LABELS = [SKY, ROAD, ROAD, PAVEMENT, PAVEMENT]
_ROUGH = [0.0, 0.05, 0.05, 0.05, 0.06]  # how much the grain shows
_SKY, _ASPHALT, _PAINT, _KERB, _SLAB = range(len(_LABELS))
_FIXED = len(_LABELS)

_ROW = 16  # buildings of a side
_ALL = 2 * _ROW + 1  # and what ends the street
_WALLS = [(150, 140, 128), (168, 120, 95), (190, 180, 160), (135, 138, 142), (205, 200, 192)]
_WALLS = np.array([*_WALLS, (120, 85, 70), (176, 160, 120), (110, 115, 120)])


class Street:
    """What all parts of a scene share: camera, widths in metres, weather."""

    def __init__(self, rng, size: tuple[int, int]):
        self.height, self.width = size
        self.f = 1.1 * self.height
        self.v0 = self.height * rng.uniform(0.36, 0.46)
        self.u0 = self.width * rng.uniform(0.38, 0.62)
        self.road = -rng.uniform(3.5, 7.5), rng.uniform(2.2, 4.5)
        self.walls = self.road[0] - rng.uniform(1.6, 4.5), self.road[1] + rng.uniform(1.6, 4.5)
        self.end = rng.uniform(35, 110)  # depth at which the street ends
        self.sun = int(rng.choice((-1, 0, 0, 1)))  # side that it shines from; 0: clouded over
        self.haze = rng.uniform(40, 260)  # depth at which two thirds of a colour are the sky's
        grey, blue = rng.uniform(165, 225), rng.uniform(0, 1) * (self.sun != 0)
        self.horizon = np.array((grey, grey + 4, grey + 8), np.float32)
        self.zenith = self.horizon - np.float32(blue) * np.array((95, 55, 0), np.float32)

    def at(self, x: float, y: float, z: float) -> tuple[float, float]:
        """(u, v) of a point."""
        scale = self.f / z
        return self.u0 + x * scale, self.v0 - (y - EYE) * scale


@cache
def _noise() -> np.ndarray:
    """[2, side, side] of about unit size, of fine and coarse grain, without seams."""
    from scipy.ndimage import gaussian_filter  # here, as the command line need not bring it

    rng = np.random.RandomState(0)  # a frozen stream
    layers = []
    for widths in ((0.7, 1.6), (4, 14)):
        layer = sum(w * gaussian_filter(rng.randn(_TILE, _TILE), w, mode="wrap") for w in widths)
        layers.append(layer / (2 * layer.std()))
    return np.stack(layers).astype(np.float32)


def grain(rng, layer: int, height: int, width: int) -> np.ndarray:
    """A part [height, width] of the noise; layer 0 is fine, 1 coarse."""
    y, x = rng.integers(_TILE, size=2)
    rows = _noise()[layer].take(range(y, y + height), axis=0, mode="wrap")
    return rows.take(range(x, x + width), axis=1, mode="wrap")


def surfaces(rng, street: Street) -> tuple[np.ndarray, np.ndarray]:
    """Image [H, W, 3] uint8 and label [H, W] uint8 of each pixel."""
    H, W = street.height, street.width
    u, v = np.arange(W, dtype=np.float32) + 0.5, np.arange(H, dtype=np.float32) + 0.5
    first = int(street.v0 + 1)  # row in which the ground begins
    surface = np.full((H, W), _SKY, np.uint8)
    light = np.ones((H, W), np.float32)
    clear = np.ones((H, 1), np.float32)  # share of a colour that the haze leaves
    z = np.float32(street.f * EYE) / (v[first:] - np.float32(street.v0))
    clear[first:, 0] = np.exp(-z / street.haze)
    surface[first:], light[first:] = _ground(rng, street, u, z)

    walls = _walls(rng, street, u)
    y = EYE + (np.float32(street.v0) - v)[:, None] * (walls.z / np.float32(street.f))
    inside = (y >= 0) & (y < walls.height)
    floor = y / walls.storey
    part = 2 * (floor < 1).astype(np.uint8)  # ground floor, else wall
    part[(abs(floor - np.floor(floor) - 0.57) < 0.22) & walls.opens] = 1
    surface = np.where(inside, walls.surface + part, surface)
    light = np.where(inside, walls.light, light)
    clear = np.where(inside, np.exp(-walls.z / np.float32(street.haze)), clear)

    base = np.array(_COLOURS) * rng.uniform(0.75, 1.2, (_FIXED, 1)) + rng.uniform(-8, 8, 3)
    colours = np.concatenate((base, walls.colours)).astype(np.float32)
    rough = np.concatenate((_ROUGH, walls.rough)).astype(np.float32)
    labels = np.concatenate((_LABELS, walls.labels)).astype(np.uint8).take(surface)
    light *= 1 + rough.take(surface) * (grain(rng, 0, H, W) + grain(rng, 1, H, W))
    light *= clear
    horizon, zenith = (x[:, None, None] for x in (street.horizon, street.zenith))
    image = np.stack([channel.take(surface) for channel in colours.T])  # inner loops are long so
    image *= light
    image += (1 - clear) * horizon
    rise = np.linspace(1, 0, first, dtype=np.float32)[:, None]
    clouds = np.float32(16 * rng.random()) * grain(rng, 1, first, W)
    sky = clouds + rise * (zenith - horizon) + horizon
    np.copyto(image[:, :first], sky, where=surface[:first] == _SKY)
    return interleaved(image), labels


def interleaved(image: np.ndarray) -> np.ndarray:
    """[3, H, W] floating as [H, W, 3] uint8."""
    return np.ascontiguousarray(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def _ground(rng, street: Street, u, z) -> tuple[np.ndarray, np.ndarray]:
    """Surface and light [h, W] of the rows at depths z [h]."""
    left, right = street.road
    x = (u - np.float32(street.u0)) * (z / np.float32(street.f))[:, None]
    step = (x > left - 0.2).view(np.uint8) + (x > left) + (x > right) + (x > right + 0.2)
    surface = np.array((_SLAB, _KERB, _ASPHALT, _KERB, _SLAB), np.uint8).take(step)
    road = step == 2
    if rng.random() < 0.8:  # line in the middle, dashed or not
        dashes = (z + rng.uniform(0, 6)) % 6 < rng.choice((3, 6))
        surface[road & (abs(x - rng.uniform(-1.8, -1.2)) < 0.08) & dashes[:, None]] = _PAINT
    if rng.random() < 0.3:  # crossing
        at = rng.uniform(5, 16)
        stripes = (x - np.floor(x) < 0.5) & ((z > at) & (z < at + 3.5))[:, None]
        surface[road & stripes] = _PAINT
    light = np.ones(x.shape, np.float32)
    joints = (1.1 * x - np.floor(1.1 * x) < 0.09) | ((z % 0.9 < 0.08) & (z < 8))[:, None]
    light[joints & (surface == _SLAB) & (z < 14)[:, None]] = 0.85
    for _ in range(rng.integers(3)):  # mended asphalt
        x0, half = rng.uniform(left, right), rng.uniform(0.4, 1.4)
        rows = abs(z - rng.uniform(3, 20)) < rng.uniform(0.5, 3)
        light[road & (abs(x - x0) < half) & rows[:, None]] = rng.uniform(0.75, 1.15)
    if street.sun:  # houses throw shadows
        edges = np.interp(z, np.linspace(0, 60, 8), rng.uniform(-2, 4, 8)).astype(np.float32)
        light[street.sun * x > edges[:, None]] *= 0.6
    return surface, light


class _Walls(NamedTuple):
    """What stands along the street.

    Attributes:
        z: depth of each column [W].
        height, storey: metres [W].
        surface: the first of the three of its building [W].
        light: brightness [W].
        opens: whether windows are in it [W].
        colours, labels, rough: of all surfaces of buildings [n, 3], [n], [n].
    """

    z: np.ndarray
    height: np.ndarray
    storey: np.ndarray
    surface: np.ndarray
    light: np.ndarray
    opens: np.ndarray
    colours: np.ndarray
    labels: np.ndarray
    rough: np.ndarray


def _walls(rng, street: Street, u) -> _Walls:
    """Buildings and trees along both sides with gaps between them, and what ends the street."""
    side = (u > street.u0).astype(int)
    z = street.f * np.abs(street.walls)[side] / np.maximum(abs(u - street.u0), 1e-3)
    number = np.empty(len(u), int)
    for s in (0, 1):
        cuts = np.cumsum(rng.uniform(4, 15, _ROW))
        gaps = rng.random(_ROW) < 0.18  # a column in a gap sees the face of what comes after it
        house = np.searchsorted(cuts, z[side == s]).clip(0, _ROW - 1)
        z[side == s] = np.where(gaps[house], cuts[house], z[side == s])
        number[side == s] = _ROW * s + (house + gaps[house]).clip(0, _ROW - 1)
    far = z >= street.end
    z[far], number[far] = street.end, _ALL - 1
    place = np.where(far, (u - street.u0) * street.end / street.f, z)

    wood = rng.random(_ALL) < np.append(np.full(_ALL - 1, 0.15), 0.5)  # trees for a wall
    house = rng.uniform(5, 8, _ALL) + 3.2 * rng.integers(6, size=_ALL)
    height = np.where(wood, rng.uniform(3, 9, _ALL), house)
    height[rng.random(_ALL) < 0.04] = 0
    storey = np.where(wood, 99, rng.uniform(2.8, 3.8, _ALL))
    ragged = 1 + 0.12 * wood[number] * grain(rng, 0, 1, len(u))[0]
    share = place / rng.uniform(1.5, 3.5, _ALL)[number] % 1
    wall = _WALLS[rng.integers(len(_WALLS), size=_ALL)] * rng.uniform(0.75, 1.15, (_ALL, 1))
    glass = np.where(rng.random((_ALL, 1)) < 0.8, (62, 72, 84), (205, 205, 190))
    glass = glass * rng.uniform(0.7, 1.2, (_ALL, 1))
    leaves = (70, 92, 50) * rng.uniform(0.6, 1.2, (_ALL, 1)) + rng.uniform(-10, 14, (_ALL, 3))
    colours = np.stack((wall, glass, wall * rng.uniform(0.5, 1.05, (_ALL, 1))), 1)
    colours[wood] = leaves[wood, None]
    light = {-1: (0.82, 1.12), 0: (1, 0.95), 1: (1.12, 0.82)}[street.sun]
    return _Walls(
        z.astype(np.float32),
        (height[number] * ragged).astype(np.float32),
        storey[number].astype(np.float32),
        (_FIXED + 3 * number).astype(np.uint8),
        np.array(light, np.float32)[side],
        (share > 0.25) & (share < 0.7),
        colours.reshape(-1, 3),
        np.where(wood, TREE, BUILDING).repeat(3),
        np.where(wood, 0.3, 0.05).repeat(3),
    )
