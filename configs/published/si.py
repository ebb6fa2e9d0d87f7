"""SI on 10 permuted MNIST tasks (Zenke et al. 2017, arXiv 1703.04200).

    python -m bpnjax.main --config=configs/published/si.py

and with --config.seed=1 and 2.

Original (ganguli-lab/pathint): 784-2000-2000-10, Adam at 1e-3 whose state goes on from task to
task, batches of 256, 20 epochs per task, strength 0.1, damping 0.1, the running sum clamped. Kept
but for the epochs, of which ours has 1, and the strength, which that changes.

Published average over the tasks: 0.969 (the data shipped with the authors' code). Ours, 3 seeds:
0.949 +- 0.004 (0.944, 0.953, 0.949), 354 to 484 s per seed on one core that was shared.

Why the strength is not the original's: the path integral grows with every step, since the noise
of a batch's gradient is part of it, so few steps make a weak anchor. With 1 epoch and strength
0.1 task 1 is at 0.801 after the second task alone. On a tenth of the training set held out, one
seed, 5 tasks, average / task 1 / last task:

    2 x 2000, 1 epoch,  strength 1     0.861 / 0.611 / 0.966
    2 x 2000, 1 epoch,  strength 5     0.922 / 0.800 / 0.963
    2 x 2000, 1 epoch,  strength 20    0.958 / 0.944 / 0.955   <- taken
    2 x 400,  1 epoch,  strength 1     0.852 / 0.647 / 0.958
    2 x 400,  5 epochs, strength 1     0.961 / 0.934 / 0.968

So with five times the steps the same strength protects. The 0.020 that are missing are put down
to the single epoch; the original's 20 were not run (over an hour a seed here).

What deviates further: weights start Glorot uniform; the anchor's pull is in its proximal form.
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "published_si"
    config.method = "si"
    config.dataset.name = "mnist"
    config.dataset.normalize = "unit"
    config.sequence.kind = "permuted"
    config.sequence.num_tasks = 10
    config.model.hidden = (2000, 2000)
    config.model.kernel_init = "glorot_uniform"
    config.train.epochs = 1
    config.train.batch_size = 256
    config.train.optimizer = "adam"
    config.train.learning_rate = 1e-3
    config.train.reset_optimizer = False
    config.si.strength = 20.0
    config.si.damping = 0.1
    config.evaluate.every_tasks = 10
    config.evaluate.inferred_rows = "last"
    config.checkpoint.every_tasks = 10
    config.paper.si = {"average_accuracy": 0.969}
    return config
