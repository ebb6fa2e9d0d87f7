"""Reference implementations of the methods: NumPy, double precision, one example at a time.

They share no code with the package and were written from the papers' formulas. The network is a
perceptron with one hidden layer of ReLU units, its derivatives are written by hand, and wherever a
formula speaks of an example there is a loop over examples. Nothing here is fast or general.

All shared parameters lie in one vector ``theta``, so that a formula "for each parameter j" is one
line of NumPy. `Network.unpack` gives views of its parts.
"""

import dataclasses
import itertools

import numpy as np

HIDDEN, OUTPUT = "hidden_0", "output"
LAYERS = (HIDDEN, OUTPUT)
FAR_BELOW = -1e9


@dataclasses.dataclass
class Mode:
    """What a task adds to the layers: ``y = W (x * key) + b + bias``."""

    key: dict = dataclasses.field(default_factory=dict)
    bias: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Gradients:
    """Derivatives of one number that depends on the outputs for one example."""

    theta: np.ndarray
    hidden: np.ndarray  # for the hidden layer's output before its ReLU
    output: np.ndarray  # for the outputs


class Network:
    """A perceptron with one hidden layer; ``theta`` holds both kernels and both biases."""

    def __init__(self, inputs, hidden, outputs):
        self.shapes = {
            (HIDDEN, "kernel"): (inputs, hidden),
            (HIDDEN, "bias"): (hidden,),
            (OUTPUT, "kernel"): (hidden, outputs),
            (OUTPUT, "bias"): (outputs,),
        }
        self.widths = {HIDDEN: hidden, OUTPUT: outputs}
        self.outputs = outputs
        self.size = sum(int(np.prod(shape)) for shape in self.shapes.values())

    def pack(self, tree):
        """Turns ``{"hidden_0": {"kernel", "bias"}, "output": {...}}`` into a vector."""
        return np.concatenate(
            [np.asarray(tree[layer][leaf], np.float64).ravel() for layer, leaf in self.shapes]
        )

    def unpack(self, theta):
        """Returns ``{(layer, leaf): view of theta}``."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            size = int(np.prod(shape))
            views[name] = theta[start : start + size].reshape(shape)
            start += size
        return views

    def of_layer(self, **values):
        """Returns a vector like theta with one value for all parameters of a layer."""
        theta = np.zeros(self.size)
        for (layer, _), view in self.unpack(theta).items():
            view[...] = values[layer]
        return theta

    def forward(self, theta, x, mode=None):
        """Runs one example; returns the inputs of both layers, the hidden sums and the outputs."""
        mode, p = mode or Mode(), self.unpack(theta)
        first = x * mode.key.get(HIDDEN, 1.0)
        sums = first @ p[HIDDEN, "kernel"] + p[HIDDEN, "bias"] + mode.bias.get(HIDDEN, 0.0)
        second = np.maximum(sums, 0.0) * mode.key.get(OUTPUT, 1.0)
        outputs = second @ p[OUTPUT, "kernel"] + p[OUTPUT, "bias"] + mode.bias.get(OUTPUT, 0.0)
        return first, sums, second, outputs

    def logits(self, theta, x, mode=None):
        """Returns the outputs for one example."""
        return self.forward(theta, x, mode)[3]

    def features(self, theta, x):
        """Returns the hidden units of one example in the plain network."""
        return self.forward(theta, x)[2]

    def backward(self, theta, x, of_outputs, of_units=None, mode=None):
        """Applies the chain rule to one example.

        Args:
          theta: parameters.
          x: one example.
          of_outputs: derivative of the number of interest for the outputs.
          of_units: its further derivative for what goes into the output layer, if it also depends
            on that directly.
          mode: of the task.
        """
        mode, p = mode or Mode(), self.unpack(theta)
        first, sums, second, _ = self.forward(theta, x, mode)
        units = p[OUTPUT, "kernel"] @ of_outputs + (0.0 if of_units is None else of_units)
        of_sums = units * mode.key.get(OUTPUT, 1.0) * (sums > 0)
        gradient = np.zeros(self.size)
        g = self.unpack(gradient)
        g[HIDDEN, "kernel"][...] = np.outer(first, of_sums)
        g[HIDDEN, "bias"][...] = of_sums
        g[OUTPUT, "kernel"][...] = np.outer(second, of_outputs)
        g[OUTPUT, "bias"][...] = of_outputs
        return Gradients(gradient, of_sums, of_outputs)


def softmax(logits, head=None):
    """Returns probabilities; the outputs outside a head, a bool vector, get 0."""
    head = np.ones(len(logits), bool) if head is None else head
    powers = np.where(head, np.exp(np.where(head, logits - logits[head].max(), 0.0)), 0.0)
    return powers / powers.sum()


def one_hot(label, width):
    """Returns a vector with a 1 at the label."""
    return np.eye(width)[label]


def cross_entropy(logits, label, head=None):
    """Returns the negative log-likelihood of a label, and its derivative for the logits."""
    p = softmax(logits, head)
    return -np.log(p[label]), p - one_hot(label, len(logits))


class Sgd:
    """Gradient descent, with momentum on request, at a rate that may change with the step.

    Args:
      rate: a number, a vector like theta, or a function of the number of steps made so far.
      momentum: the share of the last velocity that is kept.
    """

    def __init__(self, rate, momentum=0.0):
        self.of_step = rate if callable(rate) else lambda step: rate
        self.momentum, self.velocity, self.steps = momentum, 0.0, 0

    @property
    def rate(self):
        """The rate of the step that comes next."""
        return self.of_step(self.steps)

    def update(self, gradient):
        """Returns what is to be added to the parameters."""
        self.velocity = gradient + self.momentum * self.velocity
        self.last_rate = self.rate
        self.steps += 1
        return -self.last_rate * self.velocity


class Adam:
    """Adam of Kingma and Ba 2015, Algorithm 1."""

    def __init__(self, rate, first=0.9, second=0.999, small=1e-8):
        self.rate = self.last_rate = rate
        self.first, self.second, self.small = first, second, small
        self.mean, self.square, self.steps = 0.0, 0.0, 0

    def update(self, gradient):
        """Returns what is to be added to the parameters."""
        self.steps += 1
        self.mean = self.first * self.mean + (1 - self.first) * gradient
        self.square = self.second * self.square + (1 - self.second) * gradient**2
        mean = self.mean / (1 - self.first**self.steps)
        square = self.square / (1 - self.second**self.steps)
        return -self.rate * mean / (np.sqrt(square) + self.small)


@dataclasses.dataclass
class Batch:
    """Examples with weights, of which 0 is padding, and the task of each."""

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    task: np.ndarray

    def __iter__(self):
        return zip(self.x, self.y, self.weight, strict=True)


class Learner:
    """Plain fine-tuning, and the frame of everything else.

    Args:
      network: `Network`.
      theta: the shared parameters at the start.
      optimizer: a function that makes an optimizer.
      parts: what gives each task a mode, such as `Fixed` and `Factors`.
      protection: what protects earlier tasks; a `Protection`, or none.
      heads: bool ``[tasks, outputs]``, the outputs that a task's softmax runs over; all by default.
      mask: the same, for the outputs that may answer; training does not see it.
      reset: whether each task starts with a fresh optimizer.
    """

    def __init__(
        self,
        network,
        theta,
        optimizer,
        parts=(),
        protection=None,
        heads=None,
        mask=None,
        reset=True,
    ):
        self.network, self.theta = network, theta.copy()
        self.new_optimizer, self.reset = optimizer, reset
        self.parts, self.protection = parts, protection or Protection()
        self.heads, self.mask, self.task = heads, mask, None
        self.optimizer = optimizer()
        self.protection.start(self)

    def head(self, task):
        """The outputs that count in a task."""
        return None if self.heads is None else self.heads[task]

    def mode(self, task):
        """The modes of all parts together: biases add up, keys multiply."""
        mode = Mode()
        for part in self.parts:
            for layer, key in part.mode(task).key.items():
                mode.key[layer] = mode.key.get(layer, 1.0) * key
            for layer, bias in part.mode(task).bias.items():
                mode.bias[layer] = mode.bias.get(layer, 0.0) + bias
        return mode

    def loss(self, logits, y):
        """The loss of one example of the task in training, and its derivative for the logits."""
        return cross_entropy(logits, y, self.head(self.task))

    def begin_task(self, task):
        """Starts a task."""
        self.task, self.training = task, True
        if self.reset:
            self.optimizer = self.new_optimizer()
        self.protection.begin(self, task)

    def measure(self, theta, batch):
        """Looks at a batch.

        Args:
          theta: parameters.
          batch: `Batch`.

        Returns:
          The mean loss, the share of right answers, and the gradient of the mean loss for the
          parameters and for what is added to each layer's output.
        """
        mode, total, value, right = self.mode(self.task), batch.weight.sum(), 0.0, 0.0
        own = np.zeros(self.network.size)
        of_layers = {layer: np.zeros(width) for layer, width in self.network.widths.items()}
        for (example, label, w), task in zip(batch, batch.task, strict=True):
            share, head = w / total, self.head(task)
            logits = self.network.logits(theta, example, mode)
            loss, delta = cross_entropy(logits, label, head)
            found = self.network.backward(theta, example, delta, mode=mode)
            value += share * loss
            right += share * (np.argmax(softmax(logits, head)) == label)
            own += share * found.theta
            of_layers[HIDDEN] += share * found.hidden
            of_layers[OUTPUT] += share * found.output
        return value, right, own, of_layers

    def output_sizes(self, batch):
        """The root mean square of each layer's outputs before the biases of the modes are added.

        Examples count with their weights, hence padding does not.
        """
        mode, squares = self.mode(self.task), dict.fromkeys(LAYERS, 0.0)
        for example, _, w in batch:
            share = w / batch.weight.sum()
            _, sums, _, outputs = self.network.forward(self.theta, example, mode)
            squares[HIDDEN] += share * np.mean((sums - mode.bias.get(HIDDEN, 0.0)) ** 2)
            squares[OUTPUT] += share * np.mean((outputs - mode.bias.get(OUTPUT, 0.0)) ** 2)
        return {layer: np.sqrt(square) for layer, square in squares.items()}

    def step(self, x, y, weight=None, tasks=None):
        """Takes one step; returns the mean loss and the share of right answers before it."""
        weight = np.ones(len(x)) if weight is None else np.asarray(weight, float)
        batch = Batch(x, y, weight, np.full(len(x), self.task) if tasks is None else tasks)
        sizes = self.output_sizes(batch)
        value, right, own, of_layers = self.protection.measure(self, batch)
        old = self.theta
        changed = self.protection.gradient(self, own, batch)
        self.theta = self.theta + self.optimizer.update(changed)
        self.protection.after_step(self, old, own, batch)
        for part in self.parts:
            part.update(self.task, of_layers, sizes)
        return value, right

    def end_task(self, x, y):
        """Ends a task, whose data are given."""
        self.protection.end(self, x, y)
        self.training = False

    def answer(self, x, task):
        """The outputs for a batch of a task."""
        now = self.training and task == self.task
        theta = self.theta if now else self.protection.merged(self, task)
        mode = self.mode(task)
        outputs = np.array([self.network.logits(theta, example, mode) for example in x])
        return outputs if self.mask is None else np.where(self.mask[task], outputs, FAR_BELOW)


class Protection:
    """What a method does about earlier tasks. The defaults do nothing."""

    def start(self, learner):
        """Called once."""

    def begin(self, learner, task):
        """Called at the start of a task."""

    def measure(self, learner, batch):
        """Looks at a batch, as `Learner.measure`."""
        return learner.measure(learner.theta, batch)

    def gradient(self, learner, own, batch):
        """Returns the gradient that the optimizer gets, for the gradient of the task's loss."""
        return own

    def after_step(self, learner, old, own, batch):
        """Called after each step with the parameters and the gradient before it."""

    def end(self, learner, x, y):
        """Called at the end of a task."""

    def merged(self, learner, task):
        """Returns the parameters that answer a task."""
        return learner.theta


