"""GKE: the commands for xpk, docker and kubectl."""

import pathlib

import pytest
from helpers.launching import CONFIG, LAUNCH, dry, launch

GKE = ("create", "--cluster=c", "--zone=z", "--name=hps", "--image=r/i:1", CONFIG, "--workdir=gs://b/a")


def test_gke_create():
    [command] = dry("gke_xpk.sh", *GKE, "--tpu-type=v5p-64", "--slices=2", "--xpk-flags=--spot --priority=high")
    assert command == ["xpk", "workload", "create", "--cluster=c", "--zone=z", "--workload=hps", "--tpu-type=v5p-64",
                       "--num-slices=2", "--docker-image=r/i:1", "--max-restarts=50",
                       "--termination-grace-period-seconds=600", "--spot", "--priority=high",
                       f"--command=exec python -u -m srpo_jax.main {CONFIG} --workdir=gs://b/a"]  # fmt: skip
    [command] = dry("gke_xpk.sh", *GKE, "--device-type=h200-141gb-8", "--nodes=4", "--restarts=0")
    assert {"--device-type=h200-141gb-8", "--num-nodes=4", "--max-restarts=0"} <= set(command)
    assert command[-1].endswith(
        "--workdir=gs://b/a --coordinator=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT"
        " --process-id=$NODE_RANK --process-count=$NNODES"
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "no device; give --tpu-type"),
        (["--tpu-type=v4-8", "--device-type=h100-80gb-8"], "two devices; give one of"),
        (["--tpu-type=v4-8", "--workdir=runs/a"], "is lost with its container"),
        (["--tpu-type=v4-8", "--", '--config.reward.positive=("a",)'], "XPK cannot pass on quotation marks"),
    ],
)
def test_gke_refuses(words, message):
    assert message in launch("gke_xpk.sh", *GKE, "--dry-run", *words, code=1)


def test_gke_other_commands():
    mkdir, tar, build, push = dry("gke_xpk.sh", "image", "--image=r/i:1", "--device=cuda")
    assert build == ["docker", "build", "--file", str(LAUNCH / "Dockerfile"), "--build-arg", "DEVICE=cuda", "--tag",
                     "r/i:1", mkdir[-1]]  # fmt: skip
    # The image is made of the archive alone.
    assert f"ADD {pathlib.Path(tar[2]).relative_to(mkdir[-1])} ." in (LAUNCH / "Dockerfile").read_text()
    assert push == ["docker", "push", "r/i:1"]
    assert dry("gke_xpk.sh", "list", "--cluster=c") == [["xpk", "workload", "list", "--cluster=c"]]
    [command] = dry("gke_xpk.sh", "delete", "--cluster=c", "--name=hps")
    assert command == ["xpk", "workload", "delete", "--cluster=c", "--workload=hps"]
    [command] = dry("gke_xpk.sh", "logs", "--name=hps")
    assert command[:3] == ["kubectl", "logs", "--follow"] and "jobset-name=hps" in command[-1]
