"""Incremental MNIST: 5 tasks of 2 digits, one output layer over all 10 (paper Fig. 6a, Table I).

python -m bpnjax.main --config=configs/mnist.py
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "mnist"
    config.dataset.name = "mnist"
    config.bd.epsilon = 0.2
    config.paper.bd_ewc = {"first_task_accuracy": 0.98, "bytes_per_task": 4808}
    config.paper.ewc = {"first_task_accuracy": 0.0}
    config.paper.gd_ewc = {"first_task_accuracy": 0.0}
    config.paper.stl = {"first_task_accuracy": 0.99}
    return config
