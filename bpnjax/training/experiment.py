"""What does not change during a run: learner, sizes and options.

It is made from a configuration and a task sequence."""

import dataclasses
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bpnjax import models, networks, optim
from bpnjax.data.sequence import TaskSequence
from bpnjax.evaluation import mappers, task_inference
from bpnjax.evaluation.mappers import Mapper
from bpnjax.learner import Learner, learner
from bpnjax.methods import REGISTRY, Method
from bpnjax.models import pretrained
from bpnjax.models.registry import said
from bpnjax.networks import Network
from bpnjax.training import schedule
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError

__all__ = ["Experiment", "make_experiment"]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What does not change during a run. The compiled programs take it as a constant.

    Attributes:
      config: the configuration of the run.
      learner: network, method and optimizers.
      epochs: the number of epochs of each task.
      permuted: whether each task sees the input's elements in an order of its own.
      mapper: guesses the task from what it keeps of each task. None if no guess is needed,
        or if the guess comes from the answers alone.
      features: the mapper's input, one of `bpnjax.evaluation.mappers.FEATURES`.
      width: the number of these features.
    """

    config: Any
    learner: Learner
    epochs: tuple[int, ...]
    permuted: bool
    mapper: Mapper | None
    features: str
    width: int

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks."""
        return self.learner.num_tasks

    @property
    def told_task(self) -> bool:
        """Whether answers differ between tasks."""
        return self.learner.told_task

    @property
    def jointly(self) -> bool:
        """Whether the method trains once on the examples of all tasks together."""
        return self.learner.method.trains == "jointly"


def make_network(config: Any, sequence: TaskSequence) -> Network:
    """Makes the network of a run. It takes examples as they are stored.

    Args:
      config: a validated run configuration.
      sequence: what `bpnjax.data.load_sequence` gives for it.

    Returns:
      `Network`; its input is normalised by the sequence's scale and shift.

    Raises:
      UserError: the network does not fit the examples, or weights do not fit the network.
    """
    images, classes = sequence.train.images, sequence.num_classes
    x = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
    factory = models.find(config.model)
    # What others wrote may raise anything.
    raised: Any = ValueError if factory.ours else Exception
    try:
        made = factory(config.model, classes, x.shape[1:], sequence.extractor is not None)
        network = _adapted(made, x)
        params, variables = jax.eval_shape(network.init, prng.key(0))

        def run(params: Any, variables: Any, key: jax.Array, x: Any) -> Any:
            network.apply(params, {}, x, variables=variables, train=True, key=key)
            return network.apply(params, {}, x, variables=variables)[0]

        found = jax.eval_shape(run, params, variables, prng.key(0), x)
    except UserError:
        raise
    except raised as error:  # images too small for it, say
        raise UserError(f"{factory.field}: {factory.name}: {said(error)}") from error
    if getattr(found, "shape", None) != (1, classes):
        shape = jax.tree.map(lambda leaf: leaf.shape, found)
        raise UserError(
            f"{factory.field}: {factory.name}: its output is {shape} for one example; let it be "
            f"{(1, classes)}, [examples, num_classes]"
        )
    if config.model.pretrained:
        network = _starting_from(network, pretrained.load(config.model), classes)
        try:
            jax.eval_shape(network.init, prng.key(0))
        except ValueError as error:
            raise UserError(f"model.pretrained: {error}") from error
    scale, shift = jnp.asarray(sequence.scale), jnp.asarray(sequence.shift)

    def normalise(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) * scale + shift

    return network.with_input(normalise, jax.ShapeDtypeStruct(x.shape, images.dtype))


def _adapted(made: Any, x: jax.ShapeDtypeStruct) -> Network:
    """A network as bpnjax sees it, of what a factory returned."""
    if isinstance(made, Network):
        return made
    if any(base.__module__.startswith("flax.linen") for base in type(made).__mro__):
        return networks.from_linen(made, x)
    nnx = any(base.__module__.startswith("flax.nnx") for base in type(made).__mro__)
    if nnx or inspect.isfunction(made):  # a function of nnx.Rngs
        return networks.from_nnx(made, x)
    raise ValueError(
        f"it returns a {type(made).__name__}; return a Linen module, an NNX module or a "
        "bpnjax.networks.Network"
    )


