"""Incremental CIFAR-10: 5 tasks of 2 classes (paper Fig. 6b, Table I).

python -m bpnjax.main --config=configs/cifar10.py
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "cifar10"
    config.dataset.name = "cifar10"
    config.train.epochs = 4
    config.train.learning_rate = 1e-4
    config.bd.learning_rate = 1e-3
    config.paper.bd_ewc = {"first_task_accuracy": 0.795, "bytes_per_task": 4808}
    config.paper.ewc = {"first_task_accuracy": 0.0}
    config.paper.gd_ewc = {"first_task_accuracy": 0.0}
    config.paper.stl = {"first_task_accuracy": 0.83}
    return config
