"""Online Split CIFAR-100: ResNet-18, one pass over each task, 10 tasks of 10 classes.

    python -m bpnjax.main --config=configs/online_cifar100.py --config.method=er

As `configs/online_cifar10.py`, in the setting of SCR (arXiv 2103.13885). What was measured:
docs/paper/online/online.md.
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "online_cifar100"
    config.dataset.name = "cifar100"
    config.sequence.num_tasks = 10
    config.sequence.classes_per_task = 10
    config.model.name = "resnet18"
    config.model.options = "width=8"
    config.model.kernel_init = "he_normal"
    config.model.batch_statistics = "shared"
    config.train.epochs = 1
    config.train.batch_size = 10
    config.train.optimizer = "sgd"
    config.train.learning_rate = 0.1
    config.replay.memory_size = 1000
    config.replay.batch_size = 10
    config.ewc.examples = 1000
    config.bd.step = "absolute"  # the paper's
    config.bd.epsilon = 0.02
    config.ewc.form = "proximal"
    return config
