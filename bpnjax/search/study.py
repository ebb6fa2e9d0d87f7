"""The search: Optuna proposes settings, our runs measure them, and processes share one storage.

Each trial of a method has a place, 0 to trials - 1, which it keeps when it is run again. So a
method ends with exactly one finished trial per place, whichever workers join or are killed.
"""

import contextlib
import hashlib
import json
import pathlib
import sqlite3
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bpnjax import config as configuration
from bpnjax.config.fields import entries
from bpnjax.methods import REGISTRY
from bpnjax.run.writers import plain
from bpnjax.search import outcome
from bpnjax.search.protocol import Protocol, protocol
from bpnjax.search.spaces import Axis, space
from bpnjax.search.trials import Measured, Stopped, Trials
from bpnjax.utils import locks
from bpnjax.utils.errors import UserError, suggest

__all__ = ["Plan", "plan", "search"]

_BEAT, _GRACE = 5, 30  # seconds between a worker's heartbeats, and until it counts as lost
# Messages of databases when another worker makes the same tables.
_AT_THE_SAME_TIME = (
    "UNIQUE constraint", "already exists", "duplicate key", "locked", "no such table",
)  # fmt: skip
_WAIT = 0.5  # seconds between two checks of other workers' trials


class Plan(NamedTuple):
    """What is searched, for each method."""

    config: ConfigDict
    protocols: dict[str, Protocol]
    axes: dict[str, tuple[Axis, ...]]
    trials: dict[str, int]  # 1 if nothing is searched


def plan(
    config: ConfigDict, methods: Sequence[str], trials: int, more: Mapping[str, str] | None = None
) -> Plan:
    """Plans a search without reading data.

    Args:
      config: a configuration. Its method is replaced by each of the names.
      methods: names of registered methods.
      trials: number of trials per method.
      more: as in `bpnjax.search.space`.

    Returns:
      `Plan`.

    Raises:
      UserError: there is no such method or field, or a range is invalid.
    """
    if trials < 1:
        raise UserError(f"--trials: {trials} is below 1; give at least 1")
    protocols, axes, many = {}, {}, {}
    for name in methods:
        if name not in REGISTRY:
            raise UserError(f"--methods: unknown method {name!r}; {suggest(name, REGISTRY)}")
        own = config.copy_and_resolve_references()
        own.method = name
        protocols[name] = protocol(own)
        axes[name] = space(protocols[name].tune, more)
        many[name] = trials if axes[name] else 1
    return Plan(config, protocols, axes, many)


