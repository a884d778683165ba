"""Trains the small recipes side by side, a core each, and fails where one has not learned what it
is there to show: python tools/gate.py OUT [RECIPE ...]"""

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
        least: of each metric of `segkern evaluate`.
        options: of `segkern train`; more steps than the recipe's where machines that round
            otherwise end a little above or below.
        measured: options of `segkern evaluate`.
    """

    recipe: str
    least: dict[str, float]
    options: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()


GATES = [
    # what `segkern demo` trains and measures
    Gate("digits", {"pq": 0.8, "class_accuracy": 0.9}, measured=("--level", "easy")),
    Gate("digits-segmenter", {"miou": 0.8}, ("--steps", "3000")),
    Gate("digits-segformer", {"miou": 0.8}),
    Gate("digits-seq2seg-semantic", {"miou": 0.75}),
    # classes of the objects found, and PQ, which says that masks were learned
    Gate("digits-seq2seg", {"class_accuracy": 0.95, "pq": 0.6}),
]


def run(gate: Gate, out: Path) -> dict[str, float]:
    """The metrics that a recipe reaches, 0 where nothing was found that has one.

    Raises:
        CalledProcessError: a command failed; its output is in it.
    """
    folder, figures = out / gate.recipe, out / f"{gate.recipe}.json"
    train = ["train", "--recipe", gate.recipe, *gate.options, "--output", folder, "--overwrite"]
    for command in train, ["evaluate", folder, "--out", figures, *gate.measured]:
        subprocess.run(
            [sys.executable, "-m", "segkern", *map(str, command)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
    found = json.loads(figures.read_text())
    found |= found.get("things") or {}  # PQ of objects, without that of a background
    return {name: found[name] or 0.0 for name in gate.least}


def main(out: Path, *names: str) -> int:
    known = {gate.recipe: gate for gate in GATES}
    wanted = [known[name] for name in names or known]
    out.mkdir(parents=True, exist_ok=True)
    missed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [(gate, pool.submit(run, gate, out)) for gate in wanted]
        for gate, future in runs:
            try:
                found = future.result()
            except subprocess.CalledProcessError as error:
                print(f"{gate.recipe}: {error}\n{error.stdout}{error.stderr}", flush=True)
                missed += 1
                continue
            for name, least in gate.least.items():
                print(f"{gate.recipe}: {name} {found[name]:.3f} (at least {least})", flush=True)
            missed += any(found[name] < least for name, least in gate.least.items())
    return missed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
