"""Runs of several processes, one of which ends as asked in the midst of something; a JSON object per line.

A process that has everything imported forks launchers, which are torchrun's own agent in the way of `fork`, and these
fork the ranks. So a run costs little more than its work.

Asked: `{"folder", "launchers", "where", "how", "rank", "engine", "resume", "options"}`: `launchers` is the number of
ranks of each, `where` and `how` say how the process `rank` ends (empty: it does not), `engine` names an entry of
`ENGINES`, and `options` are more options of the run.
Answered: `{"seconds", "codes", "last", "said", "pids", "weights", "timeouts"}`: how long it took until no rank was
left; by rank its exit code, its last line on stderr, all that it said, its process number, and a digest of its weights;
and the time-outs of their groups.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import holdfast.cli.assembly  # noqa: F401  # everything is imported once, before the forks
import holdfast.trainer as of_training
from families import tiny_model
from holdfast.data.prepare import Preparation
from holdfast.peers.signs import state_of
from holdfast.reference.identity.digests import digest
from holdfast.reference.reference import Reference
from holdfast.reference.sources import filling
from holdfast.training import resumable_trainer
from policies import config, rows, trainer

LIMIT_SECONDS, LAUNCHER_SECONDS = 90.0, 1.0
WRONG = "the disk is on fire"
HEALTHY_SECONDS = 20.0
"""How long a process that is all right keeps the others waiting."""
HOWS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raise": lambda: _raise(),
    "exit": lambda: os._exit(0),
    "sys.exit": lambda: sys.exit(0),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(3600),
    "naps": lambda: [time.sleep(1) for _ in range(3600)],
    "computes": lambda: _compute(HEALTHY_SECONDS),
    "has a child compute": lambda: subprocess.run(
        [
            sys.executable,
            "-c",
            f"import time\nend = time.monotonic() + {HEALTHY_SECONDS}\nwhile time.monotonic() < end: pass",
        ],
        check=True,
    ),
    "waits for the network": lambda: _wait_for_the_network(HEALTHY_SECONDS),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
}
ENGINES: dict[str, dict[str, Any]] = {"ddp": {}}
"""By name: the options of the run that choose it."""


def _raise() -> None:
    raise OSError(WRONG)


def _compute(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def _wait_for_the_network(seconds: float) -> None:
    ours, _theirs = socket.socketpair()
    ours.settimeout(seconds)
    with contextlib.suppress(TimeoutError):
        ours.recv(1)


# --- where it ends ----------------------------------------------------------------------------------------------------


def _before(place: Any, name: str, is_due: Callable[..., bool], strike: Callable[[], object]) -> None:
    """Has `place.name` call `strike` first, where that is due."""
    plain = getattr(place, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        if is_due(*args):
            strike()
        return plain(*args, **kwargs)

    setattr(place, name, struck)


def _is_at(step: int) -> Callable[..., bool]:
    return lambda ours, *_: ours.state.global_step == step


def _always(*_: Any) -> bool:
    return True


def plant(where: str, strike: Callable[[], object]) -> None:
    """Makes this process call `strike` in that place: after the first checkpoint, where there is one by then."""
    import transformers

    {
        "load": lambda: _before(transformers.AutoModelForCausalLM, "from_pretrained", _always, strike),
        "data": lambda: _before(Preparation, "of", _always, strike),
        "fill": lambda: _before(filling, "claimed_blocks", _always, strike),
        "step": lambda: _before(of_training, "score_within_limit", _counted(3), strike),
        "sync": lambda: _before(Reference, "sync", _counted(3), strike),
        "save": lambda: _before(resumable_trainer, "save_complete", _is_at(4), strike),
        "evaluate": lambda: _before(of_training, "score_within_limit", _counted(4), strike),
    }[where]()


def _counted(number: int) -> Callable[..., bool]:
    calls: list[None] = []
    return lambda *_: calls.append(None) or len(calls) == number


def options(where: str, engine: str, more: dict[str, Any]) -> dict[str, Any]:
    """The options of a run that comes to that place."""
    every: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    every |= {"per_device_train_batch_size": 1, "seed": 3, "optim": "adamw_torch", "learning_rate": 0.01}
    if where == "fill":
        every |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 2}
    else:
        every |= {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    if where == "evaluate":
        every |= {"eval_strategy": "steps", "eval_steps": 3}
    return every | ENGINES[engine] | more


def run(asked: dict[str, Any]) -> None:
    """One rank's whole life."""
    folder, rank = Path(asked["folder"]), int(os.environ["RANK"])
    descriptor = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    (folder / f"rank-{rank}.pid").write_text(str(os.getpid()))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    torch.set_num_threads(1)
    where, has_output = asked["where"], rank < asked["launchers"][0] or not asked.get("own_folders")
    if asked["how"] and rank == asked["rank"]:
        plant(where, HOWS[asked["how"]])
    code: Any = 0
    try:
        script(folder / ("out" if has_output else f"out of {rank}"), folder, asked)
    except SystemExit as end:  # multiprocessing, which forked this process, ends it in ways of its own
        code = end.code or 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    import atexit

    atexit._run_exitfuncs()
    sys.stderr.flush()
    if code != 0:
        os._exit(code)


