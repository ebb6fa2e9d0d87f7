"""Three Gaussian clusters in the plane: black or red, then black or light blue (paper Fig. 5).

    python -m bpnjax.main --config=configs/toy.py --config.method=bd_ewc

The paper gives neither clusters nor network; ours are in `bpnjax/data/builtin_sets.py`. Measured,
three seeds, task 1 after task 2 (task_told): sgd 0.739 ± 0.209, gd_ewc 0.999, bd_ewc 0.999: GD+EWC,
which the paper shows forgetting, does not forget here. Seconds.
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "toy"
    config.dataset.name = "gaussians"
    config.sequence.classes = "0,1;0,2"
    config.sequence.num_tasks = 2
    config.model.hidden = (50, 50)
    config.train.epochs = 20
    config.train.batch_size = 50
    config.bd.step = "absolute"  # the paper's
    config.bd.epsilon = 0.02
    config.ewc.form = "proximal"
    return config
