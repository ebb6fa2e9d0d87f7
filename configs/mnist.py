"""Incremental MNIST: 5 tasks of 2 digits, one output layer over all 10 (paper Fig. 6a, Table I).

python -m bpnjax.main --config=configs/mnist.py
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "mnist"
    config.dataset.name = "mnist"
    return config
