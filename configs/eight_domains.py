"""Eight small domains in sequence, each with an output layer of its own: Table II on any machine.

    python -m bpnjax.pretrain --config=configs/tinyimagenet100.py
    python -m bpnjax.main --config=configs/eight_domains.py
    python -m bpnjax.paper --artefact=table2 --sequence=eight_domains

The experiment of `configs/eight_tasks.py` on images of 32 x 32: digits, objects, traffic signs,
letters, faces, flowers, objects again, signs of hands. The network has AlexNet's order of layers
and starts from one that `bpnjax.pretrain` trained on Tiny ImageNet. Its convolutions are frozen,
for all methods alike, and run once (`train.features_once`); fc6, fc7 and the heads learn. MNIST,
CIFAR-10, GTSRB and FER2013 are cut to 4,000 training images, about what the others have.

The settings under `tuned` were chosen for each method on held-out training images, in equally many
trials: docs/REPRODUCTION.md.

All but MNIST and CIFAR-10 have to be prepared as TFDS sets under these names: TFDS has none.
"""

from bpnjax.config import default

SETS = {
    "mnist": "train[:4000]",
    "cifar10": "train[:4000]",
    "gtsrb": "train[:4000]",
    "chars74k": "train",
    "fer2013": "train[:4000]",
    "flowers5": "train",
    "caltech101_64": "train",
    "signdigits": "train",
}


def get_config():
    config = default()
    config.name = "eight_domains"
    config.method = "bd_psp"
    config.dataset.name = ",".join(SETS)
    config.dataset.train_split = ",".join(SETS.values())
    config.dataset.resize = (32, 32, 3)
    config.dataset.normalize = "imagenet"
    config.sequence.kind = "datasets"
    config.sequence.num_tasks = len(SETS)
    config.sequence.heads = "multi"
    config.model.name = "small_alexnet"
    config.model.channels = (32, 64, 96, 64, 64)
    config.model.hidden = (512, 512)
    config.model.dropout = 0.3
    config.model.kernel_init = "he_normal"
    config.model.pretrained = "runs/tinyimagenet100/sgd/model.safetensors"
    config.train.epochs = 10
    config.train.batch_size = 64
    config.train.rates = "conv_.*=0"
    config.train.features_once = True
    config.train.learning_rate = 3e-4
    config.bd.step = "absolute"  # the paper's
    config.bd.epsilon = 0.02
    config.ewc.form = "proximal"
    config.bd.layers = "fc6|fc7|output"
    config.psp.layers = "fc6|fc7|output"
    config.ebll.layer = "fc7"  # what enters fc6 is fixed, there is nothing to keep
    config.evaluate.inferred_rows = "last"
    config.tuned = {
        "stl": {"train": {"learning_rate": 0.002}},
        "joint": {"train": {"learning_rate": 0.001}},
        "sgd": {"train": {"learning_rate": 0.001}},
        "imm_mean": {"train": {"learning_rate": 0.002}, "imm": {"l2": 0.001}},
        "imm_mode": {"train": {"learning_rate": 0.002}, "imm": {"l2": 0.001}},
        "lwf": {"train": {"learning_rate": 0.001}, "lwf": {"strength": 10.0}},
        "ewc": {"train": {"learning_rate": 0.002}, "ewc": {"strength": 300.0}},
        "ebll": {
            "train": {"learning_rate": 0.001},
            "lwf": {"strength": 10.0},
            "ebll": {"layer": "fc7", "strength": 0.1, "reconstruction": 0.01},
        },
        "si": {"train": {"learning_rate": 0.002}, "si": {"strength": 1.0}},
        "mas": {"train": {"learning_rate": 0.002}, "mas": {"strength": 0.03}},
        "slnid": {
            "train": {"learning_rate": 0.002},
            "slnid": {"strength": 0.0001, "anchor_strength": 0.03},
        },
        "psp": {"train": {"learning_rate": 0.0007}},
        "bd_ewc": {
            "train": {"learning_rate": 0.002},
            "ewc": {"strength": 300.0},
            "bd": {"epsilon": 0.02, "learning_rate": 0.003},
        },
        "bd_psp": {
            "train": {"learning_rate": 0.0008},
            "bd": {"epsilon": 0.005, "learning_rate": 0.0003},
        },
        "gd_ewc": {
            "train": {"learning_rate": 0.002},
            "ewc": {"strength": 300.0},
            "bd": {"learning_rate": 0.003},
        },
        "bias_ewc": {
            "train": {"learning_rate": 0.002},
            "ewc": {"strength": 300.0},
            "plain_bias": {"learning_rate": 0.003},
        },
    }
    return config
