"""Every second class of Tiny ImageNet, for networks of other experiments to start from.

    python -m bpnjax.pretrain --config=configs/tinyimagenet100.py

The set is named `tinyimagenet100` and has to be prepared as a TFDS set: TFDS has none. 100 classes,
220 images each to train and 20 to test, 32 x 32. One task, plain Adam, no augmentation: 0.19 of
the test images are right, after eight minutes on one core. A first try (batches of 128, half of
the hidden units dropped) was at 0.16 after nine epochs.
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "tinyimagenet100"
    config.method = "sgd"
    config.dataset.name = "tinyimagenet100"
    config.dataset.normalize = "imagenet"  # that of the runs that start from it
    config.sequence.num_tasks = 1
    config.sequence.classes_per_task = 100
    config.model.name = "small_alexnet"
    config.model.channels = (32, 64, 96, 64, 64)
    config.model.hidden = (512, 512)
    config.model.kernel_init = "he_normal"
    config.model.dropout = 0.3
    config.train.epochs = 14
    config.train.batch_size = 32
    config.train.learning_rate = 1e-3
    config.evaluate.every_epochs = 1
    config.checkpoint.every_steps = 688  # an epoch
    config.bd.step = "absolute"  # the paper's
    config.bd.epsilon = 0.02
    config.ewc.form = "proximal"
    return config
