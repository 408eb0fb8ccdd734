"""Flax NNX: `graph, state = nnx.split(model)`, and the state is the parameters."""

from functools import partial

import jax.numpy as jnp
from check import BATCH, HEADS, LAYERS, TIME, VOCABULARY, Call, D, K, Table, drawn, tokens, words
from flax import nnx

table = Table()
KERNELS = ".*kernel"


def call(make, *args, run=lambda model, *args: model(*args)):
    """`make(rngs=...)` gives the model: parameters beside all other state, which the function gives back."""
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0, dropout=1))), nnx.Param, ...)

    def fn(params, rest, *args):
        model = nnx.merge(graph, params, rest, copy=True)
        y = run(model, *args)
        return y, nnx.state(model, (nnx.BatchStat, nnx.Cache))

    return Call(fn, drawn(params), drawn(rest), *args)


@table.model(KERNELS, {"layers/0/kernel": ((), (0,), (1,))}, eager=True)
def linear():
    def make(rngs):
        return nnx.Sequential(nnx.Linear(D, K, rngs=rngs), nnx.relu, nnx.Linear(K, D, rngs=rngs))

    return call(make, tokens())


class DropoutBetween(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(D, K, rngs=rngs), nnx.Linear(K, D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(self.up(x)))


@table.model(KERNELS)
def whole_state():
    """Not only parameters: the counters and keys of the dropout as well."""
    graph, state = nnx.split(nnx.eval_shape(lambda: DropoutBetween(nnx.Rngs(0))))
    return Call(lambda state, x: nnx.merge(graph, state, copy=True)(x), drawn(state), tokens())


@table.model(KERNELS, {"layers/0/kernel": ((), (0,), (1, 2)), "layers/1/kernel": ((), (0, 1), (2,))})
def linear_general():
    def make(rngs):
        join = nnx.LinearGeneral((HEADS, 5), K, axis=(-2, -1), rngs=rngs)
        return nnx.Sequential(nnx.LinearGeneral(D, (HEADS, 5), rngs=rngs), join)

    return call(make, tokens())


@table.model(KERNELS, {"kernel": ((), (0,), (1, 2))})
def einsum():
    return call(partial(nnx.Einsum, "btd,dhk->bhtk", (D, HEADS, 5), (HEADS, 1, 5)), tokens())


@table.model(KERNELS, {"kernel": ((), (0, 1, 2), (3,))})
def conv():
    return call(partial(nnx.Conv, 6, K, (3, 2), strides=(2, 1), kernel_dilation=(1, 2)), tokens(2, 9, 8, 6))


@table.model(KERNELS)
def grouped_conv():
    return call(partial(nnx.Conv, 6, 8, (3, 3), feature_group_count=2), tokens(2, 9, 7, 6))


@table.model(KERNELS, {"kernel": ((), (0, 1, 2), (3,))})
def conv_transpose():
    return call(partial(nnx.ConvTranspose, 6, K, (3, 2), strides=(2, 2)), tokens(2, 5, 4, 6))


@table.model("embedding", {"embedding": ((), (0,), (1,))})
def embed():
    return call(partial(nnx.Embed, VOCABULARY, D), words())


class TiedHead(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(VOCABULARY, D, rngs=rngs)
        self.dense = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, ids):
        return self.table.attend(jnp.tanh(self.dense(self.table(ids))))


@table.model(".*(embedding|kernel)", {"table/embedding": ((), (0,), (1,))})
def embed_with_a_tied_head():
    return call(TiedHead, words())


@table.model(KERNELS, {"query/kernel": ((), (0,), (1, 2)), "out/kernel": ((), (0, 1), (2,))})
def attention():
    def make(rngs):
        """Norms of heads of width 10: those of 3 would round too much."""
        settings = {"normalize_qk": True, "dropout_rate": 0.2, "decode": False, "deterministic": False}
        return nnx.MultiHeadAttention(HEADS, D, 10 * HEADS, **settings, rngs=rngs)

    return call(make, tokens())


@table.model(KERNELS)
def attention_that_decodes_with_a_cache():
    def make(rngs):
        model = nnx.MultiHeadAttention(HEADS, D, decode=True, rngs=rngs)
        model.init_cache((BATCH, TIME, D))
        return model

    return call(make, tokens(BATCH, 1, D))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.attention = nnx.LayerNorm(D, rngs=rngs), nnx.MultiHeadAttention(HEADS, D, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 17, rngs=rngs), nnx.Linear(17, D, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x), decode=False)
        return x + self.down(nnx.gelu(self.up(x)))


class Stack(nnx.Module):
    def __init__(self, rngs, remat=False):
        self.remat = remat
        self.layers = nnx.vmap(Block)(rngs.split(LAYERS))

    def __call__(self, x):
        def layer(x, block):
            return (nnx.remat(Block.__call__) if self.remat else Block.__call__)(block, x)

        return nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


@table.model(
    KERNELS,
    {
        "layers/attention/query/kernel": ((0,), (1,), (2, 3)),
        "layers/attention/out/kernel": ((0,), (1, 2), (3,)),
        "layers/up/kernel": ((0,), (1,), (2,)),
    },
)
def scan_over_layers():
    return call(Stack, tokens())


@table.model(KERNELS)
def scan_over_remat_layers():
    return call(partial(Stack, remat=True), tokens())


class Experts(nnx.Module):
    def __init__(self, rngs):
        self.experts = nnx.vmap(lambda rngs: nnx.Linear(D, K, rngs=rngs))(rngs.split(BATCH))

    def __call__(self, x):
        return nnx.vmap(lambda expert, x: expert(x))(self.experts, x)


@table.model(KERNELS, {"experts/kernel": ((0,), (1,), (2,))})
def vmap_over_experts():
    return call(Experts, tokens())


@table.model(KERNELS)
def remat():
    return call(Block, tokens(), run=nnx.remat(Block.__call__))


@table.model(KERNELS)
def jit():
    return call(Block, tokens(), run=nnx.jit(Block.__call__))


def rnn(cell):
    return call(lambda rngs: nnx.RNN(cell(D, K, rngs=rngs), rngs=rngs), tokens())


@table.model(KERNELS)
def optimized_lstm():
    return rnn(nnx.OptimizedLSTMCell)


@table.model(KERNELS)
def gru():
    return rnn(nnx.GRUCell)


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(5, K, (3, 3), use_bias=False, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(K, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(K, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.conv(x))).mean((1, 2))))


@table.model(KERNELS)
def batch_norm_and_dropout():
    return call(ConvNet, tokens(3, 8, 7, 5))


@table.model(KERNELS, materialize=True)
def weight_norm():
    rngs = nnx.Rngs(0)
    graph, state = nnx.split(nnx.WeightNorm(nnx.Linear(D, K, rngs=rngs), rngs=rngs))  # it has no abstract form
    return Call(lambda state, x: nnx.merge(graph, state, copy=True)(x), state, tokens())


test_laws = table.laws()
