"""TPU slices: the commands, and a run's life with a stand-in for gcloud."""

import pathlib
import shutil

import pytest
from helpers.launching import CONFIG, LAUNCH, TPU, dry, launch, write_program

QR = ["gcloud", "compute", "tpus", "queued-resources"]


def test_tpu_create():
    [command] = dry("tpu_pod.sh", "create", *TPU, "--type=v5p-64")
    assert command == [*QR, "create", "pod", "--zone=us-east5-a", "--accelerator-type=v5p-64",
                       "--runtime-version=v2-alpha-tpuv5", "--node-id=pod"]  # fmt: skip
    more = ("--type=v6e-256", "--slices=2", "--spot", "--create-flags=--internal-ips --network=n", "--project=p")
    [command] = dry("tpu_pod.sh", "create", *TPU, *more)
    assert command == [*QR, "create", "pod", "--zone=us-east5-a", "--project=p", "--accelerator-type=v6e-256",
                       "--runtime-version=v2-alpha-tpuv6e", "--node-count=2", "--node-prefix=pod", "--spot",
                       "--internal-ips", "--network=n"]  # fmt: skip


@pytest.mark.parametrize(
    "kind, runtime",
    [("v4-8", "tpu-ubuntu2204-base"), ("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v3-8", "other")],
)
def test_tpu_runtimes(kind, runtime):
    flags = ["--runtime=other"] if runtime == "other" else []
    [command] = dry("tpu_pod.sh", "create", *TPU, f"--type={kind}", *flags)
    assert f"--runtime-version={runtime}" in command


def test_tpu_commands_reach_the_workers():
    run = ["run", CONFIG, "--workdir=gs://b/runs/a", "--ssh-flags=--tunnel-through-iap", "--", "--config.steps=3"]
    [command] = dry("tpu_pod.sh", *run[:1], *TPU, "--dry-run", *run[1:-2])
    everywhere = ["--zone=us-east5-a", "--quiet", "--node=all", "--worker=all"]
    assert command[:-1] == [*QR, "ssh", "pod", *everywhere, "--tunnel-through-iap"]
    assert command[-1].endswith(f"launch/worker.sh start -u -m srpo_jax.main {CONFIG} --workdir=gs://b/runs/a")

    _, tar, scp, unpack, install = dry("tpu_pod.sh", "install", *TPU, "--data=gs://b/srpo")
    assert tar[:2] == ["tar", "-czf"] and {"setup.py", "configs", "launch", "srpo_jax"} <= set(tar)
    assert scp == [*QR, "scp", tar[2], "pod:srpo_jax.tar.gz", *everywhere]
    assert "tar -xzf ~/srpo_jax.tar.gz" in unpack[-1] and install[-1].endswith("launch/worker.sh install gs://b/srpo")

    [logs] = dry("tpu_pod.sh", "logs", *TPU)
    assert logs[5:] == ["pod", "--zone=us-east5-a", "--quiet", "--node=0", "--worker=0",
                        "--command=tail -n 100 -F ~/srpo_jax/run.log"]  # fmt: skip
    [wait] = dry("tpu_pod.sh", "wait", *TPU)
    assert wait == [*QR, "describe", "pod", "--zone=us-east5-a", "--format=value(state.state)"]
    [words] = dry("tpu_pod.sh", "python", *TPU, "--dry-run", "--", "-m", "srpo_jax.generate", "--prompt=a fox")
    assert words[:-1] == [*QR, "ssh", "pod", *everywhere]
    assert words[-1].endswith("launch/worker.sh python -m srpo_jax.generate --prompt='a fox' --dry-run")
    [stop] = dry("tpu_pod.sh", "stop", *TPU, "--grace=60")
    assert stop[-1].endswith("launch/worker.sh stop 60")
    described, progress = dry("tpu_pod.sh", "status", *TPU)
    assert described == wait and "launch/worker.sh status" in progress[-1]

    resumed = dry("tpu_pod.sh", "resume", *TPU, "--type=v5p-64", CONFIG, "--workdir=gs://b/a")
    verbs = [command[4] for command in resumed if command[0] == "gcloud"]
    assert verbs == ["describe", "delete", "create", "describe", "ssh", "scp", "ssh", "ssh", "ssh", "ssh"]
    assert resumed[-1][-1].endswith("--workdir=gs://b/a")


# Stands for gcloud: a slice is a file with its state and a home folder for each of its two workers.
GCLOUD = r"""#!/usr/bin/env bash
set -u
cloud=$(dirname "$0")/../cloud
echo "$4" "${5:-}" >>"$cloud/calls"
for word; do
  case $word in
    --command=*) line=${word#*=} ;;
    --worker=*) worker=${word#*=} ;;
  esac
done
case $4 in
  describe)
    if [[ ! -e $cloud/state ]]; then
      echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2
      exit 1
    fi
    cat "$cloud/state"
    # What waits is there the next time.
    if grep -q WAITING "$cloud/state"; then echo ACTIVE >"$cloud/state"; fi
    ;;
  create)
    mkdir -p "$cloud"/host{0,1}/.local/bin
    cp "$cloud/uv" "$cloud/host0/.local/bin" && cp "$cloud/uv" "$cloud/host1/.local/bin"
    echo WAITING_FOR_RESOURCES >"$cloud/state" ;;
  delete) rm -rf "$cloud/state" "$cloud"/host? ;;
  scp) for home in "$cloud"/host?; do cp "$5" "$home/srpo_jax.tar.gz"; done ;;
  ssh)
    status=0
    for home in "$cloud"/host${worker/all/?}; do
      (cd "$home" && HOME=$home bash -c "$line") || status=$?
    done
    exit $status
    ;;
esac
"""
# Stands for uv: its virtual environment holds a Python that does what the file "play" of the cloud says.
UV = r"""#!/usr/bin/env bash
if [[ $1 == venv ]]; then
  mkdir -p .venv/bin
  cat >.venv/bin/python <<'PYTHON'
#!/usr/bin/env bash
echo "trains with $*"
[[ $(<../../play) == wait ]] || exit "$(<../../play)"
trap 'exit 143' TERM
for ((i = 0; i < 600; i++)); do sleep 0.05; done
PYTHON
  chmod +x .venv/bin/python
fi
"""


