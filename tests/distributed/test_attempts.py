"""What fails is tried again where that helps, and named where it does not; a wait says what it is for."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from diffitm.core.errors import InputError, Unavailable
from diffitm.distributed import actors, attempts, progress
from diffitm.distributed.actors import StageActor, WorkerSpec
from diffitm.distributed.attempts import HERE, MOST, PATIENCE, RETRIES, Attempts, Place

TABLE = pa.table({"row": [7, 8, 9]})
BLOCK = "row 7 and the 2 after it"
A, B, C = (Place(f"node {name}", f"node {name} (GPU 0)") for name in "ABC")


class Killed(BaseException):
    """The process has ended."""


class Cluster:
    """Ray as StageActor sees it: one handle of Attempts, and the place where the next actor starts."""

    def __init__(self) -> None:
        self.place, self.gone = A, set[str]()
        self.attempts = Attempts(1, lambda: {"node A", "node B", "node C"} - self.gone)
        self.slept: list[float] = []
        self.now = 0.0
        self.actors = 0
        self.restarted = False
        names = ("start", "begin", "load", "end", "fail", "give_up")
        self.handle = SimpleNamespace(
            **{n: SimpleNamespace(remote=getattr(self.attempts, n)) for n in names}
        )

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(
            get_actor_id=lambda: f"{self.actors:08d}",
            get_node_id=lambda: self.place.node,
            was_current_actor_reconstructed=self.restarted,
        )

    def get(self, value: Any) -> Any:
        return value

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def start(self, build: Any, place: Place = A, restarted: bool = False) -> StageActor:
        """An actor of its own, or the last one again."""
        self.place, self.restarted = place, restarted
        self.actors += not restarted
        return StageActor(WorkerSpec(build, TABLE.schema, "row", 0.0), self.handle)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()

    def end_process(code: int) -> None:
        raise Killed

    monkeypatch.setattr(actors, "ray", made)
    monkeypatch.setattr(actors, "here", lambda: made.place)
    monkeypatch.setattr(actors.time, "sleep", made.sleep)
    monkeypatch.setattr(actors.os, "_exit", end_process)
    monkeypatch.setattr(attempts.time, "monotonic", lambda: made.now)
    return made


class Failing:
    """A worker, and what builds it: raises each error once, then does its work."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)

    def __call__(self, given: Any) -> Any:
        if self.errors:
            raise self.errors.pop(0)
        return given


def builds(worker: Any) -> Any:
    return lambda device: worker


BUSY = OSError("When reading 'x': AWS Error SLOW_DOWN during GetObject")
CUDA = RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_block_may_end_its_process_three_times(cluster: Cluster) -> None:
    worker = Failing(Killed(), Killed(), Killed())
    for _ in range(3):
        with pytest.raises(Killed):
            cluster.start(builds(worker))(TABLE)
    assert cluster.start(builds(worker))(TABLE) == TABLE
    assert not cluster.attempts.begun


def test_the_fourth_time_is_the_last(cluster: Cluster) -> None:
    worker = Failing(*(Killed() for _ in range(4)))
    for _ in range(4):
        with pytest.raises(Killed):
            cluster.start(builds(worker))(TABLE)
    with pytest.raises(InputError, match=f"^{BLOCK}: ended its process 4 times"):
        cluster.start(builds(worker))(TABLE)


def lose(cluster: Cluster, times: int) -> None:
    """Nodes that go away, each with the block."""
    for number in range(times):
        cluster.place = Place(f"spot {number}", f"spot {number}")
        with pytest.raises(Killed):
            cluster.start(builds(Failing(Killed())), cluster.place)(TABLE)


def test_nodes_that_go_do_not_count(cluster: Cluster) -> None:
    lose(cluster, 6)
    with pytest.raises(Killed):
        cluster.start(builds(Failing(Killed())))(TABLE)
    assert cluster.start(builds(Failing()))(TABLE) == TABLE


def test_what_takes_node_after_node_ends(cluster: Cluster) -> None:
    lose(cluster, MOST)
    with pytest.raises(InputError, match=f"^{BLOCK}: was lost 20 times"):
        cluster.start(builds(Failing()))(TABLE)