# Anchors: EWC, MAS, SI and SLNID.


def fisher(learner, x, y, kind="empirical"):
    """The diagonal Fisher information of the task in training, from its definition."""
    network, mode = learner.network, learner.mode(learner.task)
    total = np.zeros(network.size)
    for example, label in zip(x, y, strict=True):
        logits = network.logits(learner.theta, example, mode)
        p = softmax(logits, learner.head(learner.task))
        chances = one_hot(label, len(p)) if kind == "empirical" else p
        for c, chance in enumerate(chances):
            if chance:
                score = p - one_hot(c, len(p))
                total += (
                    chance * network.backward(learner.theta, example, score, mode=mode).theta ** 2
                )
    return total / len(x)


def norm_gradients(learner, x):
    """Yields, for each example, the derivatives of the squared norm of its outputs."""
    network, mode = learner.network, learner.mode(learner.task)
    head = learner.head(learner.task)
    for example in x:
        outputs = network.logits(learner.theta, example, mode)
        counted = outputs if head is None else np.where(head, outputs, 0.0)
        yield network.backward(learner.theta, example, 2.0 * counted, mode=mode)


def sensitivity(learner, x):
    """The importance of MAS: the mean of the absolute derivatives."""
    return sum(np.abs(found.theta) for found in norm_gradients(learner, x)) / len(x)


