"""Online Split CIFAR-10: ResNet-18, one pass over each task, 5 tasks of 2 classes, batches of 10.

    python -m bpnjax.main --config=configs/online_cifar10.py --config.method=er

The setting of ER-ACE (arXiv 2104.05025) and of Mai et al. (arXiv 2101.10423), without augmentation;
the replay methods keep 1,000 examples and draw as many as the batch has. The network has width 8
instead of their 20, so that it can be run on a CPU; --config.model.options="width=20" is theirs.
Settings of each method, how they were chosen, and what was measured: `bpnjax/paper/online.py` and
docs/paper/online/online.md.
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "online_cifar10"
    config.dataset.name = "cifar10"
    config.sequence.num_tasks = 5
    config.sequence.classes_per_task = 2
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
