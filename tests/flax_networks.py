"""Networks as users write them in plain Linen, for tests: none of them knows of tasks."""

import flax.linen as nn
import jax.numpy as jnp


class ResidualBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train):
        def norm(y):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)

        y = nn.relu(norm(nn.Conv(self.width, (3, 3), use_bias=False)(x)))
        y = norm(nn.Conv(self.width, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = nn.Conv(self.width, (1, 1), name="shortcut")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Batch norm with running averages and an argument ``train`` without a default."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(3, (3, 3), name="stem")(x))
        for width in (3, 4):
            x = ResidualBlock(width)(x, train)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(y, y)
        x = x + nn.Dropout(0.5, deterministic=not train)(y)
        y = nn.gelu(nn.Dense(10, name="in")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="out")(y)


class ViT(nn.Module):
    """Attention, layer norm, dropout, and parameters of its own: class token and positions."""

    depth: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (2, 2), strides=(2, 2), name="patches")(x)
        x = x.reshape(x.shape[0], -1, 6)
        token = self.param("token", nn.initializers.normal(), (1, 1, 6))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 6))
        for i in range(self.depth):
            x = EncoderBlock(name=f"block_{i}")(x, train)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x)[:, 0])


class Text(nn.Module):
    """An embedding, used twice: to read tokens and to score them; a recurrent cell in a scan."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4, name="embed")
        x = nn.RNN(nn.GRUCell(4, name="cell"), name="rnn")(embed(tokens))
        return embed.attend(nn.Dense(4, name="project")(x[:, -1]))


class Shared(nn.Module):
    """One layer called twice, its input passed by name."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(x.shape[-1], name="shared")
        return nn.Dense(2, name="head")(layer(inputs=nn.tanh(layer(inputs=x))))


class Activated(nn.Dense):
    """A subclass with a call of its own around that of its parent."""

    def __call__(self, inputs):
        return nn.tanh(super().__call__(inputs))


class Shapes(nn.Module):
    """Layers with axes in unusual places."""

    @nn.compact
    def __call__(self, x):  # [n, 4, 4, 2]
        x = nn.ConvTranspose(3, (3, 3), name="transposed")(x)
        x = nn.ConvLocal(3, (2, 2), name="local")(x)
        x = nn.DenseGeneral((2, 5), axis=(3, 1), name="general")(x)  # kernel [4, 3, 2, 5]
        x = Activated(4, name="activated")(x)
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


class Step(nn.Module):
    """One layer as the body of a lifted transformation."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(nn.Dense(x.shape[-1], name="dense")(x)), None


class Lifted(nn.Module):
    """`Step` under a lifted transformation, and a head."""

    how: str

    @nn.compact
    def __call__(self, x):
        separate = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        shared = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}
        lift = {
            "scan": lambda: nn.scan(Step, **separate, length=3),
            "remat": lambda: nn.remat(Step),
            "vmap": lambda: nn.vmap(Step, **shared),
            "jit": lambda: nn.jit(Step),
        }[self.how]
        x, _ = lift()(name="lifted")(x)
        return nn.Dense(3, name="head")(x)


class Normed(nn.Module):
    """A kernel that is not used as it lies in the parameters."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.WeightNorm(nn.Dense(4, name="inner"))(x))
        return nn.Dense(3, name="head")(x)


class ConvLayerNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.tanh(nn.Conv(3, (3, 3), name="conv")(x)))
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


class Unknown(nn.Module):
    """A layer with a kernel of which the library knows nothing, and a known one."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.Einsum((5, 4), "nd,dk->nk", name="einsum")(x))
