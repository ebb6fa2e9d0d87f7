"""The loop of a run: tasks, epochs, evaluation, checkpoints. It calls `bpnjax.training`."""

import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bpnjax import models
from bpnjax.config import validate
from bpnjax.data import TaskSequence, load_sequence
from bpnjax.data.sequence import check_batch_size
from bpnjax.evaluation.accuracy import accuracies
from bpnjax.methods import REGISTRY
from bpnjax.run import (
    byte_counts,
    checkpoint,
    frozen_features,
    interrupt,
    later_tasks,
    log_copies,
    memory,
    more_seeds,
    results,
    writers,
)
from bpnjax.run import workdir as folders
from bpnjax.run.checkpoint import Position
from bpnjax.run.workdir import claim
from bpnjax.training import compilation, epochs, hosts, parallel, streaming
from bpnjax.training.evaluate import evaluate
from bpnjax.training.experiment import Experiment, make_experiment
from bpnjax.training.task_data import Data, put_on_device
from bpnjax.utils import arrays, prng

OnLog = Callable[[dict[str, Any]], None]


class LossNotFinite(RuntimeError):
    """A training loss was NaN or infinite."""


@jax.jit
def _finite(state: Any) -> Any:
    """Whether each array is finite everywhere; keys and integers always are."""

    def one(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.bool_(True)
        return jnp.all(jnp.isfinite(leaf))

    return jax.tree.map(one, state)


class Programs(NamedTuple):
    """The compiled programs of a run.

    ``evaluate_in_training`` is ``evaluate`` before the task's mode is stored.
    """

    init: Any
    begin_task: Any
    run_steps: Any
    end_task: Any
    evaluate: Any
    evaluate_in_training: Any


def compile_programs(
    experiment: Experiment, clock: parallel.Clock, num_seeds: int, layout: parallel.Layout
) -> Programs:
    """Wraps the per-seed functions for seeds and devices. Each is compiled at its first use.

    Args:
      experiment: the static facts of the run.
      clock: measures the compile time.
      num_seeds: as in `bpnjax.training.parallel.program`.
      layout: the layout of devices.

    Returns:
      `Programs`: ``init`` takes the key or keys, the others the state and then the arguments in
      `bpnjax.training.epochs` and `bpnjax.training.evaluate`.
    """

    takes_state_over = (epochs.begin_task, epochs.run_steps, epochs.end_task)

    def make(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        static = {"in_training": True} if options.pop("in_training", False) else {}
        donate = (0,) if function in takes_state_over else ()
        bound = partial(function, experiment, **static)
        return parallel.program(bound, clock, num_seeds, layout, donate=donate, **options)

    return Programs(
        init=make(epochs.init_state),
        begin_task=make(epochs.begin_task),
        run_steps=make(epochs.run_steps, split=True),
        end_task=make(epochs.end_task, split=True),
        evaluate=make(evaluate, split=True),
        evaluate_in_training=make(evaluate, split=True, in_training=True),
    )


def seed_keys(config: ConfigDict) -> jax.Array:
    """The PRNG keys of a run.

    Args:
      config: a run configuration. Seed number s has the key of ``seed + s``.

    Returns:
      Typed PRNG keys ``[num_seeds]``, or a scalar for one seed.

    Example:
      >>> from bpnjax import config
      >>> from bpnjax.run import train
      >>> settings = config.default()
      >>> settings.num_seeds = 3
      >>> train.seed_keys(settings).shape
      (3,)
    """
    if config.num_seeds == 1:
        return prng.key(config.seed)
    return jnp.stack([prng.key(config.seed + s) for s in range(config.num_seeds)])


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    overwrite: bool = False,
    sequence: TaskSequence | None = None,
    on_log: OnLog | None = None,
) -> dict[str, Any]:
    """Trains a sequence of tasks, tests it, and writes everything to a folder.

    An interrupted run resumes at its newest complete checkpoint, with the same results as without
    the interruption. A complete run is not run again. If it has fewer seeds than requested, the
    missing seeds are run.

    Args:
      config: a configuration.
      workdir: the run's folder.
      overwrite: remove an earlier run from the folder, after checking that this one can start.
      sequence: the tasks, from `bpnjax.data.tasks`; the configuration's fields of data are then
        ignored. None loads the data that the configuration names.
      on_log: called with each new line of ``metrics.jsonl`` as a dict, and at the end with the
        content of ``result.json`` and ``kind="result"``. An exception in it ends the run, which
        resumes at its last checkpoint when it is called again.

    Returns:
      The result, as in ``result.json``, with arrays in place of lists if it was trained now.

    Raises:
      UserError: configuration, data, folder or checkpoints cannot be used.
      LossNotFinite: the loss was NaN or infinite. The last good checkpoint stays.
    """
    workdir = pathlib.Path(workdir)
    validate(config)
    if sequence is not None:
        config = _of_given(config, sequence)

    def look() -> tuple[bool, int]:
        complete = folders.check(workdir, config, overwrite)
        there = 0 if overwrite else folders.seeds_there(workdir)
        return complete, there if there < config.num_seeds else 0

    complete, there = hosts.first_asks(look)
    if complete:
        result = hosts.first_asks(lambda: results.read(workdir))
    elif there:
        result = _add_seeds(config, workdir, there, sequence, on_log)
    else:
        result = _train(config, workdir, overwrite, sequence, on_log)
    if on_log and hosts.is_first():
        on_log({"kind": "result"} | writers.plain(result))
    return result


def _of_given(config: ConfigDict, sequence: TaskSequence) -> ConfigDict:
    """The configuration of a run with a given sequence, which it describes."""
    check_batch_size(config, sequence)
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(
        {
            "dataset.name": "given", "dataset.path": "",
            "dataset.augment": config.dataset.augment if sequence.files else "none",
            "sequence.kind": "permuted" if sequence.permuted else "class_split",
            "sequence.classes": "", "sequence.num_tasks": len(sequence),
            "sequence.heads": sequence.heads, "sequence.first_identity": sequence.first_identity,
        }
    )  # fmt: skip
    return config


class Prepared(NamedTuple):
    """Everything that a run needs to start, after all checks."""

    layout: parallel.Layout
    sequence: TaskSequence  # of features where train.features_once asks for them
    experiment: Experiment
    earlier: later_tasks.Earlier | None
    stages: Sequence[int]  # the tasks that are trained
    steps: dict[int, int]  # number of steps in an epoch of each


def prepare(config: ConfigDict, sequence: TaskSequence | None = None) -> Prepared:
    """Reads the data and makes everything static. It writes no file in the run's folder.

    Args:
      config: a validated configuration.
      sequence: the tasks; None loads the data that the configuration names.

    Returns:
      `Prepared`.

    Raises:
      UserError: the run cannot start.
    """
    layout = parallel.choose_layout(config)
    sequence = load_sequence(config) if sequence is None else sequence
    earlier = later_tasks.find(config, sequence)
    if earlier is not None:
        sequence = earlier.normalised(sequence)
    trained, sequence = frozen_features.once(config, sequence)
    experiment = make_experiment(trained, sequence)
    memory.check(experiment, sequence, config.num_seeds)
    stages = later_tasks.stages(experiment, earlier)
    steps = {t: epochs.steps_per_epoch(experiment, sequence, t) for t in stages}
    return Prepared(layout, sequence, experiment, earlier, stages, steps)


def _train(
    config: ConfigDict,
    workdir: pathlib.Path,
    overwrite: bool,
    sequence: TaskSequence | None,
    on_log: OnLog | None,
) -> dict[str, Any]:
    """Trains all seeds of a configuration in one program."""
    compilation.keep(config)
    prepared = prepare(config, sequence)
    with hosts.own_folder(workdir) as folder, folders.held(folder):
        run = _Run(config, folder, prepared)
        run.state = run.programs.init(run.keys)  # before files are removed, since it may not fit
        claim(folder, config, overwrite)
        run.restore_or_start(header(config, workdir, prepared), on_log)
        try:
            with interrupt.at_a_good_place() as run.interrupted:
                run.all_tasks()
        finally:
            run.progress.close()
            run.log.close()
        return run.finish()


def _add_seeds(
    config: ConfigDict,
    workdir: pathlib.Path,
    there: int,
    sequence: TaskSequence | None,
    on_log: OnLog | None,
) -> dict[str, Any]:
    """Trains the seeds that a complete run lacks, and joins them to it."""
    compilation.keep(config)
    sequence = load_sequence(config) if sequence is None else sequence
    prepared = prepare(config, sequence)
    stored = hosts.first_asks(lambda: results.read(workdir))
    results.check_data(stored, config, prepared.sequence, workdir)
    others, added = more_seeds.missing(config, there), workdir / folders.MORE_SEEDS

    def look() -> tuple[bool, bool]:
        more_seeds.last_state(workdir, prepared.experiment, there)  # checks before training
        stale = folders.more_seeds(workdir) != (others.seed, others.num_seeds)
        return stale, not stale and folders.check(added, others, overwrite=False)

    stale, complete = hosts.first_asks(look)
    if not complete:
        _train(others, added, stale, sequence, on_log)

    def join() -> dict[str, Any]:
        earlier = more_seeds.last_state(workdir, prepared.experiment, there)
        joined = more_seeds.join(workdir, config, prepared.experiment, prepared.sequence, earlier)
        return writers.plain(joined)

    return hosts.first_asks(join)


def header(config: ConfigDict, workdir: pathlib.Path, prepared: Prepared) -> str:
    """Describes a run in one line, which is printed when it starts.

    Args:
      config: of the run.
      workdir: its folder.
      prepared: from `prepare`.

    Returns:
      Method, data, network, devices, seeds and folder.
    """
    seeds = f"seed {config.seed}"
    if config.num_seeds > 1:
        seeds = f"seeds {config.seed} to {config.seed + config.num_seeds - 1}"
    size = byte_counts.report(prepared.experiment)["core_parameters"]
    data = config.dataset.path or config.dataset.name
    return (
        f"{config.method} on {data}, {prepared.sequence.num_tasks} tasks; "
        f"{models.find(config.model).described(config.model)} of {size:,} parameters; "
        f"{prepared.layout.number} x {jax.devices()[0].device_kind}; {seeds}; {workdir}"
    )


class _Run:
    """The host side of one run: its position, record and files."""

    interrupted: Callable[[], bool]
    record: dict[str, Any]

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, prepared: Prepared) -> None:
        self.config, self.workdir = config, workdir
        layout, self.sequence, self.experiment, self.earlier, self.stages, self.steps = prepared
        sequence = self.sequence
        self.epochs = self.experiment.epochs
        self.clock = parallel.Clock()
        self.programs = compile_programs(self.experiment, self.clock, config.num_seeds, layout)
        self.data = parallel.place(put_on_device(sequence, streaming.most_bytes(config)), layout)
        self.keys = seed_keys(config)
        self.chunk_steps, self.feed = streaming.make_feed(
            self.experiment, self.keys, sequence, self.data, layout, max(self.steps.values())
        )

    def restore_or_start(self, header: str, on_log: OnLog | None) -> None:
        self.record = results.new_record(
            self.config, self.sequence.num_tasks, self.sequence.version
        )
        self.position = Position(self.stages[0], 0, 0)
        found = self.restore()
        if found is not None:
            self.position, self.state, stored = found
            results.check_data(stored, self.config, self.sequence, self.workdir)
            self.record = results.from_json(stored)
        self.compiled_before = self.record["compile_seconds"]
        self.log = writers.MetricsLog(
            self.workdir / "metrics.jsonl",
            self.record["metrics_length"],
            log_copies.open_copies(self.config.log, self.workdir, self.config.seed),
            on_log if hosts.is_first() else None,
        )
        total = sum(self.epochs[task] * steps for task, steps in self.steps.items())
        self.progress = writers.Progress(total, self.record["total_steps"])
        if found is None and self.earlier is not None:
            self.take_over(self.earlier)
        self.progress.line(header)
        if found is None and self.earlier is not None:
            k, path = self.earlier.num_tasks, self.earlier.path
            self.progress.line(f"tasks 1 to {k} are those of {path}; going on at task {k + 1}")
        if found is not None:
            task, epoch, step = self.position
            where = f"going on at task {task + 1}, epoch {epoch + 1}, step {step}"
            if task >= self.sequence.num_tasks:
                where = "all tasks are trained; making the results"
            self.progress.line(f"{where} (checkpoint in {self.workdir / 'checkpoints'})")

    def take_over(self, earlier: later_tasks.Earlier) -> None:
        """Copies tasks that were learned before into the first places of the state."""
        state = self.state

        def put() -> None:
            nonlocal state
            state = later_tasks.put_first(self.state, earlier, self.config)

        hosts.first_asks(put)
        self.state = hosts.tell_arrays(state)

    def restore(self) -> tuple[Position, Any, dict[str, Any]] | None:
        """Position, state and record of the last checkpoint, which the first host reads for all."""
        state = self.state

        def read() -> list[Any] | None:
            nonlocal state
            folder = self.workdir / "checkpoints"
            found = checkpoint.restore_latest(folder, state)
            if found is None:
                return None
            position, state, record = found
            return [position, record]

        found = hosts.first_asks(read)
        if found is None:
            return None
        position, record = found
        return Position(*position), hosts.tell_arrays(state), record

    def all_tasks(self) -> None:
        for task in self.stages:
            if task < self.position.task:
                continue
            if (self.position.epoch, self.position.step) == (0, 0):
                self.state = self.programs.begin_task(self.state, jnp.int32(task))
            self.train_task(task)
            self.state = self.timed("train_seconds", self.programs.end_task, task)
            self.position = Position(task + 1, 0, 0)
            last = task == self.stages[-1]
            if last or (task + 1) % self.config.evaluate.every_tasks == 0:
                self.test(task, finished=True)
            if last or (task + 1) % self.config.checkpoint.every_tasks == 0:
                self.save()
            if not last:
                self.end_if_interrupted()

    def end_if_interrupted(self) -> None:
        if self.interrupted():
            self.save()
            task, epoch, step = self.position
            raise KeyboardInterrupt(f"saved at task {task + 1}, epoch {epoch + 1}, step {step}")

    def timed(
        self,
        kind: str,
        program: Callable[..., Any],
        task: int,
        *more: int,
        data: Data | None = None,
    ) -> Any:
        """Runs a program on the state and adds its time, without compiling, to the record."""
        data = self.data if data is None else data
        compiled, started = self.clock.compile_seconds, time.perf_counter()
        numbers = [jnp.int32(n) for n in more]
        out = program(self.state, data, jnp.int32(task), *numbers)
        jax.block_until_ready(out)
        compiling = self.clock.compile_seconds - compiled
        self.record[kind] += time.perf_counter() - started - compiling
        return out

    def ranges(self, task: int) -> Iterator[tuple[int, int, int]]:
        """The remaining ranges of steps ``(epoch, start, stop)`` of a task."""
        steps, longest = self.steps[task], self.chunk_steps or self.steps[task]
        every = self.save_every(task)
        _, epoch, start = self.position
        while epoch < self.epochs[task]:
            done = epoch * steps + start  # steps of this task
            stop = min(steps, start + longest, start + every - done % every)
            yield epoch, start, stop
            epoch, start = (epoch + 1, 0) if stop == steps else (epoch, stop)

    def save_every(self, task: int) -> int:
        return self.config.checkpoint.every_steps or self.epochs[task] * self.steps[task] + 1

    def train_task(self, task: int) -> None:
        config, steps = self.config, self.steps[task]
        ranges = list(self.ranges(task))
        chunks = iter(self.feed(task, ranges))
        for epoch, start, stop in ranges:
            self.train_range(task, epoch, start, stop, chunks)
            at_end = stop == steps
            self.position = Position(task, epoch + at_end, 0 if at_end else stop)
            every = config.evaluate.every_epochs
            if at_end and every and (epoch + 1) % every == 0:
                self.test(task, finished=False)
            if (epoch * steps + stop) % self.save_every(task) == 0:
                self.save()
            self.end_if_interrupted()
        next(chunks, None)  # at its end it closes its files

    def train_range(
        self, task: int, epoch: int, start: int, stop: int, chunks: Iterator[Data]
    ) -> None:
        before, started = self.record["train_seconds"], time.perf_counter()
        data = next(chunks)  # waits if images are read more slowly than they are trained on
        self.record["train_seconds"] += time.perf_counter() - started
        self.state, sums = self.timed(
            "train_seconds", self.programs.run_steps, task, epoch, start, stop, data=data
        )
        seconds = self.record["train_seconds"] - before
        sums = jax.tree.map(lambda leaf: np.atleast_1d(np.asarray(leaf)), sums)
        bad = int(sums.bad_step.max())
        if bad >= 0:
            raise LossNotFinite(
                f"the loss is not finite at task {task + 1}, epoch {epoch + 1}, step "
                f"{int(sums.bad_step[sums.bad_step >= 0].min()) + 1}; the last good checkpoint "
                f"stays in {self.workdir / 'checkpoints'}; lower {self.step_fields()} and pass "
                "--overwrite"
            )
        examples = float(sums.examples.sum())
        self.record["examples"] += examples
        self.record["total_steps"] += stop - start
        loss = sums.loss / sums.examples
        rate = examples / max(seconds, 1e-9)
        self.log.write(
            kind="train", task=task + 1, epoch=epoch + 1, step=stop,
            total_steps=self.record["total_steps"], loss=loss,
            accuracy=sums.correct / sums.examples, examples_per_second=rate,
        )  # fmt: skip
        where = f"{self.named(task, 24)}  epoch {epoch + 1}/{self.epochs[task]}"
        self.progress.update(stop - start, where, float(loss.mean()), rate)

    def named(self, task: int, width: int) -> str:
        """The number of a task and its classes, the latter in at most ``width`` characters."""
        names = [self.sequence.class_names[c] for c in np.flatnonzero(self.sequence.classes[task])]
        return f"task {task + 1}/{self.sequence.num_tasks} ({writers.listed(names, width)})"

    def step_fields(self) -> str:
        """The fields of this method that determine the size of a step."""
        own = REGISTRY[self.config.method].fields
        fields = [f for f in own if f.split(".")[1] in ("learning_rate", "epsilon")]
        return " or ".join(["train.learning_rate", *fields])

    def test(self, task: int, finished: bool) -> None:
        last = task == self.stages[-1]
        infer = finished and (self.config.evaluate.inferred_rows == "all" or last)
        which = self.programs.evaluate if finished else self.programs.evaluate_in_training
        correct = self.timed("evaluate_seconds", which, task, infer)
        limit = self.config.evaluate.inferred_examples if self.experiment.told_task else 0
        found = accuracies(correct, self.sequence.test.count, limit)
        found = {kind: np.atleast_2d(values) for kind, values in found.items()}
        guess = found.pop("task_guess")
        if finished:
            for kind, values in found.items():
                self.record["accuracy"][kind][:, task] = values
            self.record["task_guess"][:, task] = guess
        self.log.write(
            kind="evaluate", task=task + 1, task_finished=finished,
            total_steps=self.record["total_steps"], **found, task_guess=guess,
        )  # fmt: skip
        if finished:
            means = {kind: np.nanmean(v) for kind, v in found.items() if not np.isnan(v).all()}
            shown = [f"{kind.removeprefix('task_')} {mean:.4f}" for kind, mean in means.items()]
            text = f" done; mean so far: {', '.join(shown)}"
            left = writers.WIDTH - len(self.named(task, 4)) + 4 - len(text)
            self.progress.line(self.named(task, max(8, left)) + text)

    def refuse_broken_state(self) -> None:
        """Raises an error for a state with NaN or infinity, before it replaces a checkpoint."""
        flags = jax.device_get(_finite(self.state))
        named = arrays.flatten(flags)
        broken = [name for name, good in named.items() if not np.all(good)]
        if broken:
            raise LossNotFinite(
                f"the state is not finite after task {max(1, self.position.task)} ({broken[0]}, "
                f"{len(broken)} of {len(named)} arrays), though the loss is; the last good "
                f"checkpoint stays in {self.workdir / 'checkpoints'}; lower {self.step_fields()}, "
                "or the method's strength, and pass --overwrite"
            )

    def save(self) -> None:
        if not hosts.is_first():
            return
        self.refuse_broken_state()
        self.record["metrics_length"] = self.log.length
        self.record["compile_seconds"] = self.compiled_before + self.clock.compile_seconds
        checkpoint.save(
            self.workdir / "checkpoints",
            self.position,
            self.state,
            writers.plain(self.record),
            self.config.checkpoint.keep,
        )

    def finish(self) -> dict[str, Any]:
        record = self.record | {
            "compile_seconds": self.compiled_before + self.clock.compile_seconds
        }
        if not hosts.is_first():
            return results.make(self.config, self.experiment, self.sequence, record)
        return results.write_all(
            self.workdir, self.config, self.experiment, self.sequence, self.state, record
        )
