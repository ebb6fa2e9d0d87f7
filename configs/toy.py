"""Three Gaussian clusters in the plane: black or red, then black or light blue (paper Fig. 5).

python -m bpnjax.main --config=configs/toy.py
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
    return config