def pulled(theta, own, rate, pulls, proximal):
    r"""Adds quadratic anchors to a gradient.

    Args:
      theta: parameters.
      own: gradient of the task's loss.
      rate: the learning rate of each parameter.
      pulls: a list of pairs of a curvature c and an anchor a, for the penalties
        :math:`\frac12 \sum_j c_j (\theta_j - a_j)^2`.
      proximal: False for the gradient of the penalties; True for the gradient whose step of
        gradient descent ends in the minimum of
        :math:`own \cdot z + |z - \theta|^2 / (2 rate) + \frac12 \sum c (z - a)^2`.
    """
    if not proximal or np.all(rate == 0.0):
        return own + sum(c * (theta - a) for c, a in pulls)
    # The derivative of the function for z is zero where
    # own + (z - theta) / rate + sum c (z - a) = 0.
    z = (theta - rate * own + rate * sum(c * a for c, a in pulls)) / (
        1.0 + rate * sum(c for c, _ in pulls)
    )
    return (theta - z) / rate


class Anchors(Protection):
    """Quadratic anchors, a pair of importance and parameters for each task."""

    def __init__(self, strength, proximal=True):
        self.strength, self.proximal, self.pairs = strength, proximal, []

    def gradient(self, learner, own, batch):
        """Adds the pull of every anchor, with lambda / 2 in the penalty."""
        if not self.pairs:
            return own
        pulls = [(self.strength * f, a) for f, a in self.pairs]
        return pulled(learner.theta, own, learner.optimizer.rate, pulls, self.proximal)

    def importance(self):
        """The sum of all tasks' importance."""
        return sum(f for f, _ in self.pairs)


class Ewc(Anchors):
    """EWC of Kirkpatrick et al. 2017, its running variant, and that with one anchor."""

    def __init__(
        self, strength, proximal=True, kind="empirical", anchors="latest", decay=1.0, examples=None
    ):
        super().__init__(strength, proximal)
        self.kind, self.anchors, self.decay, self.examples = kind, anchors, decay, examples

    def end(self, learner, x, y):
        """Adds the task's Fisher information."""
        self.pairs = [(self.decay * f, a) for f, a in self.pairs]
        new = fisher(learner, x[: self.examples], y[: self.examples], self.kind)
        self.pairs.append((self.weighed(new, learner), learner.theta.copy()))
        if self.anchors == "latest":
            self.pairs = [(f, learner.theta.copy()) for f, _ in self.pairs]

    def weighed(self, new, learner):
        """Returns the importance of a task for its Fisher information."""
        return new