def _starting_from(network: Network, arrays: dict[str, np.ndarray], num_classes: int) -> Network:
    """The network with pretrained weights in all layers but the last, which gives the classes."""
    last = next(reversed(network.layers), "")
    known = last and network.layers[last].outputs == num_classes
    output = last if known else pretrained.OUTPUT

    def init(key: jax.Array) -> Any:
        params, variables = network.init(key)
        old = variables.get("batch_stats")
        params, new = pretrained.start_from(params, arrays, output, old)
        return params, variables if old is None else {**variables, "batch_stats": new}

    return dataclasses.replace(network, init=init)


def make_experiment(
    config: Any, sequence: TaskSequence, method: Method | None = None
) -> Experiment:
    """Builds network, method and optimizers. It reads shapes only, no data.

    Args:
      config: a validated run configuration.
      sequence: what `bpnjax.data.load_sequence` gives for it.
      method: replaces the method that the configuration names.

    Returns:
      `Experiment`, without arrays but for the normalisation and the classes of the tasks.

    Raises:
      UserError: a pattern for layers matches none, or the method cannot serve this network.

    Example:
      >>> from bpnjax import config, data
      >>> from bpnjax.training.experiment import make_experiment
      >>> settings = config.default()
      >>> settings.dataset.name, settings.sequence.classes = "gaussians", "0,1;0,2"
      >>> settings.model.hidden = (8,)
      >>> experiment = make_experiment(settings, data.load_sequence(settings))
      >>> list(experiment.learner.network.layers), experiment.num_tasks
      (['hidden_0', 'output'], 2)
    """
    method = method or REGISTRY[config.method].from_config(config)
    network = make_network(config, sequence)
    make_optimizer = optim.OPTIMIZERS[config.train.optimizer]
    optimizer = make_optimizer(config.train.learning_rate)
    if config.train.rates:
        rates = optim.layer_rates(optim.parse_rates(config.train.rates))
        optimizer = optax.chain(optimizer, rates)
        params, _ = jax.eval_shape(network.init, prng.key(0))
        try:
            jax.eval_shape(optimizer.init, params)
        except ValueError as error:
            raise UserError(f"train.rates: {error}; fix the pattern") from error
    made = learner(
        network,
        method,
        optimizer,
        sequence.num_tasks,
        classes=sequence.classes,
        heads=config.sequence.heads,
        batch_statistics=config.model.batch_statistics,
        task_optimizer=make_optimizer(method.learning_rate or config.train.learning_rate),
        reset_optimizer=config.train.reset_optimizer,
    )
    jointly = method.trains == "jointly"
    inputs = math.prod(sequence.train.images.shape[1:])
    mapper, features, width = _mapper(config, made, inputs)
    return Experiment(
        config=config,
        learner=made,
        epochs=tuple(schedule.epochs_per_task(config, sequence.num_tasks, jointly)),
        permuted=sequence.permuted,
        mapper=mapper,
        features=features,
        width=width,
    )


def _mapper(config: Any, made: Learner, inputs: int) -> tuple[Mapper | None, str, int]:
    """The mapper that the rule asks for, what it looks at, and how many numbers these are."""
    wanted, rule = config.evaluate, config.evaluate.rule
    if not made.told_task or rule not in task_inference.MAPPERS:
        return None, "", 0
    classes = made.setup.known_classes("evaluate.rule").sum(1).max()
    mapper = mappers.make(rule, wanted.clusters, int(classes))
    features = "input" if rule == "statistics" else wanted.features
    if features != "input":
        return mapper, features, made.width(f"evaluate.features={features}")
    if wanted.statistics > inputs:
        raise UserError(
            f"evaluate.statistics: {wanted.statistics} projections of an input of {inputs} "
            f"numbers; give at most {inputs}"
        )
    return mapper, features, int(wanted.statistics)
