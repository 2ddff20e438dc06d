"""The pages are true: their code and their commands run, and print what they show."""

import contextlib
import dataclasses
import inspect
import io
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from conftest import environment, launch

from nanodpo import errors
from nanodpo.core.losses import LOSSES, inputs_of
from nanodpo.flags import arguments
from nanodpo.flags.loss import read_loss
from nanodpo.run.metrics import pair_metrics
from nanodpo.scoring.verdict import RULES

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
# Commands that other tests run as they stand: the default run, the page on one step, the experiment.
ELSEWHERE = {"deepspeed train.py": "tests/test_examples.py", "python -m pytest": "all of them",
             "python examples/forward_reverse.py --output_dir out --seeds 3": "tests/test_forward_reverse.py",
             "python examples/forward_reverse.py --output_dir out --ranks 4 M1 M2 experiment.parquet":
                 "tests/test_forward_reverse.py",
             "python examples/arena.py --output_dir out": "tests/test_arena.py",
             "python examples/leave_out.py --output_dir out": "tests/test_leave_out.py",
             "ruff check .": "the linter itself"}
REAL = "SmolLM2"  # commands with this pretrained model, which no test has
SHORT = {"train.py": ["--max_steps", "1", "--draw", "false", "--cache_dir", "cache"],
         "score.py": ["--max_new_tokens", "3"]}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return BLOCK.findall((ROOT / page).read_text())


def commands(page: str) -> list[str]:
    """The command lines of a page, without comments, environment and what is chained before them."""
    lines = [line for kind, text in blocks(page) if kind == "bash" for line in text.replace("\\\n", " ").splitlines()]
    plain = [shlex.join(shlex.split(line.rpartition(" && ")[2], comments=True)) for line in lines if line.strip()]
    return [line.removeprefix(".venv/bin/") for line in plain]


def same_but_for_rounding(printed: str, shown: str) -> bool:
    """The same text, whose numbers may differ as much as another processor's rounding makes them."""
    number = r"-?\d+\.\d+"
    values = [[float(value) for value in re.findall(number, text)] for text in (printed, shown)]
    return (re.sub(number, "#", printed) == re.sub(number, "#", shown)
            and values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-3))


def test_one_step_prints_what_it_shows_and_is_what_training_does(tmp_path, monkeypatch):
    """The page's own update of one pair, and train.py's, give the same numbers."""
    monkeypatch.chdir(ROOT)
    names, page = {}, blocks("docs/one_step.md")
    for (kind, code), (below, shown) in zip(page, page[1:]):
        if kind == "python":
            assert not below, "a block of Python without what it prints"
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "one_step.md", "exec"), names)
            assert same_but_for_rounding(out.getvalue(), shown), out.getvalue()
    ((_, command),) = [block for block in page if block[0] == "bash"]
    row = {"prompt": names["prompt"]} | names["texts"]
    (tmp_path / "pair.jsonl").write_text(json.dumps(row) + "\n")
    flags = command.replace("\\\n", " ").split()[2:]
    flags = [str(tmp_path / flag) if flag in ("pair.jsonl", "run") else flag for flag in flags]
    launch(ROOT / "train.py", *flags, "--cache_dir", tmp_path / "cache", "--draw", "false", launcher="fork")
    first, second = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] == pytest.approx(names["losses"].item(), abs=1e-6)
    assert first["grad_norm"] == pytest.approx(names["norm"], rel=1e-4)
    expected = pair_metrics(names["loss"], names["after"], names["ref"], names["lengths"], names["beta"])
    for name in expected:
        assert second[name] == pytest.approx(expected[name].item(), rel=1e-3, abs=1e-4), name