class RelativeEwc(Ewc):
    """EWC without a unit: roots of Fishers over their mean, and a pull after the step."""

    def weighed(self, new, learner):
        """The importance G, of mean 1 in each array of parameters."""
        found = np.sqrt(new)
        for array in learner.network.unpack(found).values():  # views
            if array.any():
                array /= array.mean()
        return found

    def gradient(self, learner, own, batch):
        """The optimizer gets the gradient of the task's loss alone."""
        return own

    def after_step(self, learner, old, own, batch):
        """Minimises ``|z - theta|^2 / 2 + kappa / 2 sum of G (z - anchor)^2`` over all anchors."""
        if self.pairs:
            curvature = self.strength * sum(g for g, _ in self.pairs)
            towards = self.strength * sum(g * a for g, a in self.pairs)
            learner.theta = (learner.theta + towards) / (1.0 + curvature)


class Mas(Anchors):
    """MAS of Aljundi et al. 2018; its penalty has no 1/2."""

    def __init__(self, strength, proximal=True):
        super().__init__(2.0 * strength, proximal)

    def end(self, learner, x, y):
        """Adds the task's sensitivity and moves all anchors."""
        self.pairs.append((sensitivity(learner, x), None))
        self.pairs = [(omega, learner.theta.copy()) for omega, _ in self.pairs]


class Si(Anchors):
    """SI of Zenke et al. 2017; its penalty has no 1/2."""

    def __init__(self, strength, damping, clamp, proximal=True):
        super().__init__(2.0 * strength, proximal)
        self.damping, self.clamp = damping, clamp

    def start(self, learner):
        """Begins the path."""
        self.path, self.omega = np.zeros(learner.network.size), np.zeros(learner.network.size)
        self.before = learner.theta.copy()

    def after_step(self, learner, old, own, batch):
        """Adds to the path what the step won of the task's own loss."""
        self.path = self.path - own * (learner.theta - old)

    def end(self, learner, x, y):
        """Turns the path into importance."""
        won = self.path / ((learner.theta - self.before) ** 2 + self.damping)
        if self.clamp == "increment":
            won = np.maximum(won, 0.0)
        self.omega = self.omega + won
        if self.clamp == "sum":
            self.omega = np.maximum(self.omega, 0.0)
        self.before, self.path = learner.theta.copy(), 0.0 * self.path
        self.pairs = [(self.omega, self.before)]


class Slnid(Protection):
    """SLNID of Aljundi et al. 2019, upon MAS or EWC."""

    def __init__(self, strength, scale, discount, anchors):
        self.strength, self.scale, self.discount, self.anchors = strength, scale, discount, anchors

    def start(self, learner):
        """No unit is needed yet."""
        self.units = np.zeros(learner.network.widths[HIDDEN])

    def factors(self):
        """The factor of each pair of units: 0 for a unit with itself."""
        width = len(self.units)
        factors = np.zeros((width, width))
        for i, j in itertools.permutations(range(width), 2):
            a, b = self.units[i], self.units[j]
            factors[i, j] = np.exp(-(a + b) if self.discount == "sum" else -max(a, b))
            if self.scale:
                factors[i, j] *= np.exp(-((i - j) ** 2) / (2.0 * (width / self.scale) ** 2))
        return factors

    def gradient(self, learner, own, batch):
        """Adds the gradient of the inhibition, then the anchors'."""
        factors, total = self.factors(), np.zeros(learner.network.size)
        nothing = np.zeros(learner.network.outputs)
        for x, _, share in batch:
            h = learner.network.features(learner.theta, x)
            # Of sum over i, j of f_ij h_i h_j, with f symmetric and h not negative.
            of_units = share / batch.weight.sum() * 2.0 * factors @ h
            total += learner.network.backward(learner.theta, x, nothing, of_units).theta
        return self.anchors.gradient(learner, own + self.strength * total, batch)

    def end(self, learner, x, y):
        """Adds the importance of the units, and that of the parameters."""
        if isinstance(self.anchors, Mas):
            each = [np.abs(found.hidden) for found in norm_gradients(learner, x)]
        else:
            each = []
            for example, label in zip(x, y, strict=True):
                _, delta = learner.loss(learner.network.logits(learner.theta, example), label)
                each.append(np.abs(learner.network.backward(learner.theta, example, delta).hidden))
        self.units = self.units + np.mean(each, 0)
        self.anchors.end(learner, x, y)


