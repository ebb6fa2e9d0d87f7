"""A hundred classes of Tiny ImageNet in ten steps of ten on pretrained features, task not told.

    pip install "bpnjax[pretrained]"
    python -m bpnjax.main --config=configs/tinyimagenet_b0_inc10.py --config.method=slda

As `configs/cifar100_b0_inc10.py`, which see. The backbone was trained on ImageNet, from which these
classes are: its features know them, and accuracies say less about learning than those of CIFAR-100.
The set is named `tinyimagenet100` and has to be prepared as a TFDS set: TFDS has none.
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "tinyimagenet_b0_inc10"
    config.method = "ranpac"
    config.dataset.name = "tinyimagenet100"
    config.dataset.resize = (96, 96, 3)
    config.dataset.normalize = "symmetric"
    config.sequence.num_tasks = 10
    config.sequence.classes_per_task = 10
    config.sequence.order_seed = 1993
    config.model.name = "efficientnet_lite0"
    config.model.options = "folded=True"
    config.model.pretrained = "package"
    config.train.rates = "(?!output).*=0"
    config.train.features_once = True
    config.train.epochs = 5
    config.train.batch_size = 64
    config.train.learning_rate = 1e-3
    config.replay.memory_size = 2000
    config.bd.layers = "output"
    config.psp.layers = "output"
    config.evaluate.rule = "mahalanobis"
    return config
