"""A model behind HTTP: pictures in, segments out (docs/serve.md)."""

from .settings import ServeConfig

__all__ = ["ServeConfig"]