class EwcKfac(Protection):
    """EWC with Kronecker factors of Ritter et al. 2018, by proximal steps now and then."""

    def __init__(self, strength, every):
        self.strength, self.every, self.tasks = strength, every, 0

    def start(self, learner):
        """Begins both sums of each layer."""
        sizes = {layer: learner.network.shapes[layer, "kernel"] for layer in LAYERS}
        self.inputs = {layer: np.zeros((d + 1, d + 1)) for layer, (d, _) in sizes.items()}
        self.outputs = {layer: np.zeros((k, k)) for layer, (_, k) in sizes.items()}
        self.steps = 0

    def begin(self, learner, task):
        """Counts the steps of the task anew."""
        self.steps = 0

    def after_step(self, learner, old, own, batch):
        """Pulls after so many steps."""
        self.steps += 1
        if self.tasks and self.steps % self.every == 0:
            self.pull(learner, self.every)

    def pull(self, learner, steps):
        """Minimises ``|Z - theta|^2 / 2 + s / 2 tr(D^T A D G)`` for each layer, D = Z - anchor.

        The minimum solves ``(1 + s G (x) A) vec(D) = vec(theta - anchor)``, columns stacked.
        """
        learner.theta = learner.theta.copy()
        weights, anchor = learner.network.unpack(learner.theta), learner.network.unpack(self.anchor)
        rate = learner.network.unpack(learner.optimizer.last_rate * np.ones(learner.network.size))
        for layer in LAYERS:
            a, g = self.inputs[layer], self.outputs[layer] / self.tasks
            strength = steps * rate[layer, "kernel"].flat[0] * self.strength
            rows = [
                np.vstack([of[layer, "kernel"], of[layer, "bias"][None]])
                for of in (weights, anchor)
            ]
            distance = (rows[0] - rows[1]).ravel(order="F")
            system = np.eye(len(distance)) + strength * np.kron(g, a)
            moved = np.linalg.solve(system, distance).reshape(rows[0].shape, order="F")
            weights[layer, "kernel"][...] = (rows[1] + moved)[:-1]
            weights[layer, "bias"][...] = (rows[1] + moved)[-1]

    def end(self, learner, x, y):
        """Pulls for the steps since the last pull, and adds the task's factors."""
        if self.tasks and self.steps % self.every:
            self.pull(learner, self.steps % self.every)
        network, mode = learner.network, learner.mode(learner.task)
        for example, label in zip(x, y, strict=True):
            first, _, second, logits = network.forward(learner.theta, example, mode)
            found = network.backward(
                learner.theta, example, learner.loss(logits, label)[1], mode=mode
            )
            for layer, a, d in (
                (HIDDEN, first, found.hidden),
                (OUTPUT, second, found.output),
            ):
                a = np.append(a, 1.0)
                self.inputs[layer] += np.outer(a, a) / len(x)
                self.outputs[layer] += np.outer(d, d) / len(x)
        self.tasks += 1
        self.anchor = learner.theta.copy()


# Networks of their own: single-task learning and IMM; answers of the last: LwF and EBLL.


class Stl(Protection):
    """Every task keeps a network of its own; who runs it gives each task fresh parameters."""

    def start(self, learner):
        """No network yet."""
        self.thetas = {}

    def end(self, learner, x, y):
        """Keeps the network."""
        self.thetas[learner.task] = learner.theta.copy()

    def merged(self, learner, task):
        """The network of the task."""
        return self.thetas[task]


class Imm(Protection):
    """IMM of Lee et al. 2017: what answers is a mean of the networks after each task.

    Args:
      l2: strength of the pull towards the network before the task, without 1/2.
      proximal: as of `pulled`.
      columns: bool ``[tasks, outputs]``: each column of the output layer is merged over the tasks
        that have its class; None merges everything over all tasks.
    """

    def __init__(self, l2=0.0, proximal=True, columns=None):
        self.l2, self.proximal, self.columns = l2, proximal, columns
        self.thetas, self.fishers = [], []

    def gradient(self, learner, own, batch):
        """Pulls towards the last task's network."""
        if not self.thetas:
            return own
        pulls = [(2.0 * self.l2 * np.ones_like(own), self.thetas[-1])]
        return pulled(learner.theta, own, learner.optimizer.rate, pulls, self.proximal)

    def end(self, learner, x, y):
        """Keeps the task's network; its Fisher is put into `fishers` from outside, for the mode."""
        self.thetas.append(learner.theta.copy())

    def merged(self, learner, task):
        """The mean or, with Fishers, the mode."""
        network, merged = learner.network, np.zeros(learner.network.size)
        total = np.zeros(network.size)
        for k, theta in enumerate(self.thetas):
            share = np.ones(network.size)
            if self.columns is not None:
                nobody = ~self.columns[: len(self.thetas)].any(0)  # merged like everything else
                for leaf in ("kernel", "bias"):
                    network.unpack(share)[OUTPUT, leaf][...] *= self.columns[k] | nobody
            if self.fishers:
                share = share * (self.fishers[k] + 1e-8)
            merged, total = merged + share * theta, total + share
        return merged / total


class DropTransfer(Imm):
    """IMM whose steps leave some hidden units at the last task's weights.

    The loss of a step is taken at ``old + m / (1 - drop) * (theta - old)``, with m 0 or 1 for each
    hidden unit. Which units are dropped is found as `nearest` says.
    """

    def __init__(self, drop, **options):
        super().__init__(**options)
        self.drop, self.chosen = drop, []

    def measure(self, learner, batch):
        """Looks at the batch with some units dropped."""
        if not self.thetas:
            return super().measure(learner, batch)
        draws = list(itertools.product((0.0, 1.0), repeat=learner.network.widths[HIDDEN]))
        found = []
        for kept in draws:
            scale = np.ones(learner.network.size)
            for leaf in ("kernel", "bias"):
                learner.network.unpack(scale)[HIDDEN, leaf][...] = np.array(kept) / (
                    1.0 - self.drop
                )
            mixed = self.thetas[-1] + scale * (learner.theta - self.thetas[-1])
            value, right, own, of_layers = learner.measure(mixed, batch)
            found.append((value, right, scale * own, of_layers))
        candidates = np.array([self.gradient(learner, own, batch) for _, _, own, _ in found])
        place = nearest(candidates, learner, self.after)
        self.chosen.append(draws[place])
        return found[place]


