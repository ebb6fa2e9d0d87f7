"""Fine-tuning: each task starts from the last one's parameters, and nothing is protected."""

from bpnjax.methods.base import Method
from bpnjax.methods.settings import register


@register("sgd", paper="the lower bound")
def sgd() -> Method:
    """Plain fine-tuning with the learner's optimizer."""
    return Method()
