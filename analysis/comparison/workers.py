"""Run each of several models: one after the other, or in worker processes on this machine.

Every model has a process of its own, so that a killed one takes no other with it and its memory is free
again when it ends. A scheduler of another kind, over several machines for example, would take the place of
`iterate_outcomes`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from rich.console import Console
from rich.progress import TaskID

from analysis.attacks import choose_attacks
from analysis.models.loading import limit_threads
from analysis.progress import RelayConsole, make_progress_bar, print_line
from analysis.report.results import Run
from analysis.studies.analyze import analyze_defenses
from analysis.studies.run_spec import RunSpec
from analysis.studies.sweep import ConditionKey
from analysis.studies.train import TrainingInterrupted
from defenses.contract import Defense
from defenses.errors import UserError, describe_error

_START_METHOD = "spawn"  # a copy of this process would share its GPU and its threads
_MAX_ATTEMPTS = 2  # starts of a model whose worker is killed
_STOP_SECONDS = 5.0  # that a worker has to end before it is killed
_GUARD_HINT = (
    "in a script, analyze(…, workers=…) has to be called below `if __name__ == '__main__':`, and objects "
    "that other processes cannot import have to be written into a file"
)


@dataclass(frozen=True)
class ModelJob:
    """What is to be done with one model.

    Attributes:
        label: name of the model in tables and messages.
        spec: options of its run.
        defenses: names of defenses, or defenses.
        settings: settings of the named defenses, `key=value`.
        with_cost: as for `analyze_defenses`, and so the others.
        n_control_draws: draws of each matched control.
        with_training: whether to train missing weights first.
        with_side_effects: whether to measure side effects.
    """

    label: str
    spec: RunSpec
    defenses: tuple[str | Defense, ...]
    settings: tuple[str, ...] = ()
    with_cost: bool = False
    n_control_draws: int = 0
    with_training: bool = False
    with_side_effects: bool = False


@dataclass(frozen=True)
class ModelOutcome:
    """What became of one model.

    Attributes:
        label: name of the model in tables and messages.
        run: its run; None if the model failed.
        failures: conditions of the run that failed, and why.
        problem: why the model failed; empty if it has a run.
    """

    label: str
    run: Run | None
    failures: Mapping[ConditionKey, str]
    problem: str = ""


def iterate_outcomes(jobs: Sequence[ModelJob], n_workers: int, console: Console) -> Iterator[ModelOutcome]:
    """Yield the outcome of each model when it is known, so that an interruption loses none.

    Args:
        jobs: one per model.
        n_workers: models at a time; with 1, all run in this process.
        console: shows progress.

    Raises:
        KeyboardInterrupt: if the user interrupts; all workers are stopped.
    """
    if n_workers == 1 or len(jobs) == 1:
        yield from _iterate_serially(jobs, console)
    else:
        yield from _iterate_in_workers(jobs, min(n_workers, len(jobs)), console)


def run_job(job: ModelJob, console: Console) -> ModelOutcome:
    """Run one model in this process; an error is part of the outcome.

    Raises:
        KeyboardInterrupt: if the user interrupts before there are results.
    """
    try:
        result = analyze_defenses(
            job.spec,
            job.defenses,
            job.settings,
            console,
            job.with_cost,
            job.n_control_draws,
            job.with_training,
            job.with_side_effects,
        )
    except TrainingInterrupted as interruption:
        print_line(console, str(interruption))
        raise KeyboardInterrupt from interruption
    except Exception as error:
        return ModelOutcome(job.label, None, {}, describe_error(error))
    return ModelOutcome(job.label, result.run, result.failures)


def _iterate_serially(jobs: Sequence[ModelJob], console: Console) -> Iterator[ModelOutcome]:
    for number, job in enumerate(jobs, 1):
        if not console.quiet:
            print_line(console, f"{job.label}: model {number} of {len(jobs)}")
        outcome = run_job(job, console)
        _free_memory()
        yield outcome
        if outcome.run is not None and outcome.run.record["interrupted"]:
            raise KeyboardInterrupt


def _free_memory() -> None:
    """Free what the model before has used, also on a GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class _Worker:
    """A running worker process, in one of the places for workers."""

    job: ModelJob
    attempt: int
    place: int
    process: Any
    connection: Connection
    task: TaskID
    outcome: ModelOutcome | None = None
    started: bool = False


