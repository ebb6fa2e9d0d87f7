"""The layers of a network that take a mode, independent of the framework.

Modes leave everything else in a network alone: norms, embeddings, single parameters. `matching`
refuses a pattern that asks for a layer of an unknown kind.
"""

import dataclasses
import re

__all__ = ["KERNELS", "Layer", "Layers", "Other", "matching"]

KERNELS = ("kernel", "weight", "weights", "w")  # usual names of a parameter that multiplies


@dataclasses.dataclass(frozen=True)
class Layer:
    """What modes need to know about one layer of a network.

    Attributes:
      kind: ``"dense"``, ``"dense_general"``, ``"conv"``, or ``"function"`` for a layer of
        `bpnjax.networks.from_function`.
      inputs: length of its key: the last axis of the input; for dense_general all axes that the
        kernel contracts.
      outputs: length of its bias: the features; for dense_general the product of all feature axes.
      calls: how often one forward pass calls it. Within nn.scan, how often it is traced.
      rank: number of axes of its input, with the batch axis.
      output_shape: shape of the output of one call, with the batch axis.
      plain: whether its input has a meaning outside the layer. This needs a call outside of
        nn.scan, nn.remat and the like, with the kernel as it is in the parameters, on an input
        whose first axis is the batch.
    """

    kind: str
    inputs: int
    outputs: int
    calls: int
    rank: int
    output_shape: tuple[int, ...]
    plain: bool = True


@dataclasses.dataclass(frozen=True)
class Other:
    """A module with parameters of its own that takes neither key nor bias.

    Attributes:
      kind: the name of its class.
      multiplies: whether it has a kernel, so that it would be a layer if its kind were known.
    """

    kind: str
    multiplies: bool


class Layers(dict[str, Layer]):
    """A dict ``{path: Layer}``, in the order of first calls.

    Attributes:
      others: ``{path: Other}``, the modules beside the layers that have parameters.
      known: names of the classes whose layers take a mode, for messages.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.others: dict[str, Other] = {}
        self.known: tuple[str, ...] = ()


def matching(layers: dict[str, Layer], pattern: str) -> dict[str, Layer]:
    """Returns the layers whose whole path matches a regular expression, in their order.

    Args:
      layers: as `find_layers` returns them.
      pattern: matched against the whole path; ``"(?!output$).*"`` leaves one layer out.

    Returns:
      The matching part of ``layers``.

    Raises:
      ValueError: no layer matches (the message lists all layers), or the pattern matches a module
        with a kernel of an unknown kind, such as an Einsum.

    Example:
      >>> from bpnjax.networks.layers import Layer, matching
      >>> layers = {name: Layer("dense", 2, 2, 1, 2, (1, 2)) for name in ("hidden_0", "output")}
      >>> list(matching(layers, "hidden_.*"))
      ['hidden_0']
      >>> matching(layers, "hidden")
      Traceback (most recent call last):
      ...
      ValueError: 'hidden' matches no layer; there are: hidden_0, output
    """
    found = {path: layer for path, layer in layers.items() if re.fullmatch(pattern, path)}
    beside = layers.others if isinstance(layers, Layers) else {}
    others = {path: other for path, other in beside.items() if re.fullmatch(pattern, path)}
    unknown = [path for path, other in others.items() if other.multiplies]
    if unknown:
        known = ", ".join(layers.known) if isinstance(layers, Layers) else ""
        raise ValueError(
            f"{pattern!r} matches what takes neither key nor bias: "
            f"{', '.join(f'{path!r} ({others[path].kind})' for path in unknown)}. Modes know "
            f"{known}: build it of these, or leave it out: '(?!{unknown[0]}$).*'"
        )
    if not found:
        listed = ", ".join(f"{path!r} ({other.kind})" for path, other in others.items())
        only = f" but {listed}, which take neither key nor bias" if others else ""
        raise ValueError(f"{pattern!r} matches no layer{only}; there are: {', '.join(layers)}")
    return found