def search(
    config: ConfigDict,
    methods: Sequence[str],
    workdir: str | pathlib.Path,
    trials: int = 32,
    space: Mapping[str, str] | None = None,
    storage: str = "",
    at_once: int = 1,
    prune: bool = False,
    report: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Searches settings of several methods, with equally many trials, and reports the best ones.

    The first trial of each method has the settings of the configuration. A tree-structured Parzen
    estimator (Bergstra et al. 2011) proposes the others. The same call in another process, or on
    another machine, joins the search. After an interruption the same call resumes it.

    Args:
      config: a configuration. Its ``search`` fields say how both phases differ and what is
        maximised.
      methods: names of registered methods.
      workdir: folder for everything.
      trials: number of trials per method. It may be raised later.
      space: ``{field: "low:high:scale"}``, see `bpnjax.search.space`.
      storage: an address for Optuna, such as ``"postgresql://..."``, or ``"journal"`` for a log
        file; by default an SQLite file in the workdir.
      at_once: number of trials that are proposed together and run in one `jax.vmap`.
      prune: whether to stop trials early whose accuracy after a task is not in the better half
        (successive halving over tasks).
      report: whether to run the best settings of each method on the reported sequence.
      command: the command that began the search, for the record.

    Returns:
      The content of ``search.json``.

    Raises:
      UserError: Optuna is missing, the storage holds another search, or a trial cannot run.
    """
    if at_once < 1:
        raise UserError(f"--at_once: {at_once} is below 1; give at least 1")
    if prune and at_once > 1:
        raise UserError(
            f"--at_once: {at_once} trials in one program cannot be ended early; leave out --prune, "
            "or set it to 1"
        )
    workdir = pathlib.Path(workdir)
    made = plan(config, methods, trials, space)
    optuna = _optuna()
    workdir.mkdir(parents=True, exist_ok=True)
    stored = _open(optuna, storage, workdir)
    studies = _studies(optuna, stored, made, _place(storage, workdir))
    workers = []
    for name in methods:
        folder = workdir / "trials" / name
        trial_runs = Trials(made.protocols[name].tune, made.axes[name], folder, at_once > 1)
        workers.append(
            _Worker(optuna, stored, studies[name], made, name, trial_runs, at_once, prune)
        )
    for worker in workers:
        worker.work()
        worker.trials.forget()  # keeps the programs and data of one method at a time
    for worker in workers:
        worker.wait()
    found = {name: _finished(optuna, studies[name]) for name in methods}
    try:
        with locks.held(workdir / outcome.LOCK, f"--workdir: {workdir}"):
            return outcome.write(workdir, made, found, prune, report, command)
    except locks.Locked:
        print("another worker writes the results", file=sys.stderr)
        return outcome.read(workdir, wait=True)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "bpnjax search needs Optuna, which is not installed; pip install 'bpnjax[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # For experimental options, and because Optuna sends no heartbeats with ask and tell.
    kinds = (optuna.exceptions.ExperimentalWarning, FutureWarning)
    for kind in kinds:
        warnings.filterwarnings("ignore", category=kind, module=r"optuna\b|bpnjax\.search\b")
    warnings.filterwarnings("ignore", message="Heartbeat of storage", module=r"optuna\b")
    return optuna


def _open(optuna: Any, address: str, workdir: pathlib.Path) -> Any:
    """Opens the storage of all trials."""
    if address == "journal":
        path = _place(address, workdir)
        backend = optuna.storages.journal.JournalFileBackend(path)
        _mend_journal(optuna, pathlib.Path(path))
        try:
            return optuna.storages.JournalStorage(backend)
        except Exception as error:  # a line that is not JSON, or not from Optuna
            raise _damaged(path, error) from error
    url = address or f"sqlite:///{_place(address, workdir)}"
    if not address:
        _check_file(workdir / "search.db")
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        return _made_once(
            lambda: optuna.storages.RDBStorage(
                url, engine_kwargs=options, heartbeat_interval=_BEAT, grace_period=_GRACE
            )
        )
    except ImportError as error:
        raise UserError(f"--storage: {' '.join(str(error).split())}; install its driver") from error
    except Exception as error:  # SQLAlchemy has many exceptions
        why = str(error).splitlines()[0]
        raise UserError(
            f"--storage: cannot use {url!r} ({why}); give an address such as "
            "postgresql://user@host/name, journal, or nothing"
        ) from error


def _place(address: str, workdir: pathlib.Path) -> str:
    """The address or path of the trials."""
    names = {"": "search.db", "journal": "search.journal"}
    return str(workdir / names[address]) if address in names else address


def _mend_journal(optuna: Any, path: pathlib.Path) -> None:
    """Drops an incomplete last line of a journal, which the next line would be appended to."""
    lock = optuna.storages.journal.JournalFileSymlinkLock(str(path))
    lock.acquire()  # so that no other worker writes
    try:
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
    finally:
        lock.release()


def _check_file(path: pathlib.Path) -> None:
    """Raises an error for a damaged SQLite database, parts of which could still be read."""
    if not path.is_file():
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as database:
            ((why, *_), *_) = database.execute("PRAGMA integrity_check")
    except sqlite3.Error as error:
        locked = isinstance(error, sqlite3.OperationalError)
        raise _damaged(str(path), error if locked else str(error)) from error
    if why != "ok":
        raise _damaged(str(path), why)


def _damaged(what: str, error: Exception | str) -> UserError:
    state, why = "is damaged", str(error)
    if isinstance(error, Exception):  # damaged, or held by another process
        state, why = "cannot be read", f"{type(error).__name__}: {error}"
    why = " ".join(why.split())[:200]
    return UserError(
        f"--workdir: {what} {state} ({why}); bring it back, or delete it to search anew"
    )


def _checksum(trial: Any, value: float | None) -> str:
    """The checksum of a trial's settings, notes and result."""
    noted = {k: v for k, v in trial.user_attrs.items() if k != "checksum"}
    text = json.dumps([dict(trial.params), noted, value], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _made_once(make: Callable[[], Any]) -> Any:
    """Makes a storage; tries again if another worker makes the same tables at the same time."""
    for left in range(40, -1, -1):
        try:
            return make()
        except Exception as error:
            if not left or not any(word in str(error) for word in _AT_THE_SAME_TIME):
                raise
            time.sleep(0.25)
    raise AssertionError("unreachable")


def _fingerprint(made: Plan, name: str) -> dict[str, str]:
    """What identifies a search, as texts by field."""
    one = made.protocols[name]
    known = entries()
    others = {field for field, entry in known.items() if entry.methods} - set(REGISTRY[name].fields)
    kept = {
        field: repr(plain(value))
        for field, value in configuration.flatten(one.tune).items()
        if field != "num_seeds" and field not in others and not configuration.is_free(field)
    }
    return kept | {f"space.{axis.field}": axis.described() for axis in made.axes[name]}


def _studies(optuna: Any, storage: Any, made: Plan, place: str) -> dict[str, Any]:
    """The study of each method. It is read once here, so that a damaged storage is reported."""
    studies, whole = {}, ("COMPLETE", "PRUNED")
    for name in made.trials:
        try:
            study = studies[name] = _study(optuna, storage, made, name)
            done = [t for t in study.get_trials(deepcopy=False) if t.state.name in whole]
            for trial in done:
                value = trial.value if trial.state.name == "COMPLETE" else None
                stored = trial.user_attrs.get("checksum")  # earlier versions wrote no checksum
                if stored is not None and stored != _checksum(trial, value):
                    raise _damaged(place, f"trial {trial.number} of {name} is not what was written")
        except UserError:
            raise
        except Exception as error:  # from SQLAlchemy, JSON or Optuna's own checks
            raise _damaged(place, error) from error
    return studies


def _study(optuna: Any, storage: Any, made: Plan, name: str) -> Any:
    """The study of a method, made if it does not exist; refused if it is of another search."""
    study = optuna.create_study(
        storage=storage, study_name=f"{made.config.name}/{name}", direction="maximize",
        load_if_exists=True,
    )  # fmt: skip
    asked = _fingerprint(made, name)
    there = study.user_attrs.get("search")
    if there is None:
        study.set_user_attr("search", asked)
        return study
    different = [
        f"{field}: {there.get(field, 'absent')} -> {asked.get(field, 'absent')}"
        for field in sorted(set(there) | set(asked))
        if there.get(field) != asked.get(field)
    ]
    if different:
        raise UserError(
            f"--workdir: it holds a search of {name} with other settings ({'; '.join(different)}); "
            "name another folder"
        )
    return study


class _Worker:
    """One process's part in the search of one method."""

    def __init__(
        self, optuna: Any, storage: Any, study: Any, made: Plan, name: str, trials: Trials,
        at_once: int, prune: bool,
    ) -> None:  # fmt: skip
        self.optuna, self.storage, self.study = optuna, storage, study
        self.axes, self.wanted, self.name = made.axes[name], made.trials[name], name
        self.trials, self.at_once = trials, at_once
        self.seed = made.config.seed
        self.prune = prune
        if prune:
            study.pruner = optuna.pruners.SuccessiveHalvingPruner(
                min_resource=1, reduction_factor=2, bootstrap_count=0
            )
        self.me = locks.me()

    def work(self) -> None:
        """Runs trials until all are finished or taken by other workers."""
        while batch := self._take():
            with self._alive(batch):
                self._run(batch)

    def wait(self) -> None:
        """Waits for the trials of other workers, and takes over those of lost workers."""
        told = False
        while len(_finished(self.optuna, self.study)) < self.wanted:
            self.work()
            if len(_finished(self.optuna, self.study)) >= self.wanted:
                return
            if not told:
                print(f"{self.name}: waiting for other workers", file=sys.stderr, flush=True)
                told = True
            time.sleep(_WAIT)

    def _take(self) -> list[Any]:
        """Takes up to ``at_once`` trials for this worker."""
        batch: list[Any] = []
        while len(batch) < self.at_once:
            self._release_lost([trial.number for trial in batch])
            if not self._queue():
                break
            states = self.optuna.trial.TrialState
            begun = [t for t in self.study.get_trials(deepcopy=False) if t.state != states.WAITING]
            self.study.sampler = self.optuna.samplers.TPESampler(
                seed=self.seed + len(begun), multivariate=True, constant_liar=True,
                n_startup_trials=max(4, self.wanted // 4),
            )  # fmt: skip
            trial = self.study.ask()
            place = trial.user_attrs.get("place")
            others = [
                t for t in self.study.get_trials(deepcopy=False)
                if t.user_attrs.get("place") == place and t.number != trial.number
                and (t.state in (states.COMPLETE, states.PRUNED)
                     or (t.state == states.RUNNING and t.number < trial.number))
            ]  # fmt: skip
            if place is None or place >= self.wanted or others:
                # Two workers filled the queue at the same time, and another one has the place.
                self.study.tell(trial, state=states.FAIL)
                continue
            trial.set_user_attr("worker", self.me)
            batch.append(trial)
        return batch

    def _queue(self) -> bool:
        """Queues a trial for each place without one; returns whether any is waiting."""
        states = self.optuna.trial.TrialState
        known = self.study.get_trials(deepcopy=False)
        left = {}
        for trial in known:  # a later trial replaces an earlier one of its place
            place = trial.user_attrs.get("place")
            if place is not None and (trial.state != states.FAIL or place not in left):
                left[place] = trial
        waiting = any(t.state == states.WAITING for t in known)
        if waiting:
            return True
        for place in range(self.wanted):
            trial = left.get(place)
            if trial is not None and trial.state != states.FAIL:
                continue
            values = {a.field: a.default for a in self.axes} if place == 0 else {}
            if trial is not None:
                values = dict(trial.params) or values
            self.study.enqueue_trial(values, user_attrs={"place": place})
            waiting = True
        return waiting

    def _release_lost(self, own: Sequence[int]) -> None:
        """Releases trials of lost workers, and those of this worker that it does not run."""
        states = self.optuna.trial.TrialState
        self.optuna.storages.fail_stale_trials(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            worker = trial.user_attrs.get("worker", "")
            started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
            nobody = not worker and time.time() - started > _GRACE
            forgotten = worker == self.me and trial.number not in own
            if nobody or forgotten or (worker and not locks.is_alive(worker)):
                with contextlib.suppress(Exception):  # another worker was faster
                    self.study.tell(trial.number, state=states.FAIL)

    @contextlib.contextmanager
    def _alive(self, batch: Sequence[Any]) -> Iterator[None]:
        """Sends heartbeats for trials while they run."""
        beat = getattr(self.storage, "record_heartbeat", None)
        if (
            beat is None
        ):  # a journal has no heartbeats; workers on one host check each other's process
            yield
            return
        ended = threading.Event()

        def go_on() -> None:
            while True:
                for trial in batch:
                    beat(trial._trial_id)
                if ended.wait(_BEAT):
                    return

        thread = threading.Thread(target=go_on, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _run(self, batch: Sequence[Any]) -> None:
        states = self.optuna.trial.TrialState
        places = [trial.user_attrs["place"] for trial in batch]
        values = [{axis.field: axis.suggest(trial) for axis in self.axes} for trial in batch]
        done = 0
        try:
            hopeless = partial(_hopeless, batch[0]) if self.prune else None
            try:
                found = self.trials.measure(values, places, hopeless)
            except Stopped as stopped:
                self._note(batch[0], Measured(None, stopped.steps, 0.0), None)
                self.study.tell(batch[0], state=states.PRUNED)
                self._say(places[0], values[0], "stopped early")
                done = 1
                return
            for trial, place, one, measured in zip(batch, places, values, found, strict=True):
                value = 0.0 if measured.value is None else measured.value
                self._note(trial, measured, value)
                self.study.tell(trial, value)
                shown = "diverged" if measured.value is None else f"{measured.value:.4f}"
                self._say(place, one, shown)
                done += 1
        finally:
            for trial in batch[done:]:  # after an error or Ctrl-C the place is free again
                with contextlib.suppress(Exception):
                    self.study.tell(trial, state=states.FAIL)

    def _note(self, trial: Any, measured: Measured, value: float | None) -> None:
        trial.set_user_attr("steps", measured.steps)
        trial.set_user_attr("seconds", measured.seconds)
        trial.set_user_attr("diverged", measured.value is None)
        trial.set_user_attr("checksum", _checksum(trial, value))

    def _say(self, place: int, values: Mapping[str, Any], shown: str) -> None:
        given = ", ".join(f"{f}={v:.3g}" if isinstance(v, float) else f"{f}={v}"
                          for f, v in values.items())  # fmt: skip
        print(f"{self.name}  trial {place + 1}/{self.wanted}  {shown}  {given}",
              file=sys.stderr, flush=True)  # fmt: skip


def _hopeless(trial: Any, tasks: int, value: float) -> bool:
    """Whether a trial is not in the better half of those that learned so many tasks."""
    trial.report(value, tasks)
    return trial.should_prune()


def _finished(optuna: Any, study: Any) -> list[Any]:
    """The trials that count, ordered by place."""
    states = optuna.trial.TrialState
    done = study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))
    first: dict[int, Any] = {}
    for trial in done:
        first.setdefault(trial.user_attrs["place"], trial)
    return [first[place] for place in sorted(first)]
