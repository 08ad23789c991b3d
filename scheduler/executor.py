"""Runs a plan: resumes each job whenever the results it waits for are there.

A job is a generator (`job_run.run_job`) that submits calls and yields references. Hidden states go
from worker to worker as references and never come through here; latents and velocities do, and are
small: 8.4 MB a forward at 832x480x81.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from reelpool.errors import Cancelled, ReelpoolError

from ..models.registry import find_spec
from .events import Emit, JobFailed, JobFinished, PlanReady
from .job import Settings
from .job_run import JobContext, JobRun, run_job
from .open_pool import describe_pool, open_pool, pool_card
from .plan import Plan
from .planner import make_plan
from .pool import Ref, WorkerPool

logger = logging.getLogger(__name__)

POLL_S = 0.5  # longest wait between two looks at Ctrl-C


def plan_jobs(jobs: Sequence[Settings], pool_spec: str) -> Plan:
    """The plan that `run_jobs` would follow, without starting anything.

    Raises:
        ConfigError: if the pool's text makes no sense, or a model is nowhere.
        PlanError: if nothing fits.
    """
    specs = [find_spec(job.model, job.parts) for job in jobs]
    return make_plan(jobs, specs, describe_pool(pool_spec))


def run_jobs(jobs: Sequence[Settings], pool_spec: str, emit: Emit) -> list[JobFinished]:
    """Run jobs on a pool and write their videos.

    Args:
        jobs: complete settings.
        pool_spec: `auto` or `local:N[,MEMORY]`.
        emit: told everything that happens, in order.
    Returns:
        The results in the order of the jobs.
    Raises:
        ReelpoolError: the first failure; the other jobs are stopped.
    """
    contexts = [JobContext.open(job) for job in jobs]  # damaged models fail before the pool starts
    pool = open_pool(pool_spec, emit)
    try:
        cards = [pool_card(info.name, info.host, info.card) for info in pool.workers]
        plan = make_plan(jobs, [context.files.spec for context in contexts], cards)
        emit(PlanReady(plan.strategy, plan.explain(), plan.as_json()))
        return Executor(pool, emit).run(contexts, plan)
    finally:
        pool.close()


class Executor:
    """Keeps which job waits for what. Owned by the driver thread."""

    def __init__(self, pool: WorkerPool, emit: Emit) -> None:
        self._pool, self._emit = pool, emit
        self._runs: dict[str, JobRun] = {}
        self._waiting: dict[str, list[Ref]] = {}
        self._done: set[Ref] = set()
        self._results: dict[str, JobFinished] = {}

    def run(self, contexts: Sequence[JobContext], plan: Plan) -> list[JobFinished]:
        """Run all jobs to their end."""
        with _noted_interrupt() as check:
            return self._run(contexts, plan, check)

    def _run(
        self, contexts: Sequence[JobContext], plan: Plan, check: Callable[[], None]
    ) -> list[JobFinished]:
        job = ""
        try:
            for context in contexts:
                check()
                job = context.settings.id
                self._runs[job] = run_job(context, plan.job(job), self._pool, self._emit)
                self._resume(job, None)
            while self._waiting:
                ready = self._ready()
                check()
                for job in ready:
                    refs = self._waiting.pop(job)
                    self._done.difference_update(refs)
                    self._resume(job, [self._pool.get(ref) for ref in refs])
        except KeyboardInterrupt:
            self._stop()
            raise Cancelled() from None
        except ReelpoolError as error:
            self._emit(JobFailed(job, type(error).__name__, str(error)))
            self._stop()
            raise
        return [self._results[context.settings.id] for context in contexts]

    def _resume(self, job: str, values: list[object] | None) -> None:
        """Let a job go on until it needs results again, or ends."""
        run = self._runs[job]
        try:
            self._waiting[job] = next(run) if values is None else run.send(values)
        except StopIteration as stop:
            self._results[job] = stop.value
            del self._runs[job]

    def _ready(self) -> list[str]:
        """Wait for any result; the jobs that have all of theirs."""
        pending = [ref for refs in self._waiting.values() for ref in refs if ref not in self._done]
        if pending:
            self._done.update(self._pool.wait(pending, POLL_S))
        return [job for job, refs in self._waiting.items() if self._done.issuperset(refs)]

    def _stop(self) -> None:
        """Stop running calls before their next block, and let jobs clean up."""
        for info in self._pool.workers:
            self._pool.control(info.name, "stop")
        for run in self._runs.values():
            run.close()
        self._runs.clear()
        self._waiting.clear()


@contextmanager
def _noted_interrupt() -> Iterator[Callable[[], None]]:
    """Turn Ctrl-C into something to ask for: the function given raises it where it may strike.

    Raised by itself inside of concurrent.futures it can leave a future's lock taken, and the worker
    waits for it for ever (seen with the in-process pool). A second Ctrl-C strikes at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    def check() -> None:
        if noted:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
