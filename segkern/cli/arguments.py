"""Arguments that several commands take."""

from typing import Annotated, Literal

import tyro

from ..ops.segment_map import TASKS

Task = Literal[TASKS]
Model = Annotated[
    str, tyro.conf.arg(help="folder of a run or a model, or a name on the Hugging Face hub")
]