@pytest.fixture
def cloud(tmp_path):
    """A checkout of the launch scripts with stand-ins on its PATH; returns (folder of the cloud, runner)."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        (tmp_path / name).touch()
    for name in ("configs", "srpo_jax", "cloud"):
        (tmp_path / name).mkdir()
    (tmp_path / "configs/emoji.py").touch()
    write_program(tmp_path / "bin/gcloud", GCLOUD)
    write_program(tmp_path / "cloud/uv", UV)
    # The seconds between two looks pass faster here.
    write_program(tmp_path / "bin/sleep", "#!/bin/sh\nexec /bin/sleep 0.05\n")
    folder = tmp_path / "cloud"
    (folder / "play").write_text("wait")

    def pod(*words: str, code: int = 0) -> str:
        flags = (*TPU, "--type=v5p-16", CONFIG, "--workdir=gs://b/a", "--grace=200")
        return launch("tpu_pod.sh", *flags, *words, cwd=tmp_path, code=code, PATH=f"{tmp_path}/bin:/usr/bin:/bin")

    yield folder, pod
    if (folder / "state").exists():
        pod("stop")


def calls(folder: pathlib.Path) -> list[str]:
    text = (folder / "calls").read_text()
    (folder / "calls").write_text("")
    return [line.split()[0] for line in text.splitlines() if not line.startswith(("describe", "ssh"))]


def test_tpu_life_of_a_run(cloud):
    folder, pod = cloud
    assert "there is no queued resource pod in us-east5-a; use create" in pod("wait", code=1)
    pod("create")
    pod("wait")
    assert pod("status").count("not installed") == 2
    assert "nothing is installed here" in pod("run", code=1)
    pod("install")
    assert pod("status").count("not started") == 2
    pod("run")
    assert pod("status").count("running") == 2
    assert "training runs here already" in pod("run", code=1)
    assert "training runs here already" in pod("python", "--", "-c", "1", code=1)
    pod("stop")
    (folder / "play").write_text("0")
    assert pod("python", "--", "-m", "srpo_jax.encode").count("trains with -m srpo_jax.encode\n") == 2
    assert pod("status").count("ended with exit code 143") == 2
    log = (folder / "host1/srpo_jax/run.log").read_text()
    assert log.startswith(f"trains with -u -m srpo_jax.main {CONFIG} --workdir=gs://b/a\n")
    pod("delete")
    assert calls(folder) == ["create", "scp", "delete"]


def test_tpu_resume_does_what_is_missing(cloud):
    folder, pod = cloud
    pod("resume")
    assert calls(folder) == ["create", "scp"]
    pod("resume")
    assert calls(folder) == []
    # Preempted: the machines are gone, the queued resource has to be deleted before it can be asked for again.
    pod("stop")
    shutil.rmtree(folder / "host0")
    shutil.rmtree(folder / "host1")
    (folder / "state").write_text("SUSPENDED\n")
    assert "pod is SUSPENDED; use resume, or delete" in pod("wait", code=1)
    pod("resume")
    assert calls(folder) == ["delete", "create", "scp"]
    # Stopped by a signal, the slice still there.
    pod("stop")
    pod("resume")
    assert calls(folder) == []
    assert pod("status").count("running") == 2


def test_tpu_watch_ends_with_the_run(cloud):
    folder, pod = cloud
    (folder / "play").write_text("0")
    pod("resume", "--watch")
    assert calls(folder) == ["create", "scp"]
    assert pod("status").count("ended with exit code 0") == 2


def test_tpu_resume_does_not_repeat_a_mistake(cloud):
    folder, pod = cloud
    (folder / "play").write_text("1")
    assert "error: training failed; see logs" in pod("resume", "--watch", code=1)
    assert (folder / "host0/srpo_jax/run.log").read_text().count("trains with") == 1


def test_tpu_stop_kills_what_does_not_listen(cloud):
    folder, pod = cloud
    pod("create")
    pod("wait")
    pod("install")
    for home in folder.glob("host?"):
        deaf = "#!/bin/sh\ntrap '' TERM\nwhile :; do /bin/sleep 0.05; done\n"
        write_program(home / "srpo_jax/.venv/bin/python", deaf)
    pod("run")
    pids = [int((home / "srpo_jax/run.pid").read_text()) for home in folder.glob("host?")]
    pod("stop", "--grace=1")
    for pid in pids:
        # Gone, or dead and not yet collected by this machine's first process.
        stat = pathlib.Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"
