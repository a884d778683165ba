"""Trains the small recipes side by side, a core each, and fails where one has not learned what it
is there to show: python tools/gate.py OUT"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


class Gate(NamedTuple):
    """What a recipe must reach on scenes that it never saw.

    Attributes:
        recipe: of `segkern train`.
        metric: of `segkern evaluate`.
        least: of the metric.
        options: of `segkern train`; more steps than the recipe's where machines that round
            otherwise end a little above or below.
    """

    recipe: str
    metric: str
    least: float
    options: tuple[str, ...] = ()


GATES = [
    Gate("digits-segmenter", "miou", 0.8, ("--steps", "3000")),
    Gate("digits-segformer", "miou", 0.8),
    Gate("digits-seq2seg-semantic", "miou", 0.75),
]


def run(gate: Gate, out: Path) -> float:
    """The metric that a recipe reaches.

    Raises:
        CalledProcessError: a command failed; its output is in it.
    """
    folder, figures = out / gate.recipe, out / f"{gate.recipe}.json"
    train = ["train", "--recipe", gate.recipe, *gate.options, "--output", folder, "--overwrite"]
    for command in train, ["evaluate", folder, "--out", figures]:
        subprocess.run(
            [sys.executable, "-m", "segkern", *map(str, command)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
    return json.loads(figures.read_text())[gate.metric]


def main(out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    missed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [(gate, pool.submit(run, gate, out)) for gate in GATES]
        for gate, future in runs:
            try:
                value = future.result()
            except subprocess.CalledProcessError as error:
                print(f"{gate.recipe}: {error}\n{error.stdout}{error.stderr}", flush=True)
                missed += 1
                continue
            print(f"{gate.recipe}: {gate.metric} {value:.3f} (at least {gate.least})", flush=True)
            missed += value < gate.least
    return missed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