def script(out: Path, folder: Path, asked: dict[str, Any]) -> None:
    """What a user's script does."""
    args = config(out, **options(asked["where"], asked["engine"], asked.get("options", {})))
    group: Any = dist.group.WORLD
    (folder / f"timeout-{os.environ['RANK']}.txt").write_text(
        str(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
    )
    held_out = {"eval_dataset": rows(6, seed=1)} if asked["where"] == "evaluate" else {}
    ours = trainer(str(folder / "model"), args, train_dataset=rows(12), **held_out)
    ours.train(resume_from_checkpoint=asked["resume"])
    (folder / f"weights-{os.environ['RANK']}.txt").write_text(digest(ours.model.named_parameters()))


# --- launchers --------------------------------------------------------------------------------------------------------


def launch(asked: dict[str, Any], number: int, port: int) -> None:
    """One launcher, as `torchrun` makes it. Notes the exit code of each of its ranks."""
    plain = os.waitpid

    def noted(process: int, flags: int) -> tuple[int, int]:
        ended, status = plain(process, flags)
        if ended:
            (Path(asked["folder"]) / f"code-{ended}.txt").write_text(str(os.waitstatus_to_exitcode(status)))
        return ended, status

    os.waitpid = noted
    launchers = asked["launchers"]
    options = LaunchConfig(
        min_nodes=len(launchers), max_nodes=len(launchers), nproc_per_node=launchers[number],
        run_id="endings", rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": number, "timeout": 60}, max_restarts=0, monitor_interval=0.1, start_method="fork",
        local_addr="127.0.0.1",
    )  # fmt: skip
    with contextlib.suppress(Exception):
        elastic_launch(options, run)(asked)


def lived(asked: dict[str, Any]) -> dict[str, Any]:
    """Runs what is asked for, and says how it ended."""
    folder, began = Path(asked["folder"]), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("rank-*"), *folder.glob("code-*"), *folder.glob("weights-*"), *folder.glob("timeout-*")]:
        path.unlink()
    if not (folder / "model").exists():
        tiny_model().save_pretrained(folder / "model")
    os.environ["HOLDFAST_HOME"] = str(folder / "home")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pids: list[int] = []
    for number in range(len(asked["launchers"])):
        if (pid := os.fork()) == 0:
            os.setpgid(0, 0)
            descriptor = os.open(folder / f"launcher-{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            launch(asked, number, port)
            os._exit(0)
        pids.append(pid)
    pid_of = _when_ended(asked, folder, began, pids)
    seconds = time.monotonic() - began
    until = time.monotonic() + LAUNCHER_SECONDS
    while time.monotonic() < until and (pids := _alive(pids)):
        time.sleep(0.02)
    for pid in pids:  # with its ranks, if there are some
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    codes = {rank: _code(folder, pid) for rank, pid in pid_of.items()}
    said = {rank: (folder / f"rank-{rank}.txt").read_text(errors="replace") for rank in pid_of}
    last = {
        rank: next((line for line in reversed(text.splitlines()) if line.strip()), "") for rank, text in said.items()
    }
    weights = {path.stem.partition("-")[2]: path.read_text() for path in folder.glob("weights-*")}
    timeouts = [float(path.read_text()) for path in folder.glob("timeout-*")]
    return {
        "timeouts": timeouts,
        "seconds": seconds,
        "codes": codes,
        "last": last,
        "said": said,
        "pids": pid_of,
        "weights": weights,
    }


def _alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0] == 0]


def _when_ended(asked: dict[str, Any], folder: Path, began: float, launchers: list[int]) -> dict[int, str]:
    """The process numbers of the ranks, once none is left. A launcher is not waited for: a rank that ends with code 0
    leaves one that waits minutes for the other launchers."""
    ranks = range(sum(asked["launchers"]))
    while True:
        pid_of = {rank: path.read_text() for rank in ranks if (path := folder / f"rank-{rank}.pid").exists()}
        is_over = len(pid_of) == len(ranks) and all(state_of(pid) in ("", "Z") for pid in pid_of.values())
        if is_over or time.monotonic() - began > LIMIT_SECONDS or not _waiting(launchers):
            return pid_of
        time.sleep(0.02)


def _waiting(launchers: list[int]) -> list[int]:
    """Those launchers that still run."""
    return [pid for pid in launchers if state_of(pid) not in ("", "Z")]


def _code(folder: Path, pid: str) -> int | None:
    path = folder / f"code-{pid}.txt"
    return int(path.read_text()) if path.exists() else None


def main() -> None:
    """Answers requests until there are no more."""
    gc.freeze()
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0", "OMP_NUM_THREADS": "1"}
    for line in sys.stdin:
        sys.stdout.write(json.dumps(lived(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