@pytest.mark.slow
def test_every_command_runs_as_it_stands(tiny, tmp_path):
    """In one folder, one after the other, on one rank: M is a model there, pairs.parquet and traces.parquet its data.
    A run is cut to one step, so its last checkpoint is the first."""
    shutil.copytree(tiny / "model", tmp_path / "M")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("pairs", "traces"):
        pandas.read_json(tiny / "train.jsonl", lines=True).to_parquet(tmp_path / f"{name}.parquet")
    pandas.read_parquet(ROOT / "examples" / "piles" / "test.parquet")[:20].to_parquet(tmp_path / "few.parquet")
    launch(ROOT / "train.py", "--model_name", "M", "--train_file_path", "pairs.parquet", "--eval_size", "4",
           *SHORT["train.py"], launcher="fork", cwd=tmp_path)
    found = dict.fromkeys(command for page in PAGES for command in commands(page) if page != "docs/one_step.md")
    assert len(found) > 12
    for program, *words in (shlex.split(command) for command in found
                            if command not in ELSEWHERE and REAL not in command):
        if words[:2] == ["-m", "pytest"]:
            collected = launch(Path(pytest.__file__).with_name("__main__.py"), "--collect-only", *words[2:],
                               "tests/core/test_packing.py", launcher="fork").stdout
            assert "tests/core/test_packing.py::test_" in collected
            continue
        assert program in ("python", "deepspeed", "torchrun", "sbatch"), program
        if program == "sbatch":
            continue  # test_a_job_of_slurm_goes_on_until_it_is_finished
        words = words[2:] if program != "python" and words[0] in ("--num_gpus", "--nproc_per_node") else words
        script, *flags = (re.sub(r"checkpoint-\d+", "checkpoint-1", word) for word in words)
        if script == "train.py" and not {"--train_file_path", "--fork"} & {*flags}:
            flags += ["--eval_file_path", "few.parquet"]  # of the example run: not its 400 rows
        short = SHORT.get(script, ()) if script == "train.py" or "--answers" in flags else ()
        launch(ROOT / script, *flags, *short, launcher="fork", cwd=tmp_path)


