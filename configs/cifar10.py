"""Incremental CIFAR-10: 5 tasks of 2 classes (paper Fig. 6b, Table I).

python -m bpnjax.main --config=configs/cifar10.py
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "cifar10"
    config.dataset.name = "cifar10"
    return config
