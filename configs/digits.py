"""Five tasks of two digits each on scikit-learn's 8x8 digits: embedded, no download.

    python -m bpnjax.main --config=configs/digits.py

Not in the paper. Measured, one seed, defaults not searched: bd_ewc averages 0.99 (task_told) after
five tasks; 14 seconds on 2 CPU cores, most of it compiling.
"""

from bpnjax.config import default


def get_config():
    config = default()
    config.name = "digits"
    config.dataset.name = "digits"
    config.model.hidden = (100, 100, 100)
    config.train.epochs = 20
    config.train.batch_size = 32
    return config
