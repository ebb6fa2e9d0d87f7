"""What hooks may ask about examples of the sequence: answered by the plain network."""

import jax.numpy as jnp
import optax

from bpnjax.methods import Examples
from bpnjax.networks import linen
from bpnjax.training.task_data import Data, make_view


def make_examples(problem, key, data: Data) -> Examples:
    """Binds network and training set of a run to the functions of `Examples`.

    Each call runs the plain network anew, without mode, dropout or a task's factors, on the pixels
    as the example's own task sees them.

    Args:
      problem: the static side of a run.
      key: the seed's typed PRNG key.
      data: the sequence.

    Returns:
      `Examples`; slots of all tasks may be mixed.
    """
    view, split = make_view(problem, key, data, None), data.train

    def labels(slots):
        return view.labels(split, slots)

    def inputs(slots):
        return view.examples(split, slots)[0]

    def logits(core, slots):
        out = linen.modulated_apply(problem.model, core, {}, inputs(slots))
        return out.astype(jnp.float32)

    def cross_entropy(logits, slots):
        logits = view.within_head(split, slots, logits)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels(slots))

    def losses(core, slots):
        return cross_entropy(logits(core, slots), slots)

    def features(core, slots, paths):
        found = linen.layer_inputs(problem.model, core, {}, inputs(slots), paths)
        return {path: feature.astype(jnp.float32) for path, feature in found.items()}

    def losses_from(core, slots, path, features):
        out = linen.apply_from(problem.model, core, {}, inputs(slots), path, features)
        return cross_entropy(out.astype(jnp.float32), slots)

    return Examples(labels, logits, losses, features, losses_from)