class Lwf(Protection):
    """LwF of Li and Hoiem 2016.

    Args:
      strength: lambda.
      temperature: tau.
      heads: bool ``[heads, outputs]`` for a task, as a function of the task.
      warmup: steps of a later task in which only the output layer is trained.
    """

    def __init__(self, strength, temperature, heads, warmup=0):
        self.strength, self.temperature, self.heads = strength, temperature, heads
        self.warmup, self.teacher, self.steps = warmup, None, 0

    def begin(self, learner, task):
        """Counts the steps of the task anew."""
        self.steps = 0

    def gradient(self, learner, own, batch):
        """Adds the gradient of the cross-entropy between old and new answers."""
        if self.teacher is None:
            return own
        total, tau = own.copy(), self.temperature
        for x, _, share in batch:
            old, new = (learner.network.logits(t, x) / tau for t in (self.teacher, learner.theta))
            delta = sum(
                softmax(new, head) - softmax(old, head) for head in self.heads(learner.task)
            )
            found = learner.network.backward(learner.theta, x, delta / tau)
            total += self.strength * share / batch.weight.sum() * found.theta
        total += self.more(learner, batch)
        if self.steps < self.warmup:
            total = total * learner.network.of_layer(**{HIDDEN: 0.0, OUTPUT: 1.0})
        return total

    def more(self, learner, batch):
        """A further gradient."""
        return 0.0

    def after_step(self, learner, old, own, batch):
        """Counts."""
        self.steps += 1

    def end(self, learner, x, y):
        """The network that teaches is the one after the task."""
        self.teacher = learner.theta.copy()


