"""PSP on 50 permuted MNIST tasks (Cheung et al. 2019, arXiv 1902.05522).

    python -m bpnjax.main --config=configs/published/psp.py

and with --config.seed=1 and 2; --config.method=sgd is the network without keys.

Original (briancheung/superposition, PermutingMNISTBinaryHash256): 3 hidden layers of 256, 1,000
steps per task in batches of 128, RMSprop at 1e-4 whose state goes on from task to task, Xavier
normal initialisation, the first task not permuted, pixels with zero mean and unit deviation.
Kept, with 2 epochs (938 steps) per task. Ours is the binary variant with fixed keys and with each
layer's bias; the released code trains the keys and never adds the bias. Our RMSprop averages with
0.9, theirs with 0.99.

Published: 0.976 against 0.618 for the standard network, as a secondary note gives it for 50 tasks
and 256 units, without the variant or the measure. Ours, 3 seeds, average over the 50 tasks: 0.825
+- 0.002 (0.828, 0.825, 0.823); task 1 after all: 0.640 +- 0.051; standard network, one seed:
0.261, task 1 0.096. 146 to 198 s per seed on one core.

The two published figures do not belong to 50 tasks on this network. What was run to find out, one
seed each:

    1 task alone                         0.957     already below 0.976
    10 tasks, average                    0.945     standard network 0.660
    50 tasks, average                    0.828     standard network 0.261
    50 tasks, 3 x 128, task 1            0.449     average 0.707

With 128 units the BPN paper reads from the PSP paper's figure that 0.95 fall to 0.50 over 50
tasks (and 0.96 to 0.90 with 2,048), as an average over tasks; the released code logs the accuracy
of task 1. Ours fits the latter: task 1 ends at 0.449 with 128 units and at 0.640 with 256.

0.618 is near our 0.660 for 10 tasks and far from 0.261 for 50. Hence probably: 0.976 and 0.618
are averages over 10 tasks, on a network that is larger or trained longer.
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "published_psp"
    config.method = "psp"
    config.dataset.name = "mnist"
    config.dataset.normalize = "standard"
    config.sequence.kind = "permuted"
    config.sequence.num_tasks = 50
    config.model.hidden = (256, 256, 256)
    config.model.kernel_init = "glorot_normal"
    config.train.epochs = 2
    config.train.batch_size = 128
    config.train.optimizer = "rmsprop"
    config.train.learning_rate = 1e-4
    config.train.reset_optimizer = False
    config.evaluate.every_tasks = 50
    config.evaluate.inferred_rows = "last"
    config.evaluate.inferred_examples = 100
    config.checkpoint.every_tasks = 50
    return config
