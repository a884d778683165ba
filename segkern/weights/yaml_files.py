"""YAML files of others' settings, of which nothing is executed."""

from pathlib import Path

import yaml


class _Loader(yaml.SafeLoader):
    """Plain YAML and tuples; what stands under another of Python's tags is None."""


_Loader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node))
)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


class _Dumper(yaml.SafeDumper):
    """Plain YAML, and tuples with Python's tag."""


_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:python/tuple", value)
)


def read_yaml(path: Path):
    """What a YAML file holds.

    Raises:
        ValueError: it is no YAML; says why in one line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def yaml_text(value, sort_keys: bool = True) -> str:
    """The text of a YAML file that holds `value`."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=sort_keys)
