"""A-GEM on 17 permuted MNIST tasks (Chaudhry et al. 2019, arXiv 1812.00420).

    python -m bpnjax.main --config=configs/published/agem.py

and with --config.seed=1 and 2.

Original (facebookresearch/agem): 784-256-256-10, all tasks permuted, pixels / 255, SGD at 0.1,
one pass in batches of 10 over the 55,000 examples of the TensorFlow tutorial's training split, 25
memories of each class and task, 256 of them in the reference gradient, 17 tasks after 3 for the
choice of hyper-parameters. All of it is kept, with 55,000 of the 60,000 examples drawn for each
task.

Published average over the tasks after the last: 0.891 (0.8912, printed by the authors' plotting
notebook; GEM 0.8958 there). Ours, 3 seeds: 0.904 +- 0.004 (0.899, 0.907, 0.905), 499 to 838 s a
seed on one core that was shared.

Two other protocols go by the same name. The authors' script was later given a limit of 1,000
examples per task by default, for their paper on tiny memories (1902.10486); with
--config.sequence.examples_per_task=1000 --config.num_seeds=3 ours has 0.705 +- 0.011 (39 s). And
ContinualAI/continual-learning-baselines lists 0.81 as the paper's figure and as its own result,
with 60,000 examples and 250 memories per task; the authors' notebook does not support that figure.

What deviates: the weights start Glorot uniform; the memory is filled when a task ends, with the
last 25 examples of each class.
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "published_agem"
    config.method = "agem"
    config.dataset.name = "mnist"
    config.dataset.normalize = "unit"
    config.sequence.kind = "permuted"
    config.sequence.num_tasks = 17
    config.sequence.examples_per_task = 55000
    config.sequence.first_identity = False
    config.model.hidden = (256, 256)
    config.model.kernel_init = "glorot_uniform"
    config.train.epochs = 1
    config.train.batch_size = 10
    config.train.optimizer = "sgd"
    config.train.learning_rate = 0.1
    config.gem.memories = 25
    config.gem.per = "class"
    config.gem.batch_size = 256
    config.evaluate.every_tasks = 17
    config.evaluate.inferred_rows = "last"
    config.checkpoint.every_tasks = 17
    config.paper.agem = {"average_accuracy": 0.891}
    return config
