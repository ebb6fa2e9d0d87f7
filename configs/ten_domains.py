"""Ten small domains in sequence on a frozen ImageNet network: tasks that can be shared as packs.

    pip install "bpnjax[pretrained]"
    python -m bpnjax.main --config=configs/ten_domains.py
    python -m bpnjax.main --config=configs/ten_domains.py --config.method=bias_frozen

Each task is a set with an output layer of its own. EfficientNet-Lite0 with its weights of ImageNet
sees the images at 96 x 96, once for each image (`train.features_once`), and never learns; a task
learns the columns of the output layer for its classes and a bias (SKILL, arXiv 2305.15591, whose
network and tasks are larger). The task is guessed from the features by `evaluate.rule`. Sets of
more than 4,000 training images are cut to that, but the two of 100 classes, which keep 5,000.

Tiny ImageNet and Caltech-101 have classes in common with ImageNet, so that the backbone knows them:
leave them out of an average over tasks.

All but MNIST and the two CIFAR sets have to be prepared as TFDS sets under these names: TFDS has
none.
"""

from bpnjax.config import default

# Name and split, and the number of classes.
SETS = {
    "mnist": ("train[:4000]", 10),
    "cifar10": ("train[:4000]", 10),
    "cifar100": ("train[:5000]", 100),
    "gtsrb": ("train[:4000]", 43),
    "chars74k": ("train[:4000]", 36),
    "fer2013": ("train[:4000]", 7),
    "flowers5": ("train", 5),
    "signdigits": ("train", 10),
    "caltech101_64": ("train[:4000]", 96),
    "tinyimagenet100": ("train[:5000]", 100),
}
SEEN_BY_THE_BACKBONE = ("caltech101_64", "tinyimagenet100")


def get_config():
    config = default()
    config.name = "ten_domains"
    config.method = "bd_frozen"
    config.dataset.name = ",".join(SETS)
    config.dataset.train_split = ",".join(split for split, _ in SETS.values())
    config.dataset.resize = (96, 96, 3)
    config.dataset.normalize = "symmetric"
    config.sequence.kind = "datasets"
    config.sequence.num_tasks = len(SETS)
    config.sequence.heads = "multi"
    config.model.name = "efficientnet_lite0"
    config.model.options = "folded=True"
    config.model.pretrained = "package"
    config.train.rates = "(?!output).*=0"
    config.train.features_once = True
    config.train.epochs = 10
    config.train.batch_size = 64
    config.train.learning_rate = 1e-3
    config.bd.layers = "output"
    config.psp.layers = "output"
    config.evaluate.rule = "mahalanobis"
    config.evaluate.inferred_rows = "last"
    return config