def _iterate_in_workers(jobs: Sequence[ModelJob], n_workers: int, console: Console) -> Iterator[ModelOutcome]:
    waiting = deque((job, 1) for job in jobs)
    places = list(range(n_workers))
    workers: list[_Worker] = []
    environments = plan_environments(n_workers, jobs[0].spec.device)
    with make_progress_bar(console) as bar:
        tasks = {job.label: bar.add_task(f"{job.label}: waiting", total=None) for job in jobs}
        try:
            while waiting or workers:
                while waiting and places:
                    job, attempt = waiting.popleft()
                    place = places.pop(0)
                    process, connection = _start_process(job, environments[place], console.quiet)
                    workers.append(_Worker(job, attempt, place, process, connection, tasks[job.label]))
                for ready in wait([worker.connection for worker in workers]):
                    worker = next(worker for worker in workers if worker.connection is ready)
                    try:
                        kind, value = worker.connection.recv()
                    except (EOFError, OSError):  # the process has ended
                        workers.remove(worker)
                        places.insert(0, worker.place)
                        outcome = _finish_worker(worker)
                        if outcome is None:
                            print_line(
                                console, f"{worker.job.label}: {_describe_death(worker)}; it is tried again"
                            )
                            waiting.appendleft((worker.job, worker.attempt + 1))
                            continue
                        bar.remove_task(worker.task)
                        yield outcome
                        continue
                    worker.started = True
                    if kind == "outcome":
                        worker.outcome = value
                    elif kind == "line":
                        print_line(console, f"{worker.job.label}: {value}")
                    else:
                        step, completed, total = value if kind == "progress" else (value, 0, None)
                        bar.update(
                            worker.task,
                            description=f"{worker.job.label}: {step}",
                            completed=completed,
                            total=total,
                        )
        finally:
            _stop_workers(workers)


def plan_environments(n_workers: int, device: str) -> list[dict[str, str]]:
    """Return the environment variables of each worker: its GPU, and its share of the threads.

    A GPU each, in turn if there are fewer GPUs than workers; a device that the user names by its number is
    left to them, and so is `OMP_NUM_THREADS`.

    Args:
        n_workers: number of workers.
        device: as `--device`.
    """
    gpus = _list_gpus() if device in ("auto", "cuda") else []
    threads = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    if "OMP_NUM_THREADS" not in os.environ:
        threads["OMP_NUM_THREADS"] = str(max(1, _count_threads() // n_workers))
    return [
        threads | ({"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {})
        for place in range(n_workers)
    ]


def _count_threads() -> int:
    """Return the number of threads that a single run would compute with."""
    import torch

    limit_threads()
    return torch.get_num_threads()


def _list_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` takes them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        return [str(number) for number in range(torch.cuda.device_count())]
    names = [name.strip() for name in visible.split(",")]
    return [name for name in names if name not in ("", "-1")]


def _start_process(job: ModelJob, environment: Mapping[str, str], is_quiet: bool) -> tuple[Any, Connection]:
    """Start a worker for a model; return the process and the pipe through which it reports."""
    context: Any = multiprocessing.get_context(_START_METHOD)
    reader, writer = context.Pipe(duplex=False)
    attacks = [attack.option for attack in job.spec.attacks]  # whose functions cannot be sent
    sent_job = replace(job, spec=replace(job.spec, attacks=()))
    process = context.Process(target=_work, args=(sent_job, attacks, is_quiet, writer), name=job.label)
    with _set_environment(environment), _ignore_interrupts():
        try:
            process.start()
        except (TypeError, AttributeError, ValueError) as error:  # of pickle
            raise UserError(f"{job.label} cannot be sent to a worker ({error}): {_GUARD_HINT}") from error
    writer.close()  # so that the end of the process is the end of what can be read
    return process, reader


def _work(job: ModelJob, attacks: Sequence[str], is_quiet: bool, connection: Connection) -> None:
    """Run one model in a worker process, and send its outcome.

    Ctrl-C reaches every process of a terminal; the one that started the workers stops them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    lock = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with lock:
            connection.send((kind, value))

    send("step", "starting")
    job = replace(job, spec=replace(job.spec, attacks=choose_attacks(attacks)))
    send("outcome", run_job(job, RelayConsole(send, is_quiet)))


def _end_with_parent() -> None:
    """End this process when the one that started it ends, by whatever signal."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_for_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


def _finish_worker(worker: _Worker) -> ModelOutcome | None:
    """Return the outcome of a worker that has ended; None if it was killed and is to be tried again."""
    worker.process.join()
    worker.connection.close()
    if worker.outcome is not None:
        return worker.outcome
    if worker.attempt < _MAX_ATTEMPTS:
        return None
    hint = "" if worker.started else f" ({_GUARD_HINT})"
    problem = f"{_describe_death(worker)}, {worker.attempt} times{hint}"
    return ModelOutcome(worker.job.label, None, {}, problem)


def _describe_death(worker: _Worker) -> str:
    code = worker.process.exitcode
    if code is not None and code < 0:
        memory = ", as when memory runs out" if -code == getattr(signal, "SIGKILL", 9) else ""
        return f"its worker was killed by signal {-code}{memory}"
    return f"its worker ended with code {code} and without a result"


def _stop_workers(workers: Sequence[_Worker]) -> None:
    """End all workers that still run."""
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.join(_STOP_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.connection.close()


@contextmanager
def _set_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Context manager: set environment variables, which a new process inherits."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _ignore_interrupts() -> Iterator[None]:
    """Context manager: start processes that Ctrl-C does not reach while they import their libraries."""
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