@pytest.mark.slow
def test_a_job_of_slurm_goes_on_until_it_is_finished(tiny, tmp_path, stand_in):
    """examples/launch/slurm.sh with stand-ins for Slurm's commands: srun starts two ranks with Slurm's variables and
    ends with the largest exit code; without --cpus-per-task, which it does not take from the job's from Slurm 22.05
    on, it refuses. The first time the ranks are told to stop, and the job goes back into the queue; the second time it
    is finished."""
    stand_in("scontrol", '[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> scontrol.log')
    stand_in("srun", """[ "$1" = --cpus-per-task=8 ] || exit 99; shift 2; worst=0
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_ID=0 "$@" &
    pids[$rank]=$!
done
if [ ! -e out ]; then
    until [ -s out/metrics.jsonl ]; do sleep 0.05; done
    kill -TERM "${pids[@]}"
fi
for pid in "${pids[@]}"; do wait "$pid"; code=$?; [ "$code" -gt "$worst" ] && worst=$code; done
exit "$worst\"""")
    for name in ("train.py", "nanodpo", "examples", "ds_config.json"):
        (tmp_path / name).symlink_to(ROOT / name)
    flags = ["--model_name", tiny / "model", "--train_file_path", tiny / "train.jsonl", "--output_dir", "out",
             "--cache_dir", "cache", "--max_steps", "16", "--per_device_train_batch_size", "1", "--draw", "false",
             "--deepspeed", "examples/launch/zero3.json"]
    told = environment() | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_CPUS_PER_TASK": "8",
                            "PYTHON": sys.executable, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = ["bash", "examples/launch/slurm.sh", *flags]
    codes = [subprocess.run(job, cwd=tmp_path, env=told, capture_output=True, timeout=300).returncode for _ in range(2)]
    assert codes == [75, 0] and (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 16


@pytest.mark.parametrize("code, hangs", [(0, False), (1, False), (2, False), (75, False), (75, True)])
def test_torchrun_keeps_the_exit_code_and_ends(code, hangs, tmp_path, stand_in):
    """examples/launch/torchrun.sh with a stand-in for torchrun, which starts two processes, says 1 whatever they say,
    and where the network is cut does not end. The code is that of the first process to fail."""
    stand_in("torchrun", f"""until [ "$1" = --no_python ]; do echo "$1" >> {tmp_path}/flags; shift; done; shift
LOCAL_RANK=0 "$@" && LOCAL_RANK=1 "$@" || {{ LOCAL_RANK=1 "$@"; {"exec sleep 60;" * hangs} exit 1; }}""")
    stand_in("python", f'echo "$@" >> {tmp_path}/given; [ $LOCAL_RANK = 1 ] && exit {code and 143}; exit {code}')
    told = os.environ | {"TORCHRUN": str(tmp_path / "torchrun"), "PYTHON": str(tmp_path / "python"), "NODES": "3",
                         "NODE": "1", "HEAD": "first", "PATIENCE": "1"}
    began = time.monotonic()
    command = ["bash", ROOT / "examples" / "launch" / "torchrun.sh", "--beta", "0.2", "a b"]
    assert subprocess.run(command, env=told, timeout=30).returncode == code
    assert time.monotonic() - began < 20
    assert (tmp_path / "given").read_text() == "train.py --beta 0.2 a b\n" * 2
    given = (tmp_path / "flags").read_text().split()
    assert dict(zip(given[::2], given[1::2])) == {
        "--nnodes": "3", "--nproc_per_node": "gpu", "--rdzv_backend": "c10d", "--rdzv_id": "nanodpo",
        "--rdzv_endpoint": "first:29400", "--rdzv_conf": "is_host=0"}


def test_launch_scripts_score_as_well(tmp_path, stand_in):
    """With SCRIPT=score.py that script is started, with the flags as they are."""
    stand_in("torchrun", 'until [ "$1" = --no_python ]; do shift; done; shift; exec "$@"')
    stand_in("scontrol", "echo 127.0.0.1")
    stand_in("srun", 'until [ "$1" = "$PYTHON" ]; do shift; done; exec "$@"')
    stand_in("python", f'echo "$@" >> {tmp_path}/given')
    told = os.environ | {"TORCHRUN": str(tmp_path / "torchrun"), "PYTHON": str(tmp_path / "python"), "NODES": "1",
                         "NODE": "0", "HEAD": "first", "SCRIPT": "score.py", "SLURM_JOB_ID": "7",
                         "SLURM_JOB_NODELIST": "here", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for script in ("torchrun.sh", "slurm.sh"):
        subprocess.run(["bash", ROOT / "examples" / "launch" / script, "out", "--answers", "5"], env=told, timeout=30,
                       check=True)
    assert (tmp_path / "given").read_text() == "score.py out --answers 5\n" * 2


def test_torchrun_passes_a_signal_on(tmp_path, stand_in):
    """It goes to torchrun, as Kubernetes sends it to the first process of a pod alone. What the process then says
    counts: bash, above it, gets the signal as well, and waits."""
    stand_in("torchrun", """until [ "$1" = --no_python ]; do shift; done; shift
setsid "$@" & pid=$!; trap 'kill -TERM -- -$pid' TERM; wait $pid; wait $pid; exit 1""")
    stand_in("python", f"""trap 'sleep 0.5; exit 75' TERM; touch {tmp_path}/ready
for i in {{1..300}}; do sleep 0.1; done""")
    told = os.environ | {"TORCHRUN": str(tmp_path / "torchrun"), "PYTHON": str(tmp_path / "python"), "NODES": "2",
                         "NODE": "0", "HEAD": "first"}
    process = subprocess.Popen(["bash", ROOT / "examples" / "launch" / "torchrun.sh"], env=told)
    end = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.terminate()
    assert process.wait(20) == 75


@pytest.mark.parametrize("set_by, seconds", [({}, 100), ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}, 3)])
def test_torchrun_leaves_its_processes_time_to_save(set_by, seconds, tmp_path, stand_in):
    """torchrun.sh tells torchrun how many seconds a process has to save after SIGTERM, unless the user has. Kubernetes
    gives the pod more than that, so that torchrun can end after its processes."""
    stand_in("torchrun", f"echo $TORCH_ELASTIC_SHUTDOWN_TIMEOUT > {tmp_path}/seconds")
    clean = {name: value for name, value in os.environ.items() if name != "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
    told = clean | {"TORCHRUN": str(tmp_path / "torchrun"), "NODES": "1", "NODE": "0", "HEAD": "here"}
    subprocess.run(["bash", ROOT / "examples" / "launch" / "torchrun.sh"], env=told | set_by, timeout=30, check=True)
    assert (tmp_path / "seconds").read_text() == f"{seconds}\n"
    _, job = yaml.safe_load_all((ROOT / "examples" / "launch" / "kubernetes.yaml").read_text())
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 100 + 15


@pytest.mark.slow
@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12), reason="torch 2.11 waits 30 s always")
@pytest.mark.parametrize("seconds, code", [(1, 1), (20, 75)])
def test_torchrun_kills_what_saves_longer_than_it_was_told(seconds, code, tmp_path, stand_in):
    """The real torchrun reads what torchrun.sh tells it: a process that saves for 4 seconds is killed after 1, and ends
    by itself, with its own exit code, within 20."""
    stand_in("python", f"""trap told=1 TERM; touch {tmp_path}/ready
until [ "$told" ]; do sleep 0.05; done
for i in {{1..80}}; do sleep 0.05; done; touch {tmp_path}/saved; exit 75""")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    told = environment() | {"TORCHRUN": str(Path(sys.executable).with_name("torchrun")), "NODES": "1", "NODE": "0",
                            "PYTHON": str(tmp_path / "python"), "HEAD": "localhost", "PORT": port, "PROCESSES": "1",
                            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(seconds)}
    process = subprocess.Popen(["bash", ROOT / "examples" / "launch" / "torchrun.sh"], env=told)
    end = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) == code and (tmp_path / "saved").exists() == (code == 75)


