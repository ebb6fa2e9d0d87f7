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
    config.train.learning_rate = 1e-4
    return config
