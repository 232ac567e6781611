"""Renders a sweep as a KubeRay RayJob manifest for `kubectl apply`."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from orchestrator.errors import SpecError, SpecProblem
from orchestrator.spec.loading.serialization import dump_spec
from orchestrator.spec.sweep_spec import SweepSpec

RETRIES = 5
"""Times that KubeRay restarts a failed cluster; each restart resumes the sweep."""
_SWEEP = "/etc/prefsweep"
_RUNS = "/runs"
_HEAD = {"cpu": "2", "memory": "8Gi"}
"""Resources of the head pod, which runs the driver and no trial."""
_MAX_NAME_LENGTH = 47
"""KubeRay's limit for the name of a RayJob."""


@dataclass(frozen=True, slots=True)
class KubeJob:
    """Resources of the job. `image`: container image with prefsweep; `claim`: name of a volume claim for all pods."""

    image: str
    claim: str
    """Access mode ReadWriteMany."""
    machines: int
    cpus: int
    """Per machine, like `gpus` and `memory_gb`."""
    gpus: int
    memory_gb: int
    namespace: str = "default"
    secret: str | None = None
    """A Secret whose keys become environment variables: HF_TOKEN, PGPASSWORD and the like."""
    trust_remote_code: bool = False


def render_kuberay_job(spec: SweepSpec, job: KubeJob) -> str:
    """Return a ConfigMap with the resolved sweep file and the RayJob that starts or resumes it.

    Raises:
        SpecError: the sweep's name cannot be turned into a Kubernetes name.
    """
    name = job_name(spec.name)
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": job.namespace},
        "data": {"sweep.yaml": dump_spec(spec)},
    }
    command = ["orchestrate", "sweep", f"{_SWEEP}/sweep.yaml", "--continue", "--address", "auto"]
    command += ["--machines", str(job.machines), *(["--trust-remote-code"] if job.trust_remote_code else [])]
    ray_job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": job.namespace},
        "spec": {
            "entrypoint": shlex.join(command),
            "backoffLimit": RETRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 300,
            "rayClusterSpec": _cluster(name, job),
        },
    }
    return "---\n".join(yaml.dump(part, Dumper=_Dumper, sort_keys=False, width=120) for part in (config, ray_job))


def job_name(sweep: str) -> str:
    """Return the sweep's name in Kubernetes' form: lower case letters, digits and dashes, first a letter.

    Raises:
        SpecError: no such name remains.
    """
    name = re.sub(r"[^a-z0-9-]+", "-", sweep.lower()).strip("-")[:_MAX_NAME_LENGTH].strip("-")
    if not name or not name[0].isalpha():
        problem = f"{sweep!r} is not a valid Kubernetes name, which must start with a letter"
        raise SpecError([SpecProblem("--name", "", problem, "give another --name")])
    return name


def _cluster(name: str, job: KubeJob) -> dict[str, Any]:
    limits = {"cpu": str(job.cpus), "memory": f"{job.memory_gb}Gi"}
    if job.gpus:
        limits["nvidia.com/gpu"] = str(job.gpus)
    return {
        "rayVersion": importlib.metadata.version("ray"),
        "authOptions": {"mode": "token"},  # KubeRay 1.5.1 and later creates the token and mounts it in all pods
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
            "template": {"spec": _pod("ray-head", name, job, _HEAD)},
        },
        "workerGroupSpecs": [
            {
                "groupName": "trials",
                "replicas": job.machines,
                "minReplicas": job.machines,
                "maxReplicas": job.machines,
                "rayStartParams": {},
                "template": {"spec": _pod("ray-worker", name, job, limits)},
            }
        ],
    }


def _pod(container: str, config: str, job: KubeJob, limits: dict[str, str]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": container,
        "image": job.image,
        "env": [{"name": "ORCHESTRATE_HOME", "value": _RUNS}, {"name": "HF_HOME", "value": f"{_RUNS}/hf"}],
        "resources": {"limits": dict(limits), "requests": dict(limits)},
        "volumeMounts": [
            {"name": "runs", "mountPath": _RUNS},
            {"name": "sweep", "mountPath": _SWEEP, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if job.secret is not None:
        made["envFrom"] = [{"secretRef": {"name": job.secret}}]
    return {
        "containers": [made],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": job.claim}},
            {"name": "sweep", "configMap": {"name": config}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }


class _Dumper(yaml.SafeDumper):
    """Dumper that writes multi-line strings, such as the sweep file, as literal blocks."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """Write repeated values out instead of using YAML aliases."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
