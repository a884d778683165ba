"""The Dockerfile and .dockerignore, read as Docker reads them; no image is built here."""

import ast
import json
import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest

from segkern import cli
from segkern.deploy.serve import ServeConfig
from segkern.deploy.serve.gate import FREE

ROOT = Path(__file__).parents[2]


def instructions():
    """(name, arguments) of each instruction, lines that go on joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield name, rest.strip()


STEPS = list(instructions())
LAST = STEPS[max(i for i, (name, _) in enumerate(STEPS) if name == "FROM") :]


def only(name):
    (found,) = (rest for step, rest in LAST if step == name)
    return found


def sent(path):
    """Whether .dockerignore lets a file into the build: the last rule that fits decides."""
    found = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").removeprefix("**/")
        parts = [path, *map(str, PurePosixPath(path).parents)][:-1] if "/" in path else [path]
        names = [PurePosixPath(x).name for x in parts] if "**/" in rule else parts
        if any(fnmatch(x, pattern) for x in names):
            found = rule.startswith("!")
    return found


def test_packages_are_debians_and_pypis():
    assert {rest.split()[0] for name, rest in STEPS if name == "FROM"} == {"debian:bookworm-slim"}
    for name, rest in STEPS:
        assert name != "ADD"
        assert not re.search(r"curl|wget|index-url|https?://(?!127\.0\.0\.1)|git\+", rest), rest
    assert "[serve]" in " ".join(rest for _, rest in STEPS)


def test_it_runs_as_nobody_in_particular_and_is_watched():
    assert int(only("USER")) > 1000
    assert int(only("EXPOSE")) == ServeConfig.port
    order = [name for name, _ in LAST]
    assert order.index("USER") < order.index("ENTRYPOINT")
    command = json.loads(only("HEALTHCHECK").partition("CMD ")[2])
    assert command[:2] == ["python3", "-c"]
    ast.parse(command[2])
    path = re.search(r"127\.0\.0\.1:8000(/\w+)", command[2])[1]
    assert path in FREE  # a watch has no key


def test_its_command_is_one(monkeypatch):
    seen = []
    monkeypatch.setattr("segkern.deploy.serve.run.serve", seen.append)
    entry, rest = (json.loads(only(name)) for name in ("ENTRYPOINT", "CMD"))
    assert entry[0] == "segkern"
    assert cli.main([*entry[1:], *rest]) == 0
    assert (seen[0].model, seen[0].host) == ("/model", "0.0.0.0")


def test_what_is_copied_is_there_and_no_more():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a repository: what it holds is not known")
    files = {x for x in listed.stdout.splitlines() if sent(x)}
    for name, rest in STEPS:
        if name == "COPY" and "--from" not in rest:
            for source in shlex.split(rest)[:-1]:
                assert source == "." or source in files, source
    needed = ("setup.py", "pyproject.toml", "tools/toolchain.py", "csrc/common.h", "README.md")
    assert {*needed, "LICENSE", "segkern/deploy/serve/page.html"} <= files
    assert {x.split("/")[0] for x in files if "/" in x} == {"segkern", "csrc", "tools"}
    for path in (
        "segkern/_C_cpu.abi3.so",
        "segkern/io/__pycache__/a.pyc",
        ".git/config",
        ".venv/x",
    ):
        assert not sent(path), path
