"""Anything in any place of an annotation file, as hands and tools leave it."""

ANYTHING = [None, True, -1, 1.5, 10**30, "", "x", "1", [], [[]], {}, [None], [1, "x"]]
ANYTHING += [float("nan"), float("inf"), {"counts": 5, "size": [30, 40]}, {"size": "ab"}]


def spoil(content, rng):
    """Puts anything in a place of nested lists and dicts, or nothing."""
    places = []

    def collect(part):
        for key in part if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], (dict, list)):
                collect(part[key])

    collect(content)
    part, key = rng.choice(places)
    if isinstance(part, dict) and rng.random() < 0.3:
        del part[key]
    else:
        part[key] = rng.choice(ANYTHING)