def test_the_job_of_kubernetes_fits_together(monkeypatch):
    """Its names, numbers of machines and exit codes agree with each other, and its command line is one that a run
    takes."""
    monkeypatch.chdir(ROOT)
    service, job = yaml.safe_load_all(Path("examples/launch/kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    name, env = job["metadata"]["name"], {entry["name"]: entry.get("value") for entry in container["env"]}
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"] and env["HEAD"] == f"{name}-0.{pod['subdomain']}"
    assert spec["completionMode"] == "Indexed" and env["NODES"] == str(spec["completions"]) == str(spec["parallelism"])
    codes = {code: rule["action"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
             for code in rule["onExitCodes"]["values"]}
    assert codes == {errors.TEMPFAIL: "Ignore", 2: "FailJob"} and pod["restartPolicy"] == "Never"
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert volumes == mounts.keys()
    shell, script, *flags = container["command"]
    assert shell == "bash" and Path(script).name == "torchrun.sh"
    assert set(re.findall(r"\$\{?([A-Z_]+)", Path(script).read_text())) - env.keys() == {
        "TORCHRUN", "PYTHON", "SCRIPT", "PROCESSES", "RUN", "PORT", "PATIENCE",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}, "those have defaults"
    args = arguments.parse(flags, ROOT / "examples" / "dpo.yaml")
    for path in (args.output_dir, args.cache_dir, args.model_name, args.train_file_path):
        assert str(path).startswith(mounts["shared"])
    assert Path(args.deepspeed).is_file()


def test_the_rules_of_the_verdict_stand_in_the_page_on_scoring():
    """Each with its words, in the order in which they are asked."""
    lines = (ROOT / "docs" / "scoring.md").read_text().split("| verdict | its rule |\n|---|---|\n")[1].splitlines()
    assert lines[: len(RULES) + 1] == [f"| {rule.name} | {rule.words} |" for rule in RULES] + [""]


def test_the_defaults_in_the_page_on_trl_are_those_of_the_flags():
    """Each number, truth and shape in the column of this program; a cell of words stands for no default, or all-linear,
    but for warmup_steps, whose cell is not about its default."""
    page = (ROOT / "docs" / "trl.md").read_text()
    flags = {field.name: field.default for field in dataclasses.fields(arguments.TrainArguments)}
    rows = re.findall(r"^\| (?:`\w+`, here )?`(\w+)` \| .* \| ([^|]+) \|$", page, re.MULTILINE)
    assert len(rows) == 15
    for name, cell in rows:
        words = re.split("[:;,] ", cell)[0]
        shown = {"true": True, "false": False, "cosine": "cosine", "all linear layers": "all-linear"}.get(words)
        if re.fullmatch(r"[\de.-]+", words):
            shown = float(words)
        assert flags[name] == shown or name == "warmup_steps", name


def test_the_table_of_losses_has_each_with_its_paper_and_settings():
    """The paper is the first that the docstring of the loss names; the settings are its parameters, with their
    defaults; label_smoothing is a flag."""
    page = (ROOT / "docs" / "losses.md").read_text().replace(r"\|", "")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:3] == "| `"]
    for name, loss in LOSSES.items():
        (_, _, source, settings), = [line for line in lines if line[0] == f"`{name}`" and len(line) == 4]
        assert re.findall(r"arXiv\s+([\d.]+\d)", loss.__doc__)[:1] == source.removeprefix("arXiv ").split(), name
        own = {k: p.default for k, p in inspect.signature(loss).parameters.items() if k not in inputs_of(loss)}
        shown = re.findall(r"`(\w+)` ([\d.]+)", settings)
        assert {k: float(v) for k, v in shown} == {k: v for k, v in own.items() if "_" in k and k != "label_smoothing"}
        assert ("--label_smoothing" in settings) == ("label_smoothing" in own), name


def test_functions_in_the_page_on_losses_are_losses(tmp_path):
    """As they stand there: --loss takes each. NPO's value where the policy is its reference is 2 ln 2 / beta."""
    code = [text for kind, text in blocks("docs/losses.md") if kind == "python"]
    (tmp_path / "own.py").write_text("\n".join(code))
    names = re.findall(r"^def (\w+)", "\n".join(code), re.MULTILINE)
    assert names == ["mine", "npo"]
    for name in names:
        flags = ["--model_name", "M", "--train_file_path", "D", "--loss", f"{tmp_path / 'own.py'}:{name}"]
        loss, _ = read_loss(arguments.parse(flags, None))
    zero = torch.zeros(1)
    assert loss(chosen=zero, rejected=zero, ref_rejected=zero).item() == pytest.approx(2 * math.log(2) / 0.1)
