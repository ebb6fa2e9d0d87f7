"""Incremental CIFAR-100: 10 tasks of 2 classes, the first 20 of 100 (paper Fig. 6c, Table I).

python -m bpnjax.main --config=configs/cifar100.py --config.method=bd_psp
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "cifar100"
    config.dataset.name = "cifar100"
    config.sequence.num_tasks = 10
    config.train.epochs = 10
    config.train.batch_size = 64
    config.train.learning_rate = 5e-5
    config.bd.learning_rate = 1e-3
    config.paper.bd_ewc = {"first_task_accuracy": 0.845, "bytes_per_task": 4808}
    config.paper.bd_psp = {"first_task_accuracy": 0.85, "bytes_per_task": 20776}
    config.paper.psp = {"first_task_accuracy": 0.83, "bytes_per_task": 15968}
    config.paper.ewc = {"first_task_accuracy": 0.0}
    config.paper.stl = {"first_task_accuracy": 0.86}
    return config
