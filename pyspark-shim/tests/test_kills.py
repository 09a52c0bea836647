"""What ends with what: executors, drivers, workers, runners and fronts are killed in the middle of a job.

The job and the applications are those of ``applications.py``. After each kill the job's rows, order, nulls,
errors and schema are those of the undisturbed job, and what belonged to the killed is gone in 5 s.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from applications import (
    BATCH_ROWS,
    EXECUTORS,
    HEARTBEAT_SECONDS,
    JOB_SECONDS,
    ROWS,
    Application,
    Front,
    command,
)
from figures import PROVE, count, report
from processes import is_gone, until, until_clean

from flightsvc.server import archive

WANTED = 20
TIMES = count(1, WANTED)  # each kill
FEWER = count(1, 10)  # where executors or an application have to start anew: all kills are to take an hour

pytestmark = pytest.mark.java


class Cluster:
    """The application that lives at present; one that has ended is followed by another."""

    def __init__(self, models: Path, folder: Path):
        self.models, self.undisturbed = models, folder / "undisturbed.arrow"
        self.it: Application | None = None

    def get(self) -> Application:
        """Return an application that has run the whole job."""
        if self.it is not None and is_gone(self.it.driver):  # a test has failed
            self.ended()
        if self.it is None:
            self.it = Application(self.models, self.undisturbed)
            self.it.start()
            self.it.begin()
            result = self.it.finish()
            assert result["rows"] == ROWS
            assert result["failed_tasks"] == 0, self.it.complaints()
        return self.it

    def ended(self) -> None:
        """The application is no more."""
        it, self.it = self.it, None
        if it:
            it.close()


@pytest.fixture(scope="module")
def cluster(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    it = Cluster(models, tmp_path_factory.mktemp("job"))
    try:
        yield it
    finally:
        it.ended()


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)
    until(lambda: is_gone(process), 10, f"end of process {process.pid}")


def belongings(front: Front) -> Callable[[], list[str]]:
    """Return what tells how much is left of a front: processes, its folder and what is in it."""
    processes = [front.process, *front.process.children()]

    def left() -> list[str]:
        alive = [str(process) for process in processes if not is_gone(process)]
        return alive + [str(path) for path in (front.folder, *front.folder.glob("*")) if path.exists()]

    return left


def until_gone(it: Application, executors: list[psutil.Process], fronts: list[Front]) -> float:
    """Wait for the end of executors, and return the seconds from then until nothing of theirs is left."""
    left = [belongings(front) for front in fronts]
    for executor in executors:
        until(lambda: is_gone(executor), JOB_SECONDS, f"end of executor {executor}")  # noqa: B023
    return until_clean(lambda: [found for one in left for found in one()] + it.leftovers())


@pytest.mark.bar("kills-executors")
def test_an_executor_is_killed(cluster: Cluster):
    seconds = []
    for _ in range(TIMES):
        it = cluster.get()
        executor, front = it.working(it.begin())
        assert not it.is_done()
        executor.send_signal(signal.SIGKILL)
        seconds.append(until_gone(it, [executor], [front]))
        it.finish()
    report(
        executor_kills=TIMES, executor_kills_wanted=WANTED, seconds_until_clean_after_executor_kill=seconds
    )


@pytest.mark.bar("kills-executors")
@pytest.mark.prove
def test_executors_are_replaced(cluster: Cluster):
    """All are killed at once, so those that Spark starts in their place end the job."""
    seconds = []
    for _ in range(FEWER):
        it = cluster.get()
        it.working(it.begin())
        killed = it.executors()
        fronts = it.fronts()
        assert not it.is_done()
        for executor in killed:
            executor.send_signal(signal.SIGKILL)
        seconds.append(until_gone(it, killed, fronts))
        it.finish()
        assert not set(it.executors()) & set(killed)
    report(
        executors_replaced=FEWER,
        executors_replaced_wanted=WANTED,
        seconds_until_clean_after_replaced_executors_killed=seconds,
    )


@pytest.mark.bar("kills-lost")
@pytest.mark.prove
def test_an_executor_is_lost(cluster: Cluster):
    """It stands still until the driver has given it up, and is woken then; Spark ends it."""
    seconds = []
    for _ in range(TIMES):
        it = cluster.get()
        executor, front = it.working(it.begin())
        assert not it.is_done()
        noted = it.log.read_text().count("no recent heartbeats")
        executor.send_signal(signal.SIGSTOP)
        until(
            lambda: it.log.read_text().count("no recent heartbeats") > noted,  # noqa: B023
            4 * HEARTBEAT_SECONDS,
            "loss of the executor",
        )
        executor.send_signal(signal.SIGCONT)
        seconds.append(until_gone(it, [executor], [front]))
        it.finish()
    report(
        executors_lost=TIMES, executors_lost_wanted=WANTED, seconds_until_clean_after_executor_lost=seconds
    )


@pytest.mark.bar("kills-executors")
@pytest.mark.prove
def test_an_executor_is_decommissioned(cluster: Cluster):
    """It ends its tasks first, and no task fails."""
    seconds = []
    for _ in range(FEWER):
        it = cluster.get()
        executor, front = it.working(it.begin())
        assert not it.is_done()
        executor.send_signal(signal.SIGPWR)
        seconds.append(until_gone(it, [executor], [front]))
        result = it.finish()
        assert result["failed_tasks"] == 0, it.complaints()
    report(
        executors_decommissioned=FEWER,
        executors_decommissioned_wanted=WANTED,
        seconds_until_clean_after_executor_decommissioned=seconds,
    )


@pytest.mark.bar("kills-programs")
def test_a_front_is_killed(cluster: Cluster):
    """No task fails; the next front takes the place of the dead one."""
    seconds = []
    for _ in range(TIMES):
        it = cluster.get()
        executor, front = it.working(it.begin())
        assert not it.is_done()
        runners = front.process.children()
        assert runners
        kill(front.process)
        seconds.append(until_clean(lambda: [str(p) for p in runners if not is_gone(p)] + it.leftovers()))  # noqa: B023
        result = it.finish()
        assert result["failed_tasks"] == 0, it.complaints()
        after = it.front(executor)
        assert after is not None
        assert (after.folder, after.process != front.process) == (front.folder, True)
        assert it.leftovers() == []
    report(front_kills=TIMES, front_kills_wanted=WANTED, seconds_until_clean_after_front_kill=seconds)


@pytest.mark.bar("kills-programs")
@pytest.mark.prove
def test_a_runner_is_killed(cluster: Cluster):
    """No task fails, and the front stays."""
    seconds = []
    for _ in range(TIMES):
        it = cluster.get()
        executor, front = it.working(it.begin())
        runner = until(front.streaming, JOB_SECONDS, "stream")
        assert not it.is_done()
        kill(runner)
        seconds.append(until_clean(it.leftovers))
        result = it.finish()
        assert result["failed_tasks"] == 0, it.complaints()
        after = it.front(executor)
        assert after is not None
        assert after.process == front.process
        assert len(list(front.folder.glob("*.sock"))) == 1 + len(front.process.children())
    report(runner_kills=TIMES, runner_kills_wanted=WANTED, seconds_until_clean_after_runner_kill=seconds)


def daemon_of(executor: psutil.Process) -> psutil.Process:
    [daemon] = [process for process in executor.children() if "pyspark.daemon" in command(process)]
    return daemon


@pytest.mark.bar("kills-programs")
@pytest.mark.prove
@pytest.mark.parametrize("victim", ["worker", "daemon"])
def test_python_is_killed(cluster: Cluster, victim: str):
    """A worker's stream ends with it, a daemon's workers go on; the front stays."""
    seconds: list[float] = []
    times = FEWER if victim == "daemon" else TIMES  # each with an executor of its own
    for _ in range(times):
        it = cluster.get()
        executor, front = it.working(it.begin())
        assert not it.is_done()
        daemon = daemon_of(executor)
        kill(daemon.children()[-1] if victim == "worker" else daemon)
        seconds.append(until_clean(it.leftovers))
        it.finish()
        after = it.front(executor)
        assert after is not None
        assert after.process == front.process
        until(lambda: not any(m["streams"] for m in front.models()), 5, "end of streams")  # noqa: B023
        if victim == "daemon":  # its workers are used again, and Spark starts no other before it wants more
            kill(executor)
    report(
        **{
            f"{victim}_kills": times,
            f"{victim}_kills_wanted": WANTED,
            f"seconds_until_clean_after_{victim}_kill": seconds,
        }
    )


def streams(it: Application) -> int:
    """How many streams all executors' fronts have; a cancelled job's may outlast the next job, elsewhere."""
    return sum(about["streams"] for front in it.fronts() for about in front.models())


@pytest.mark.bar("kills-jobs")
@pytest.mark.prove
def test_a_job_is_cancelled(cluster: Cluster):
    """What waits in the queue is dropped: runs are half a second long, and no stream stays for its four."""
    seconds, dropped = [], 0
    it = cluster.get()
    for _ in range(TIMES):
        _, front = it.working(before := it.begin("slow"))

        digest = archive.digest(cluster.models / "slow")

        def slow(front: Front = front, digest: str = digest) -> dict[str, int]:
            [about] = [about for about in front.models() if about.get("digest") == digest]
            return about

        runs = slow()["runs"]
        assert slow()["streams"] == 1
        asked = it.ask("cancel")
        until(lambda: not streams(it), 30, "end of the streams")  # Spark takes seconds to end a worker
        seconds.append(round(time.monotonic() - asked, 2))
        answered = front.answered() - before.get(front.process.pid, 0)
        ran = slow()["runs"] - runs
        # The window holds four record batches: one runs, one may be on its way; the others are dropped.
        assert ran <= answered + 3, (ran, answered)
        dropped += answered + 4 - ran
        assert it.leftovers() == []
        it.begin()
        it.finish()
    report(
        jobs_cancelled=TIMES,
        jobs_cancelled_wanted=WANTED,
        record_batches_dropped=dropped,
        record_batch_rows=BATCH_ROWS,
        seconds_until_streams_of_cancelled_job_ended=seconds,
    )


@pytest.mark.bar("kills-lost")
@pytest.mark.prove
def test_stopping_early(cluster: Cluster):
    """LIMIT, take and a consumer that stops: no error, and the same worker works afterwards."""
    times = count(1, 5)
    it = cluster.get()
    answer = it.ask(f"early {times}")
    assert answer["limit"] == 3 * times
    assert answer["take"] == 2 * times
    assert answer["first"] == answer["whole"] == EXECUTORS * times
    assert answer["writers_left"] == 0
    assert answer["again"]
    for executor in it.executors():
        front = it.front(executor)
        assert front is not None
        until(lambda: not any(m["streams"] for m in front.models()), 5, "end of streams")  # noqa: B023
    report(early_stops=4 * times, early_stop_workers_used_again=answer["again"])


@pytest.mark.bar("kills-jobs")
@pytest.mark.prove
def test_a_session_ends(cluster: Cluster):
    """In the middle of its job; the driver lives on, and its next session works."""
    seconds = []
    for _ in range(FEWER):
        it = cluster.get()
        it.working(it.begin())
        executors = it.executors()
        left = [belongings(front) for front in it.fronts()]
        assert not it.is_done()
        it.ask("stop")
        for executor in executors:
            until(lambda: is_gone(executor), 30, "end of executor")  # noqa: B023
        seconds.append(until_clean(lambda: [f for one in left for f in one()] + it.leftovers()))  # noqa: B023
        it.start()
        it.begin()
        it.finish()
    report(sessions_ended=FEWER, sessions_ended_wanted=WANTED, seconds_until_clean_after_session_end=seconds)


@pytest.mark.bar("kills-drivers")
@pytest.mark.parametrize("victim", ["exit", "python", "jvm"] if PROVE else ["jvm"])
def test_a_driver_ends(cluster: Cluster, victim: str):
    """It exits without a stop when its job is done, or is killed in the middle of one."""
    seconds = []
    for _ in range(FEWER):
        it = cluster.get()
        if victim != "exit":
            it.working(it.begin())
        jvms = it.jvms()
        processes = [it.driver, *jvms]
        assert len(processes) == EXECUTORS + 2
        assert it.front(it.driver)
        assert it.fronts()
        if victim == "exit":
            it.driver.stdin.close()
        else:
            (jvms[0] if victim == "jvm" else it.driver).send_signal(signal.SIGKILL)
        if victim == "jvm":
            it.driver.stdin.close()  # a script that fails for want of its JVM ends, too
        for process in processes:
            until(lambda: is_gone(process), 60, f"end of {process}")  # noqa: B023
        seconds.append(until_clean(it.everything))
        cluster.ended()
    report(
        **{
            f"driver_{victim}_ends": FEWER,
            f"driver_{victim}_ends_wanted": WANTED,
            f"seconds_until_clean_after_driver_{victim}_end": seconds,
        }
    )
