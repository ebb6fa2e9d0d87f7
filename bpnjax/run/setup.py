"""The static side of a run: which network, method and optimizers, and how large everything is."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bpnjax import models, optim
from bpnjax.data.sequence import TaskSequence
from bpnjax.methods import REGISTRY, Method, Spec
from bpnjax.models import pretrained
from bpnjax.networks import linen
from bpnjax.training import schedule
from bpnjax.utils.errors import UserError


class Problem(NamedTuple):
    """The static side of a run: network, method, optimizers, sizes.

    Holds no arrays of training; the functions here are closed over it before they are compiled.
    """

    config: Any
    method: Method
    model: Any
    spec: Spec
    core_optimizer: optax.GradientTransformation
    learned_optimizer: optax.GradientTransformation
    num_tasks: int
    epochs: list[int]  # of each task
    permuted: bool
    input_layer: str  # "" where pixels are permuted in the input instead of the first kernel
    statistics: int = 0  # projections of the input of which they are kept; 0 for none


def make_problem(config, sequence: TaskSequence) -> Problem:
    """Builds network, method and optimizers; touches shapes only, no data.

    Args:
      config: a validated run configuration.
      sequence: what `bpnjax.data.load_sequence` gives for it.

    Returns:
      `Problem`, without arrays but for the classes of the tasks.

    Raises:
      UserError: a pattern for layers matches none, or the method cannot serve this network.

    Example:
      >>> from bpnjax import config, data
      >>> from bpnjax.run.setup import make_problem
      >>> settings = config.default()
      >>> settings.dataset.name, settings.sequence.classes = "gaussians", "0,1;0,2"
      >>> settings.model.hidden = (8,)
      >>> problem = make_problem(settings, data.load_sequence(settings))
      >>> list(problem.spec.layers), problem.num_tasks
      (['hidden_0', 'output'], 2)
    """
    method = REGISTRY[config.method]
    model = models.build(config.model, sequence.num_classes)
    x = jax.ShapeDtypeStruct((1, *sequence.train.images.shape[1:]), jnp.float32)

    arrays = {}  # of a network that this one starts from; AlexNet reads torchvision's by itself
    file = config.model.pretrained

    def init(key):
        params = model.init(key, jnp.zeros(x.shape, x.dtype))["params"]
        return pretrained.start_from(params, arrays) if arrays else params

    try:
        if file and (config.model.name != "alexnet" or pretrained.is_ours(file)):
            arrays = pretrained.read(file)
    except ValueError as error:
        raise UserError(f"model.pretrained: {error}") from error
    try:
        core = jax.eval_shape(init, jax.random.key(0))
    except ValueError as error:  # pictures too small for it, or weights of another network
        raise UserError(f"model.name: {config.model.name}: {error}") from error
    layers = linen.find_layers(model, core, x)
    for field in method.layer_fields:
        try:
            linen.matching(layers, config[field].layers)
        except ValueError as error:
            raise UserError(f"{field}.layers: {error}; mend the pattern") from error
    epochs = schedule.epochs_per_task(config, sequence.num_tasks, method.joint)
    spec = Spec(sequence.num_tasks, sequence.classes, layers, init, config)
    method.check(spec)
    optimizer = optim.OPTIMIZERS[config.train.optimizer]
    core_optimizer = optimizer(config.train.learning_rate)
    if config.train.rates:
        rates = optim.layer_rates(optim.parse_rates(config.train.rates))
        core_optimizer = optax.chain(core_optimizer, rates)
        try:
            jax.eval_shape(core_optimizer.init, core)
        except ValueError as error:
            raise UserError(f"train.rates: {error}; mend the pattern") from error

    def of_task(rate):
        # What follows its gradient slows down with the shared parameters. M does not: its step is
        # epsilon, no learning rate.
        own = optimizer(rate)
        return schedule.following(own) if config.train.rate_drops else own

    return Problem(
        config=config,
        method=method,
        model=model,
        spec=spec,
        core_optimizer=core_optimizer,
        learned_optimizer=optim.partition_by_path(method.rules(config, of_task)),
        num_tasks=sequence.num_tasks,
        epochs=epochs,
        permuted=sequence.permuted,
        input_layer=getattr(model, "input_layer", ""),
        statistics=_projections(config, method, math.prod(x.shape)),
    )


def _projections(config, method: Method, inputs: int) -> int:
    """How many projections the statistics are of; 0 where nobody asks which task it is."""
    wanted = config.evaluate.statistics if config.evaluate.rule == "statistics" else 0
    if not method.told_task:
        return 0
    if wanted > inputs:
        raise UserError(
            f"evaluate.statistics: {wanted} projections of an input of {inputs} numbers; give at "
            f"most {inputs}"
        )
    return wanted
