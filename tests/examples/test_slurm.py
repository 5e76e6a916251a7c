"""The batch scripts for Slurm: their syntax, and their command lines with the scheduler's variables set by hand."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import write_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))

# srun drops its own flags and runs the command once for each machine that it is asked for, or of the job.
STUBS = {
    "scontrol": 'test "$1 $2 $3" = "show hostnames $SLURM_JOB_NODELIST" && printf "%s\\n" $NODES',
    "srun": """
        count=$SLURM_NNODES
        while [[ $1 == --* ]]; do
            case $1 in --nodes=*) count=${1#*=} ;; esac
            shift
        done
        trap 'kill $(jobs -p) 2>/dev/null' TERM
        for ((id = 0; id < count; id++)); do SLURM_NODEID=$id "$@" & done
        code=0
        for job in $(jobs -p); do wait "$job" || code=$?; done
        exit $code
    """,
}
RECORDED = {
    "torchrun": 'printf "%s\\n" "torchrun $* threads=$OMP_NUM_THREADS" >> "$RECORD"',
    "undo": """
        until [[ $(grep -c "ray start" "$RECORD") == 3 ]]; do sleep 0.05; done
        printf "%s\\n" "undo $*" >> "$RECORD"
        exit 3
    """,
    "ray": """
        printf "%s\\n" "ray $* token=${#RAY_AUTH_TOKEN}" >> "$RECORD"
        if [[ $1 == start ]]; then exec sleep 60; fi
    """,
}


def submit(tmp_path: Path, script: str, arguments: list[str], stubs: dict[str, str], nodes: str, gpus: str | None, cpus: int):
    """Starts a script as the scheduler would on the first machine; its commands come from ``stubs`` where they are named there."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"activate": "", **stubs}.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    described = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": str(len(nodes.split()))}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RAY_", "OMP_"))}
    environment |= {**described, "SLURM_CPUS_PER_TASK": str(cpus), "NODES": nodes, "RECORD": str(tmp_path / "record")}
    environment |= {"UNDO_VENV": str(tmp_path), "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {} if gpus is None else {"SLURM_GPUS_ON_NODE": gpus}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = ["bash", str(ROOT / "examples" / "slurm" / script), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True, **pipes)


def end(process: subprocess.Popen, seconds: float = 600) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.read_text().startswith("#!/bin/bash\n#") and "#SBATCH --nodes=" in script.read_text()


def test_a_run_has_a_launcher_on_each_machine(tmp_path):
    job = submit(tmp_path, "run.sbatch", ["run", "my config.yaml", "--seed=1"], {**STUBS, **RECORDED}, "node1 node2", "4", 8)
    code, said = end(job, 60)
    assert (code, said) == (0, "")
    line = (
        "torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-id=12345 --rdzv-endpoint=node1:32345 "
        "-m undo_core run my config.yaml --seed=1 threads=2"
    )
    assert (tmp_path / "record").read_text().splitlines() == [line] * 2


def test_a_sweep_has_a_cluster_that_ends_with_it(tmp_path):
    job = submit(tmp_path, "sweep.sbatch", ["sweep.yaml", "--ranks=2"], {**STUBS, **RECORDED}, "node1 node2 node3", "8", 64)
    code, said = end(job, 60)
    assert code == 3, said  # that of the sweep
    amounts = "--num-cpus=64 --num-gpus=8 --disable-usage-stats --block token=64"
    assert sorted((tmp_path / "record").read_text().splitlines()) == [
        *[f"ray start --address=node1:32345 {amounts}"] * 2,
        f"ray start --head --port=32345 --include-dashboard=false {amounts}",
        "ray status --address=node1:32345 token=64",
        "undo sweep sweep.yaml --ranks=2 --engine=ray --address=node1:32345",
    ]


@pytest.mark.distributed_long
def test_a_run_on_two_machines(tmp_path):
    """Both are this one: two launchers with a process each."""
    write_run(tmp_path)
    stubs = {**STUBS, "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"'}
    host = socket.gethostname()
    code, said = end(submit(tmp_path, "run.sbatch", ["run", "base.yaml"], stubs, f"{host} {host}", None, 1))
    assert code == 0, said
    assert (tmp_path / "out" / "report" / "report.html").exists()
    manifest = yaml.safe_load(next(tmp_path.glob("out/stages/distill-*/manifest.json")).read_text())
    assert manifest["ranks"] == 2


@pytest.mark.distributed_long
def test_a_sweep_on_two_machines(tmp_path):
    """Both are this one: two Ray nodes with a place each."""
    write_run(tmp_path, grid={"seed": [0, 1]})
    stubs = {
        **STUBS,
        "undo": f'exec {sys.executable} -m undo_core "$@"',
        "ray": f'exec {sys.executable} -m ray.scripts.scripts "$@"',
    }
    host = socket.gethostname()
    code, said = end(submit(tmp_path, "sweep.sbatch", ["sweep.yaml"], stubs, f"{host} {host}", None, 1))
    assert code == 0, said
    assert len(list(tmp_path.glob("swept/runs/small/results-seed*.json"))) == 2
