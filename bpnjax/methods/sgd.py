"""Fine-tuning: each task is trained from the last one's parameters and nothing is protected."""

from bpnjax.methods.base import Method

SGD = Method(name="sgd", paper="the lower bound")
