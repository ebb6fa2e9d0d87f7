"""CIFAR-100 in ten steps of ten classes on pretrained features, and nobody tells the task.

    pip install "bpnjax[pretrained]"
    python -m bpnjax.main --config=configs/cifar100_b0_inc10.py --config.method=ranpac

The protocol that the class-incremental literature calls B0 Inc10: all 100 classes in ten tasks of
ten, in an order drawn with the seed 1993 (not the literature's, whose generator is another one).
EfficientNet-Lite0 with its weights of ImageNet sees the images at 96 x 96, once for each image
(`train.features_once`): 1,280 features, on which the output layer learns. Of the result read
`average_incremental_accuracy` and `last_accuracy`, both without the task.
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "cifar100_b0_inc10"
    config.method = "ranpac"
    config.dataset.name = "cifar100"
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
