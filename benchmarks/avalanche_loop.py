"""The same networks under Avalanche's strategies, as its examples use them, without its loggers."""

import itertools
import os
import time

import numpy as np

STRATEGIES = {"sgd": "Naive", "ewc": "EWC", "si": "SynapticIntelligence"}


def make_burst(shape, hidden, outputs, method: str, batch: int, steps: int):
    """An epoch of the second of two experiences with Adam, on random images kept in memory.

    Args:
      shape: of an image.
      hidden: widths.
      outputs: of the network.
      method: sgd, ewc or si.
      batch: examples in a step.
      steps: in one burst.

    Returns:
      A function that runs them and gives the seconds of one; None where Avalanche is not installed.
    """
    try:
        import torch
        from avalanche.benchmarks import benchmark_from_datasets
        from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
        from avalanche.training import supervised
        from avalanche.training.plugins import EvaluationPlugin
    except ImportError:
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    widths = (int(np.prod(shape)), *hidden, outputs)
    layers = [torch.nn.Flatten()]
    for a, b in itertools.pairwise(widths):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])

    def experience(task):
        images = torch.randn(batch * steps, widths[0])
        labels = torch.randint(0, 2, (batch * steps,)) + 2 * task
        return AvalancheDataset(
            torch.utils.data.TensorDataset(images, labels),
            data_attributes=[
                DataAttribute(labels.tolist(), "targets"),
                DataAttribute([0] * len(labels), "targets_task_labels", use_in_getitem=True),
            ],
        )

    data = [experience(task) for task in range(2)]
    stream = benchmark_from_datasets(train=data, test=data).train_stream
    # Online EWC, since the other keeps a Fisher more for each time that a burst is run.
    online = {"ewc_lambda": 1000.0, "mode": "online", "decay_factor": 1.0}
    strength = {"ewc": online, "si": {"si_lambda": 0.1}}.get(method, {})
    strategy = getattr(supervised, STRATEGIES[method])(
        model=model, optimizer=torch.optim.Adam(model.parameters(), lr=1e-4),
        criterion=torch.nn.CrossEntropyLoss(), train_mb_size=batch, train_epochs=1,
        evaluator=EvaluationPlugin(), **strength,
    )  # fmt: skip
    strategy.train(stream[0])
    seconds = []

    class Watch:
        """Times the loop over batches alone, not the Fisher at a task's end or the loading."""

        def before_training_epoch(self, *_args, **_more):
            self.started = time.perf_counter()

        def after_training_epoch(self, *_args, **_more):
            seconds.append(time.perf_counter() - self.started)

    strategy.plugins.append(Watch())

    def burst() -> float:
        strategy.train(stream[1])
        return seconds[-1] / steps

    return burst
