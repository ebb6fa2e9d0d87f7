"""The layers of a network that take a mode, as far as no framework matters.

Whatever else a network has (norms, embeddings, parameters of its own) is left alone, and `matching`
refuses a pattern that asks for a layer with a kernel of which nothing is known.
"""

import dataclasses
import re

__all__ = ["KERNELS", "Layer", "Layers", "Other", "matching"]

KERNELS = ("kernel", "weight", "weights", "w")  # what a parameter that multiplies is called


@dataclasses.dataclass(frozen=True)
class Layer:
    """What modes need to know of one layer of a network.

    Attributes:
      kind: ``"dense"``, ``"dense_general"``, ``"conv"``, or ``"function"`` for a layer of
        `bpnjax.networks.from_function`.
      inputs: length of its key, what the kernel contracts: the last axis but for dense_general.
      outputs: length of its bias: its features, multiplied out for dense_general.
      calls: how often one forward pass calls it; within nn.scan, how often it is traced.
      rank: axes of its input, the batch axis included.
      output_shape: of one call, the batch axis included.
      plain: whether it is called outside nn.scan, nn.remat and the like, with the kernel as it is
        in the parameters and on an input whose first axis is the batch, so that this input means
        something outside of the layer.
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
      multiplies: whether it has a kernel, hence would be a layer if its kind were known.
    """

    kind: str
    multiplies: bool


class Layers(dict[str, Layer]):
    """``{path: Layer}``, in the order of first calls.

    Attributes:
      others: ``{path: Other}``, what has parameters beside the layers.
      known: names of the classes whose layers take a mode, for messages.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.others: dict[str, Other] = {}
        self.known: tuple[str, ...] = ()


def matching(layers: dict[str, Layer], pattern: str) -> dict[str, Layer]:
    """The layers whose whole path matches a regular expression, in their order.

    Args:
      layers: as `find_layers` returns them.
      pattern: matched against the whole path; ``"(?!output$).*"`` leaves one layer out.

    Returns:
      The part of ``layers`` that matches.

    Raises:
      ValueError: none does, and then the message lists those there are; or the pattern matches
        something with a kernel that is not of a known kind, such as an Einsum.

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
