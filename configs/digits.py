"""Five tasks of two digits each on scikit-learn's 8x8 digits: embedded, no download.

python -m bpnjax.main --config=configs/digits.py
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