def test_a_start_that_ends_its_process(cluster: Cluster) -> None:
    build = Failing(*(Killed() for _ in range(4)))
    for number in range(4):
        with pytest.raises(Killed):
            cluster.start(build, restarted=number > 0)
    ended = cluster.start(build, restarted=True)
    with pytest.raises(InputError, match="the start of actor 00000001: ended its process 4 times"):
        ended(TABLE)


def test_what_no_actor_can_load_ends_the_run(cluster: Cluster) -> None:
    """After four tries, by the first block, so that Ray does not replace the actor; with the place."""
    actor = cluster.start(Failing(*(InputError("--model x: no unet") for _ in range(9))))
    assert len(cluster.slept) == 1 + RETRIES
    with pytest.raises(InputError, match=r"^--model x: no unet \(on node A \(GPU 0\)\)$"):
        actor(TABLE)


def test_a_first_node_that_cannot_load(cluster: Cluster) -> None:
    """Is no reason to give up while other actors are awaited; two of them are, or two minutes."""
    cluster.attempts.wanted = 9

    def fail(place: Place) -> StageActor:
        return cluster.start(Failing(*(InputError("no driver") for _ in range(9))), place)

    with pytest.raises(InputError, match="no driver"):
        fail(A)
    assert fail(B).ending is not None
    cluster.attempts.__init__(9, cluster.attempts.living)  # type: ignore[misc]
    begin = cluster.now
    with pytest.raises(InputError, match="no driver"):
        fail(A)
    assert fail(A).ending is not None
    assert attempts.ALONE <= cluster.now - begin < 2 * attempts.ALONE


def test_two_nodes_that_fail_each_for_a_cause_of_its_own(cluster: Cluster) -> None:
    """Are no reason to give up either, while others are awaited."""
    cluster.attempts.wanted = 9
    for place, cause in ((A, "no driver"), (B, "no disk")):
        with pytest.raises(InputError, match=cause):
            cluster.start(Failing(*(InputError(cause) for _ in range(9))), place)


def test_a_node_that_did_well_is_waited_for(cluster: Cluster) -> None:
    """As one does whose actor's process has just ended: another node's failures do not end the run."""
    cluster.start(builds(Failing()))(TABLE)
    cluster.attempts.working.clear()
    with pytest.raises(InputError, match="no driver"):
        cluster.start(Failing(*(InputError("no driver") for _ in range(9))), B)


def test_a_bug_of_a_start_keeps_its_kind(cluster: Cluster) -> None:
    with pytest.raises(TypeError, match="not callable"):
        cluster.start(Failing(*(TypeError("not callable") for _ in range(9))))(TABLE)


def test_a_load_that_succeeds_later(cluster: Cluster) -> None:
    worker = Failing()
    build = Failing(OSError("AWS Error SLOW_DOWN"), OSError("AWS Error SLOW_DOWN"))
    actor = cluster.start(lambda device: (build(device), worker)[1])
    assert actor(TABLE) == TABLE
    assert cluster.slept == [0.0, 5.0, 10.0]


def test_a_node_that_cannot_load_while_others_work(cluster: Cluster) -> None:
    """Its actors fail, whenever Ray replaces them, later and later; the run goes on."""
    cluster.start(builds(Failing()), B)(TABLE)
    for _ in range(12):
        with pytest.raises(InputError, match="no driver"):
            cluster.start(Failing(*(InputError("no driver") for _ in range(9))), A)
    assert cluster.slept[:6] == [0.0, 0.0, 1.0, 2.0, 10.0, 4.0]
    assert max(cluster.slept) == attempts.LONGEST
    assert cluster.attempts.read_troubles()[A.name].times == HERE + 11
    assert list(cluster.attempts.read_troubles()) == [A.name]


