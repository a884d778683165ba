"""Tables of names: what the weights of one format are called in another, both ways."""

import re
from collections.abc import Iterable

Pairs = Iterable[tuple[str, str]]


def renamed(
    names: Iterable[str], pairs: Pairs, prefix: tuple[str, str] | None = None, back: bool = False
) -> dict[str, str]:
    """The new name of each name; one that no row knows keeps its own.

    Args:
        names: of weights.
        pairs: rows of the table: a module's (or weight's) name there and here, with `#` for a
            number, which stands as often and in the same order in both.
        prefix: what names begin with there and here that no row knows.
        back: from here to there.
    """
    rules = _compiled([(b, a) for a, b in pairs] if back else pairs)
    out = {}
    for name in names:
        out[name] = name
        for pattern, template in rules:
            new, count = pattern.subn(template, name)
            if count:
                out[name] = new
                break
        else:
            if prefix is not None and name.startswith(prefix[back]):
                out[name] = prefix[1 - back] + name.removeprefix(prefix[back])
    return out


def _compiled(pairs: Pairs) -> list[tuple[re.Pattern, str]]:
    rules = []
    for source, target in pairs:
        pattern = re.escape(source).replace(r"\#", r"(\d+)")
        template, *rest = target.split("#")
        template += "".join(rf"\g<{i}>{part}" for i, part in enumerate(rest, 1))
        rules.append((re.compile(rf"^{pattern}(?=$|\.[a-z_]+$)"), template))
    return rules
