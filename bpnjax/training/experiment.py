"""The static side of a run: learner, sizes and options, made of a configuration and a sequence."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bpnjax import models, networks, optim
from bpnjax.data.sequence import TaskSequence
from bpnjax.learner import Learner, learner
from bpnjax.methods import REGISTRY
from bpnjax.models import pretrained
from bpnjax.networks import Network
from bpnjax.training import schedule
from bpnjax.utils.errors import UserError

__all__ = ["Experiment", "make_experiment"]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What does not change during a run; the programs of training are closed over it.

    Attributes:
      config: of the run.
      learner: network, method and optimizers.
      epochs: of each task.
      permuted: whether each task sees the input's elements in an order of its own.
      statistics: how many projections of the input the statistics of `bpnjax.evaluation.
        task_inference` are of; 0 where nobody asks which task it is.
    """

    config: Any
    learner: Learner
    epochs: tuple[int, ...]
    permuted: bool
    statistics: int

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
        """Whether the method trains once, on the examples of all tasks."""
        return self.learner.method.trains == "jointly"


def make_network(config: Any, sequence: TaskSequence) -> Network:
    """The network of a run, which takes examples as they are stored.

    Args:
      config: a validated run configuration.
      sequence: what `bpnjax.data.load_sequence` gives for it.

    Returns:
      `Network`; its input is normalised by the sequence's scale and shift.

    Raises:
      UserError: the network does not fit the examples, or weights do not fit the network.
    """
    images = sequence.train.images
    shape = (1, *images.shape[1:])
    arrays: dict[str, np.ndarray] = {}
    file = config.model.pretrained
    try:
        # AlexNet reads the weights of torchvision by itself.
        if file and (config.model.name != "alexnet" or pretrained.is_ours(file)):
            arrays = pretrained.read(file)
    except ValueError as error:
        raise UserError(f"model.pretrained: {error}") from error
    module = models.build(config.model, sequence.num_classes)
    try:
        network = networks.from_linen(module, jax.ShapeDtypeStruct(shape, jnp.float32))
        if arrays:
            network = _starting_from(network, arrays)
            jax.eval_shape(network.init, jax.random.key(0))
    except ValueError as error:  # images too small for it, or weights of another network
        raise UserError(f"model.name: {config.model.name}: {error}") from error
    scale, shift = jnp.asarray(sequence.scale), jnp.asarray(sequence.shift)

    def normalise(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) * scale + shift

    return network.with_input(normalise, jax.ShapeDtypeStruct(shape, images.dtype))


def _starting_from(network: Network, arrays: dict[str, np.ndarray]) -> Network:
    def init(key: jax.Array) -> Any:
        params, variables = network.init(key)
        return pretrained.start_from(params, arrays), variables

    return dataclasses.replace(network, init=init)


def make_experiment(config: Any, sequence: TaskSequence) -> Experiment:
    """Builds network, method and optimizers; touches shapes only, no data.

    Args:
      config: a validated run configuration.
      sequence: what `bpnjax.data.load_sequence` gives for it.

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
    method = REGISTRY[config.method].from_config(config)
    network = make_network(config, sequence)
    make_optimizer = optim.OPTIMIZERS[config.train.optimizer]
    optimizer = make_optimizer(config.train.learning_rate)
    if config.train.rates:
        rates = optim.layer_rates(optim.parse_rates(config.train.rates))
        optimizer = optax.chain(optimizer, rates)
        params, _ = jax.eval_shape(network.init, jax.random.key(0))
        try:
            jax.eval_shape(optimizer.init, params)
        except ValueError as error:
            raise UserError(f"train.rates: {error}; mend the pattern") from error
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
    return Experiment(
        config=config,
        learner=made,
        epochs=tuple(schedule.epochs_per_task(config, sequence.num_tasks, jointly)),
        permuted=sequence.permuted,
        statistics=_projections(config, made.told_task, inputs),
    )


def _projections(config: Any, told_task: bool, inputs: int) -> int:
    """How many projections the statistics are of; 0 where nobody asks which task it is."""
    wanted = config.evaluate.statistics if config.evaluate.rule == "statistics" else 0
    if not told_task:
        return 0
    if wanted > inputs:
        raise UserError(
            f"evaluate.statistics: {wanted} projections of an input of {inputs} numbers; give at "
            f"most {inputs}"
        )
    return int(wanted)