def test_a_restarted_actor_without_a_worker_leaves_its_blocks(cluster: Cluster) -> None:
    """Failing would cost the run the blocks that wait for it."""
    cluster.start(builds(Failing()), B)(TABLE)
    cluster.start(builds(Failing()), A)
    broken = cluster.start(
        Failing(*(InputError("no driver") for _ in range(99))), A, restarted=True
    )
    left = broken(TABLE)
    assert left.schema == TABLE.schema and len(left) == 0
    assert not cluster.attempts.working.get("00000002")


def test_a_block_that_a_store_refuses_is_tried_again(cluster: Cluster) -> None:
    assert cluster.start(builds(Failing(BUSY, BUSY, BUSY)))(TABLE) == TABLE
    assert cluster.slept == [0.0, 5.0, 10.0, 20.0]


def test_a_store_that_stays_away_ends_the_run(cluster: Cluster) -> None:
    """Not before PATIENCE is over, however often it was asked; and not as bad input."""
    with pytest.raises(Unavailable, match=rf"{BLOCK} failed \d+ times on node A .*SLOW_DOWN"):
        cluster.start(builds(Failing(*(BUSY for _ in range(99)))))(TABLE)
    assert PATIENCE <= cluster.now < 3 * PATIENCE


def test_a_store_that_one_node_cannot_reach(cluster: Cluster) -> None:
    """Its blocks are left to others after two tries; elsewhere they are done."""
    cluster.start(builds(Failing()), B)(TABLE)
    left = cluster.start(builds(Failing(*(BUSY for _ in range(99)))), A)(TABLE)
    assert len(left) == 0
    assert cluster.slept == [0.0, 0.0, 5.0, 10.0]
    assert cluster.start(builds(Failing()), B)(TABLE) == TABLE
    assert not cluster.attempts.failed_at


def test_a_cuda_error_ends_the_process(cluster: Cluster) -> None:
    """So that the block runs in another one. At one place it may do so twice while others work."""
    cluster.start(builds(Failing()), B)(pa.table({"row": [1]}))
    worker = Failing(*(CUDA for _ in range(99)))
    for number in range(HERE):
        with pytest.raises(Killed):
            cluster.start(builds(worker), A, restarted=number > 0)(TABLE)
    assert len(cluster.start(builds(worker), A, restarted=True)(TABLE)) == 0
    assert cluster.start(builds(Failing()), B)(TABLE) == TABLE


def test_a_cuda_error_at_every_try_ends_the_run(cluster: Cluster) -> None:
    """Although the model loads each time."""
    for number in range(RETRIES):
        with pytest.raises(Killed):
            cluster.start(builds(Failing(CUDA)), A, restarted=number > 0)(TABLE)
    with pytest.raises(Unavailable, match=f"{BLOCK} failed 4 times on node A .*illegal memory"):
        cluster.start(builds(Failing(CUDA)), A, restarted=True)(TABLE)


def test_a_gpu_that_loads_and_fails(cluster: Cluster) -> None:
    """Holds no block for long."""
    cluster.start(builds(Failing()), B)(TABLE)
    cluster.start(builds(Failing()), A)
    for row in range(6):
        block, before = pa.table({"row": [row]}), cluster.now
        for _ in range(HERE if row == 0 else 1):
            with pytest.raises(Killed):
                cluster.start(builds(Failing(CUDA)), A, restarted=True)(block)
        assert len(cluster.start(builds(Failing()), A, restarted=True)(block)) == 0
        assert cluster.now - before <= 3 * attempts.SHORT


def test_errors_of_a_block_that_end_the_run_at_once(cluster: Cluster) -> None:
    """Bad input, and bugs; memory is no CUDA error (it halves batches)."""
    for error in (
        InputError("bad"),
        ValueError("a bug"),
        RuntimeError("CUDA error: out of memory"),
    ):
        with pytest.raises(type(error), match=str(error)):
            cluster.start(builds(Failing(error)))(TABLE)
        assert cluster.attempts.read_error() is (error if type(error) is InputError else None)
        cluster.attempts.error = None
    assert not any(cluster.slept)