class Ebll(Lwf):
    """EBLL of Rannen Triki et al. 2017, with encoders of the hidden units that are given to it."""

    def __init__(self, alpha, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha, self.encoders = alpha, []  # pairs of A and a, for code(x) = sigmoid(A^T x + a)

    def more(self, learner, batch):
        """The gradient of alpha / 2 times the squared distances of the codes."""
        network, total = learner.network, np.zeros(learner.network.size)
        for x, _, share in batch:
            new, old = (network.features(theta, x) for theta in (learner.theta, self.teacher))
            for kernel, bias in self.encoders:
                code, before = (1.0 / (1.0 + np.exp(-(h @ kernel + bias))) for h in (new, old))
                of_units = kernel @ ((code - before) * code * (1.0 - code))
                found = network.backward(learner.theta, x, np.zeros(network.outputs), of_units)
                total += self.alpha * share / batch.weight.sum() * found.theta
        return total


def fit_autoencoder(learner, x, y, parts, epochs, size, rate, reconstruction):
    """Fits the autoencoder of EBLL with Adam, from given initial values.

    The loss of an example is ``reconstruction * |h - h'|^2`` plus the cross-entropy of the output
    layer that is fed with ``h'``, where ``h' = sigmoid(h A + a) D + d``.

    Args:
      learner: whose network stays as it is.
      x: examples of the task.
      y: labels.
      parts: A, a, D and d.
      epochs: passes over the examples, always in the given order.
      size: examples in a step.
      rate: of Adam.
      reconstruction: weight of the squared distance.

    Returns:
      A and a.
    """
    parts = [np.asarray(part, float) for part in parts]
    optimizers = [Adam(rate) for _ in parts]
    p = learner.network.unpack(learner.theta)
    for _ in range(epochs):
        for start in range(0, len(x), size):
            sums = [np.zeros_like(part) for part in parts]
            rows = range(start, min(start + size, len(x)))
            for i in rows:
                h = learner.network.features(learner.theta, x[i])
                code = 1.0 / (1.0 + np.exp(-(h @ parts[0] + parts[1])))
                again = code @ parts[2] + parts[3]
                _, delta = learner.loss(again @ p[OUTPUT, "kernel"] + p[OUTPUT, "bias"], y[i])
                of_again = 2.0 * reconstruction * (again - h) + p[OUTPUT, "kernel"] @ delta
                of_sums = (parts[2] @ of_again) * code * (1.0 - code)
                found = (np.outer(h, of_sums), of_sums, np.outer(code, of_again), of_again)
                sums = [s + f / len(rows) for s, f in zip(sums, found, strict=True)]
            parts = [
                part + optimizer.update(g)
                for part, optimizer, g in zip(parts, optimizers, sums, strict=True)
            ]
    return parts[0], parts[1]


# Memories: GEM, A-GEM, and experience replay.


def label_gradient(learner, x, y, task):
    """The gradient of the cross-entropy of one example of a task, in its mode and head."""
    mode = learner.mode(task)
    _, delta = cross_entropy(learner.network.logits(learner.theta, x, mode), y, learner.head(task))
    return learner.network.backward(learner.theta, x, delta, mode=mode).theta


def nearest(candidates, learner, after):
    """Which of some gradients, ``[n, P]``, leads by plain gradient descent to some parameters.

    A method that draws examples at random may take one of several steps. The reference tries every
    draw and goes on with the step nearest to the one that was made; whether it *is* that step, the
    comparison of the parameters tells. So nothing here depends on how random numbers are made.
    """
    made = (learner.theta - after) / learner.optimizer.rate
    return int(np.argmin(((candidates - made) ** 2).sum(-1)))


def gem_projection(own, rows, margin, damping):
    """The projection of GEM, its dual solved by trying every set of active constraints.

    Minimises ``1/2 v^T (G G^T + damping) v + (G g)^T v`` for ``v >= margin``.
    """
    rows = np.array(rows)
    products = rows @ own
    if not (products < 0).any():
        return own
    n = len(rows)
    gram = rows @ rows.T + damping * np.eye(n)
    best, chosen = np.inf, None
    for free in itertools.product((False, True), repeat=n):
        free, v = np.array(free), np.full(n, float(margin))
        if free.any():
            known = products[free] + gram[np.ix_(free, ~free)] @ v[~free]
            v[free] = np.linalg.solve(gram[np.ix_(free, free)], -known)
        value = 0.5 * v @ gram @ v + products @ v
        if (v >= margin - 1e-12).all() and value < best:
            best, chosen = value, v
    return own + chosen @ rows


class Gem(Protection):
    """GEM of Lopez-Paz and Ranzato 2017.

    Args:
      keep: ``(x, y) -> pairs``, the examples to be kept of a task.
      margin: least weight of a task's gradient once any is in conflict.
      damping: added to the diagonal of the dual.
    """

    def __init__(self, keep, margin, damping=1e-3):
        self.keep, self.margin, self.damping = keep, margin, damping
        self.memories, self.conflicts = [], 0

    def gradients(self, learner):
        """Returns, for each earlier task, the gradient of each example kept."""
        return [
            [label_gradient(learner, x, y, task) for x, y in memory]
            for task, memory in enumerate(self.memories)
        ]

    def gradient(self, learner, own, batch):
        """Projects."""
        if not self.memories:
            return own
        rows = [np.mean(each, 0) for each in self.gradients(learner)]
        projected = gem_projection(own, rows, self.margin, self.damping)
        self.conflicts += projected is not own
        return projected

    def end(self, learner, x, y):
        """Fills the memory of the task."""
        self.memories.append(self.keep(x, y))


class Agem(Gem):
    """A-GEM of Chaudhry et al. 2019; see `Drawing` for the draws.

    Args:
      keep: as of `Gem`.
      draw: examples in the reference gradient, none twice; all of them, if there are not so many.
    """

    def __init__(self, keep, draw):
        super().__init__(keep, 0.0)
        self.draw, self.chosen = draw, []

    def gradient(self, learner, own, batch):
        """Projects off the reference gradient of the draw that was made."""
        if not self.memories:
            return own
        each = np.array([g for memory in self.gradients(learner) for g in memory])
        draws = list(itertools.combinations(range(len(each)), min(self.draw, len(each))))
        candidates = agem_projection(own, np.array([each[list(draw)].mean(0) for draw in draws]))
        place = nearest(candidates, learner, self.after)
        if candidates[place] is not own and np.any(candidates[place] != own):
            self.conflicts += 1
            self.chosen.append(draws[place])
        return candidates[place]


def last(count):
    """Keeps the last examples of a stream."""
    return lambda x, y: list(zip(x, y, strict=True))[-count:]


def last_of_class(count):
    """Keeps the last examples of each class of a stream, in the order of the stream."""

    def keep(x, y):
        kept, found = {}, []
        for example, label in reversed(list(zip(x, y, strict=True))):
            kept[label] = kept.get(label, 0) + 1
            if kept[label] <= count:
                found.append((example, label))
        return found[::-1]

    return keep


def agem_projection(own, reference):
    """The projection of A-GEM, for one reference or several, ``[..., P]``."""
    product = reference @ own
    square = (reference**2).sum(-1)
    off = own - (product / np.where(square > 0, square, 1.0))[..., None] * reference
    return np.where((product < 0)[..., None], off, own)


@dataclasses.dataclass
class Kept:
    """One example in a replay memory."""

    x: np.ndarray
    y: int
    task: int
    outputs: np.ndarray | None = None

    def alike(self, other, tolerance=1e-5):
        """Whether both are the same example, with the same outputs up to rounding."""
        if (self.y, self.task) != (other.y, other.task) or (self.x != other.x).any():
            return False
        if self.outputs is None:
            return True
        apart = np.abs(self.outputs - other.outputs).max()
        return apart <= tolerance * np.abs(other.outputs).max()


def reservoir_allows(before, batch, after, size):
    """Whether algorithm R can have made one memory of another and a batch, whatever it drew.

    Args:
      before: a list of `Kept`.
      batch: the same, in the order of the batch.
      after: the same.
      size: how many there is room for.
    """
    room = size - len(before)
    filled, late = before + batch[:room], batch[room:]
    for now, old in zip(after, filled, strict=True):
        if not now.alike(old):
            place = next((i for i, new in enumerate(late) if now.alike(new)), None)
            if place is None:
                return False
            late = late[:place] + late[place + 1 :]
    return True


class Replay(Protection):
    """ER of Chaudhry et al. 2019, DER and DER++ of Buzzega et al. 2020.

    What the memory holds is given from outside, in `memory`, and so are the parameters `after` the
    step, from which the draw is found as `nearest` says.

    Args:
      draw: examples in a draw, with replacement.
      alpha: weight of the squared distance to the outputs kept, meaned over draw and outputs.
      beta: weight of the mean cross-entropy of a second draw.
      union: instead, the mean cross-entropy of the batch and one draw together.

    Attributes:
      chosen: the draws of each step, tuples of places in the memory.
      examples: the same, but of several places with the same input the first one.
    """

    def __init__(self, draw, alpha=0.0, beta=0.0, union=False):
        self.draw, self.alpha, self.beta, self.union = draw, alpha, beta, union
        self.memory, self.chosen, self.examples = [], [], []

    def remember(self, *draws):
        """Notes the draws of a step."""
        inputs = [m.x.tobytes() for m in self.memory]
        self.chosen.append(draws)
        self.examples.append(
            tuple(tuple(sorted(inputs.index(inputs[i]) for i in draw)) for draw in draws)
        )

    def gradient(self, learner, own, batch):
        """Adds what the draw of the step that was made asks for."""
        if not self.memory:
            return own
        count, network = len(self.memory), learner.network
        draws = list(itertools.combinations_with_replacement(range(count), self.draw))
        shares = np.array([np.bincount(draw, minlength=count) / self.draw for draw in draws])
        labels = np.array([label_gradient(learner, m.x, m.y, m.task) for m in self.memory])
        if self.union:
            n = batch.weight.sum()
            candidates = (n * own + self.draw * shares @ labels) / (n + self.draw)
            place = nearest(candidates, learner, self.after)
            self.remember(draws[place])
            return candidates[place]
        distances = np.zeros((count, network.size))
        for i, m in enumerate(self.memory):
            if self.alpha:
                mode = learner.mode(m.task)
                apart = network.logits(learner.theta, m.x, mode) - m.outputs
                of_outputs = 2.0 * apart / network.outputs
                distances[i] = network.backward(learner.theta, m.x, of_outputs, mode=mode).theta
        first = own + self.alpha * shares @ distances if self.alpha else own[None]
        second = self.beta * shares @ labels if self.beta else np.zeros((1, network.size))
        candidates = (first[:, None] + second[None]).reshape(-1, network.size)
        place = nearest(candidates, learner, self.after)
        both = np.unravel_index(place, (len(first), len(second)))
        self.remember(
            *(draws[i] for i, of in zip(both, (first, second), strict=True) if len(of) > 1)
        )
        return candidates[place]


# Modes: PSP, XdG, BD and its controls.


class Fixed:
    """Modes that are given once: keys, gates, random biases."""

    def __init__(self, modes):
        self.modes = modes

    def mode(self, task):
        """The mode of a task."""
        return self.modes[task]

    def update(self, task, of_layers, sizes):
        """Nothing is trained."""


class Biases:
    """One plain bias for each task and layer, trained by its gradient, or by relative steps on it.

    Args:
      widths: of the layers.
      optimizer: a function that makes one for each task and layer.
    """

    def __init__(self, widths, optimizer):
        self.widths, self.optimizer, self.kept, self.optimizers = widths, optimizer, {}, {}

    def mode(self, task):
        """The mode of a task: zero before it was trained."""
        if task not in self.kept:
            self.kept[task] = {layer: np.zeros(width) for layer, width in self.widths.items()}
            self.optimizers = {layer: self.optimizer() for layer in self.widths}
        return Mode(bias=self.kept[task])

    def update(self, task, of_layers, sizes):
        """One step."""
        self.kept[task] = {
            layer: bias + update_of(self.optimizers[layer], of_layers[layer], sizes[layer])
            for layer, bias in self.kept[task].items()
        }


class Factors:
    """The beneficial perturbation: bias = M W for each task and layer.

    Args:
      first: a function that makes the optimizer of M.
      second: the same for W.
    """

    def __init__(self, first, second):
        self.first, self.second, self.factors = first, second, {}

    def given(self, task, factors):
        """Takes the factors of a task at its start, ``{layer: (M [1, H], W [H, K])}``."""
        self.factors[task] = {
            layer: tuple(np.array(f, float) for f in both) for layer, both in factors.items()
        }
        self.optimizers = {layer: (self.first(), self.second()) for layer in factors}

    def mode(self, task):
        """The mode of a task."""
        return Mode(bias={layer: (m @ w)[0] for layer, (m, w) in self.factors[task].items()})

    def update(self, task, of_layers, sizes):
        """One step of both factors, from their values before it."""
        for layer, (m, w) in self.factors[task].items():
            g, (first, second) = of_layers[layer], self.optimizers[layer]
            self.factors[task][layer] = (
                m + update_of(first, (w @ g)[None, :], sizes[layer]),
                w + second.update(np.outer(m[0], g)),
            )


@dataclasses.dataclass
class Beneficial:
    """The step of BD: a fixed distance against the sign of the gradient."""

    epsilon: float

    def update(self, gradient):
        """Returns what is to be added."""
        return -self.epsilon * np.sign(gradient)


@dataclasses.dataclass
class Matched:
    """A step along the gradient, as long as that of BD."""

    epsilon: float

    def update(self, gradient):
        """Returns what is to be added."""
        length = np.sqrt((gradient**2).sum())
        if not length:
            return np.zeros_like(gradient)
        return -self.epsilon * np.sqrt(gradient.size) * gradient / length


class Relative:
    """A step in units of the layer that falls with the steps made so far.

    Args:
      size: of the first step, for outputs whose root mean square is 1.
      kind: `Beneficial` or `Matched`.
    """

    def __init__(self, size, kind=Beneficial):
        self.size, self.kind, self.steps = size, kind, 0

    def update(self, gradient, of_outputs):
        """Returns what is to be added, for the size of the layer's outputs on the batch."""
        step = self.kind(self.size / np.sqrt(1.0 + self.steps) * of_outputs)
        self.steps += 1
        return step.update(gradient)


def update_of(optimizer, gradient, of_outputs):
    """What an optimizer adds; only a `Relative` one asks for the size of the layer's outputs."""
    given = (of_outputs,) if isinstance(optimizer, Relative) else ()
    return optimizer.update(gradient, *given)
