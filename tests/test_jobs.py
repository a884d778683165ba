"""Job files of docs/jobs: their scripts run, up to the command that they hand to torchrun."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed import run as torchrun

from segkern.cli import main
from support.own_pictures import write_shapes

JOBS = Path(__file__).parent.parent / "docs/jobs"
PRINTS = '#!/bin/bash\nprintf "%s\\0" "${0##*/}" "$@"\n'


def script(name):
    """A job's script, and the variables that its system sets."""
    if name == "slurm.sh":
        system = {"NODELIST": "gpu[1-2]", "JOB_ID": "77"}
        system = {f"SLURM_JOB_{k.removeprefix('JOB_')}": v for k, v in system.items()}
        system |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
        return ["bash", str(JOBS / name)], system
    service, job = yaml.safe_load_all((JOBS / name).read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert {one["name"] for one in container["env"]} == {"DATA", "RUN"}
    return container["command"], {}


@pytest.mark.parametrize("name", ["slurm.sh", "kubernetes.yaml"])
def test_jobs_train_and_go_on(name, tmp_path, monkeypatch):
    for program in ("srun", "torchrun"):
        (tmp_path / program).write_text(PRINTS)
        (tmp_path / program).chmod(0o755)
    (tmp_path / "scontrol").write_text("#!/bin/bash\nprintf 'gpu1\\ngpu2\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    data, run = tmp_path / "my data", tmp_path / "run"
    write_shapes(data, "instance")
    command, system = script(name)
    given = {"DATA": str(data), "RUN": str(run), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def torchruns():
        done = subprocess.run(command, env=os.environ | given | system, capture_output=True)
        assert done.returncode == 0, done.stderr
        found = done.stdout.decode().split("\0")[:-1]
        return torchrun.parse_args(found[found.index("torchrun") + 1 :])

    asked = torchruns()
    assert (asked.nnodes, asked.nproc_per_node, asked.rdzv_backend) == ("2", "8", "c10d")
    assert asked.rdzv_endpoint in ("gpu1:29400", "segkern-0.segkern:29400")
    assert (asked.module, asked.training_script) == (True, "segkern")
    trained = []

    def train(config, resume, *_):
        trained.append((config, resume))
        raise ValueError("seen")

    monkeypatch.setattr("segkern.cli.train.run_train", train)
    assert main(asked.training_script_args) == 2
    ((config, resume),) = trained
    assert (str(config.data.root), config.output, resume) == (str(data), run, None)
    (run / "checkpoints/.0000005").mkdir(parents=True)  # of a write that was killed
    assert torchruns().training_script_args[:2] == ["train", "--data.root"]
    (run / "checkpoints/0000005").mkdir()
    assert torchruns().training_script_args == ["train", "--resume", str(run)]


def within(part, whole):
    """Whether all of `part` is in `whole`."""
    if isinstance(part, dict):
        return all(key in whole and within(x, whole[key]) for key, x in part.items())
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(within, part, whole))
    return str(part) == str(whole)  # kubectl writes quantities as text


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kubectl_knows_every_field_of_the_job(tmp_path):
    """Without a server it reads a job into its own types, and drops what these do not have."""
    _, job = yaml.safe_load_all((JOBS / "kubernetes.yaml").read_text())

    def read(job):
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
        command = ["kubectl", "set", "image", "--local", "-f", tmp_path / "job.yaml"]
        done = subprocess.run([*command, "train=other", "-o", "yaml"], capture_output=True)
        assert done.returncode == 0, done.stderr
        found = yaml.safe_load(done.stdout)
        (container,) = found["spec"]["template"]["spec"]["containers"]
        assert container["image"] == "other"
        container["image"] = "segkern:latest"
        return found

    assert within(job, read(job))
    job["spec"]["completion"] = 2
    assert not within(job, read(job))