def test_silence_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """After a minute without news and again each minute, with what there is; not after news."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    watch = progress.Watch(None, lambda _: None, standing=lambda: "3 processors")
    caplog.set_level(logging.INFO, "diffitm")
    for second, found in ((0, 1), (59, 1), (61, 1), (90, 1), (122, 1), (150, 2), (200, 2)):
        now[0] = second
        watch._tell_silence(found)
    text = "no news of the actors for %s: the cluster has 3 processors"
    assert caplog.messages == [text % "1 min 1 s", text % "2 min 2 s"]


def test_what_is_remembered_of_actors_and_places() -> None:
    """A place in trouble makes a new actor wait, while others do well; an end there clears it."""
    known = Attempts(2, lambda: {A.node, B.node})
    assert known.start("start 1", "1", A) == attempts.Verdict()
    known.load("start 1", "1", A)
    assert known.working == {"1": A.node} and known.begun == {}
    verdict = known.fail("row 1", "2", B, "busy", transient=True, crash=False)
    assert verdict == attempts.Verdict(5.0)  # not yet left to others
    assert known.start("start 3", "3", B) == attempts.Verdict(5.0)
    assert "3" not in known.working  # as long as its place is in trouble
    assert known.fail("row 1", "2", B, "busy", True, False) == attempts.Verdict(10.0, leave=True)
    assert known.begin("row 1", "2", B) == attempts.Verdict(leave=True)
    assert known.begin("row 1", "1", A) == attempts.Verdict()
    assert known.begin("row 2", "2", B) == attempts.Verdict()
    known.end("row 1", "1", A)
    assert known.failed_at == {} and known.since is None
    assert known.read_troubles() == {B.name: attempts.Trouble(2, 2, "busy")}
    known.end("row 2", "2", B)
    assert known.read_troubles() == {B.name: attempts.Trouble(2, 0, "busy")}
    assert known.working == {"1": A.node, "2": B.node}
    assert known.start("start 4", "4", B) == attempts.Verdict()
    # What ends no process does not count as begun; a crash does.
    known.begin("row 5", "2", B)
    known.fail("row 5", "2", B, "busy", transient=True, crash=False)
    assert known.begun["row 5"] == []
    known.begin("row 5", "1", A)
    known.fail("row 5", "1", A, "CUDA", transient=False, crash=True)
    assert known.begun["row 5"] == [A.node]
    first, second = InputError("first"), InputError("second")
    known.give_up(first)
    known.give_up(second)
    assert known.read_error() is first


def test_waits_grow_to_a_bound() -> None:
    assert [attempts.delay(n, 5.0) for n in (1, 2, 3, 6, 7, 50)] == [5, 10, 20, 160, 300, 300]


def test_nodes_that_are_up(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": False}]
    monkeypatch.setattr(attempts, "ray", SimpleNamespace(nodes=lambda: nodes))
    assert attempts.living_nodes() == {"a"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "1 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min")]
    + [(7499, "2 h 4 min")],
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert progress.clock(seconds) == text


def test_blocks_wait_for_an_actor_that_may_yet_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure or two do not cut all blocks by an unknown rate; a refusal, or a minute of failures, does."""
    now = [1000.0]
    monkeypatch.setattr(attempts.time, "monotonic", lambda: now[0])
    known = Attempts(2, lambda: {"node A", "node B"})
    known.start("a's start", "a", A)
    assert not known.has_trouble()
    assert known.fail("a's start", "a", A, "the Hub is away", True, False).why is None
    now[0] += attempts.STARTING
    assert not known.has_trouble()
    now[0] += 1
    assert known.has_trouble()
    known.end("a block", "a", A)
    assert not known.has_trouble()
    known = Attempts(1, lambda: {"node A"})
    known.start("a's start", "a", A)
    for _ in range(RETRIES):
        assert known.fail("a's start", "a", A, "no such weights", False, False).why is None
        assert not known.has_trouble()
    assert known.fail("a's start", "a", A, "no such weights", False, False).why
    assert known.has_trouble()
    known = Attempts(1, lambda: {"node A"})
    for _ in range(1 + RETRIES):
        assert known.start("a's start", "a", A).why is None and not known.has_trouble()
    assert known.start("a's start", "a", A).why and known.has_trouble()
