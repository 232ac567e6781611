"""What schedulers get, to the byte. UPDATE_GOLDEN=1 writes the files anew."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import sweeps
from orchestrator.commands import kuberay_job, slurm_job
from orchestrator.commands.kuberay_job import KubeJob
from orchestrator.commands.slurm_job import SlurmJob
from orchestrator.errors import SpecError
from orchestrator.spec.loading.loader import load_spec, load_spec_text

GOLDEN = Path(__file__).parents[2] / "golden" / "jobs"
SHIPPED = Path(sweeps.__file__).parent
SPEC = load_spec(SHIPPED / "llama3-8b.yaml", ["storage=postgresql+psycopg://me@db/sweeps"])
ONE = SlurmJob(Path("/shared/runs"), Path("/shared/my venv/bin"), machines=1, cpus=16, gpus=0, time="60")
LARGE: dict[str, int] = {"machines": 4, "cpus": 96, "gpus": 8, "memory_gb": 900}
SLURM: dict[str, Any] = {"time": "2-00:00:00", "partition": "h100", "account": "lab", "trust_remote_code": True}
SLURM |= {"more": ("--constraint=nvlink", "--qos=preemptible")}
SLURM |= {"setup": ("module load cuda/13.0", "export HF_HOME=/shared/hf")}
MANY = SlurmJob(Path("/shared/runs"), Path("/shared/venv/bin"), **LARGE, **SLURM)
KUBE = KubeJob("registry.example/prefsweep:1", "prefsweep-runs", **LARGE)
RENDERED = {
    "one-machine.sh": slurm_job.render_slurm_job(SPEC, ONE),
    "four-machines.sh": slurm_job.render_slurm_job(SPEC, MANY),
    "kuberay.yaml": kuberay_job.render_kuberay_job(SPEC, KUBE),
}


@pytest.mark.parametrize("name", RENDERED)
def test_to_the_byte(name: str) -> None:
    golden = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(RENDERED[name])
    assert RENDERED[name] == golden.read_text(), f"{name} differs; if that is meant, UPDATE_GOLDEN=1"


@pytest.mark.parametrize("name", [name for name in RENDERED if name.endswith(".sh")])
def test_bash_understands_it(name: str) -> None:
    done = subprocess.run(["bash", "-n"], input=RENDERED[name], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_options_of_sbatch_stand_before_the_first_command() -> None:
    lines = RENDERED["four-machines.sh"].splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first:])
    assert "#SBATCH --signal=B:USR1@180" in lines[:first]
    assert "#SBATCH --requeue" in lines[:first]


@pytest.mark.parametrize("name", RENDERED)
def test_the_sweep_inside_is_the_sweep(name: str) -> None:
    text = RENDERED[name]
    if name.endswith(".sh"):
        inside = text.split("<<'END_OF_SWEEP'\n")[1].split("\nEND_OF_SWEEP\n")[0]
    else:
        inside = next(yaml.safe_load_all(text))["data"]["sweep.yaml"]
    assert load_spec_text(inside, Path("/")) == SPEC


def test_a_rayjob() -> None:
    config, job = yaml.safe_load_all(RENDERED["kuberay.yaml"])
    cluster: dict[str, Any] = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    workers = cluster["workerGroupSpecs"][0]
    assert workers["replicas"] == 4
    pods = [cluster["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]]
    assert pods[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    for pod in pods:
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        assert (
            next(v for v in pod["volumes"] if v["name"] == "sweep")["configMap"]["name"] == config["metadata"]["name"]
        )
    assert job["spec"]["entrypoint"].split()[:3] == ["orchestrate", "sweep", "/etc/prefsweep/sweep.yaml"]


def test_names_for_kubernetes() -> None:
    assert kuberay_job.job_name("Llama3_8B.v2") == "llama3-8b-v2"
    assert len(kuberay_job.job_name("a" * 64)) == 47
    with pytest.raises(SpecError):
        kuberay_job.job_name("7b")


@pytest.mark.parametrize(
    "wrong",
    [{"time": "a day"}, {"partition": "a b"}, {"account": "$(rm)"}, {"more": ("rm -rf",)}, {"more": ("-a\nrm",)}],
)
def test_what_could_be_no_option_is_refused(wrong: dict[str, Any]) -> None:
    given = {"home": Path("/r"), "programs": Path("/p"), "machines": 1, "cpus": 1, "gpus": 0, "time": "1:00:00"}
    with pytest.raises(SpecError):
        slurm_job.render_slurm_job(SPEC, SlurmJob(**(given | wrong)))


def test_a_fence_that_the_sweep_does_not_contain() -> None:
    text = slurm_job.render_slurm_job(load_spec(SHIPPED / "llama3-8b.yaml", ["description=END_OF_SWEEP"]), ONE)
    assert "<<'END_OF_SWEEP_'\n" in text
