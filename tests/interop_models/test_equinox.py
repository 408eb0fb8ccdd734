"""Equinox: a model is a pytree, its arrays are the parameters, and weights are [out, in]."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from check import BATCH, HEADS, LAYERS, TIME, VOCABULARY, Call, D, K, Table, drawn, tokens, words

eqx = pytest.importorskip("equinox", reason="equinox is not installed")
nn = eqx.nn

table = Table()
WEIGHTS = ".*weight"


def call(make, *args, run=None):
    """`make(key=...)` gives the model."""
    shapes = eqx.filter_eval_shape(make, key=jax.random.key(0))
    params, static = eqx.partition(drawn(shapes), eqx.is_inexact_array)
    run = run or (lambda model, *args: jax.vmap(model)(*args))
    return Call(lambda params, *args: run(eqx.combine(params, static), *args), params, *args)


@table.model(WEIGHTS, {"weight": ((), (1,), (0,))}, eager=True)
def linear():
    return call(partial(nn.Linear, D, K), tokens(BATCH, D))


@table.model(WEIGHTS)
def linear_of_one_vector():
    return call(partial(nn.Linear, D, K), tokens(D), run=lambda model, x: model(x))


@table.model(WEIGHTS)
def filter_jit():
    model = partial(nn.MLP, D, K, 17, 1)
    return call(model, tokens(BATCH, D), run=eqx.filter_jit(lambda model, x: jax.vmap(model)(x)))


@table.model(WEIGHTS)
def filter_vmap_and_checkpoint():
    model = partial(nn.MLP, D, K, 17, 1)
    return call(model, tokens(BATCH, D), run=lambda model, x: eqx.filter_vmap(eqx.filter_checkpoint(model))(x))


@table.model(WEIGHTS, {"weight": ((), (1, 2, 3), (0,))})
def conv():
    return call(partial(nn.Conv2d, 6, K, (3, 2), stride=(2, 1), padding=1), tokens(2, 6, 9, 8))


@table.model(WEIGHTS)
def dilated_and_grouped_conv():
    return call(partial(nn.Conv1d, 6, 8, 3, groups=2, dilation=2, padding="SAME"), tokens(2, 6, 11))


@table.model(WEIGHTS)
def circular_conv():
    return call(partial(nn.Conv1d, 6, K, 3, padding="SAME", padding_mode="CIRCULAR"), tokens(2, 6, 11))


@table.model(WEIGHTS, {"weight": ((), (1, 2, 3), (0,))})
def conv_transpose():
    return call(partial(nn.ConvTranspose2d, 6, K, 3, stride=2), tokens(2, 6, 4, 5))


@table.model(WEIGHTS, {"weight": ((), (0,), (1,))})
def embedding():
    return call(partial(nn.Embedding, VOCABULARY, D), words(TIME))


@table.model(WEIGHTS, {"weight": ((), (0,), (1,))})
def embedding_of_one_token():
    return call(partial(nn.Embedding, VOCABULARY, D), jnp.int32(4), run=lambda model, token: model(token))


class TiedHead(eqx.Module):
    table: nn.Shared

    def __init__(self, key):
        embedding, head = nn.Embedding(VOCABULARY, D, key=key), nn.Linear(D, VOCABULARY, use_bias=False, key=key)
        self.table = nn.Shared((embedding, head), where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight)

    def __call__(self, token):
        embedding, head = self.table()
        return head(jnp.tanh(embedding(token)))


@table.model(WEIGHTS, {"table/pytree/0/weight": ((), (0,), (1,))})
def embedding_with_a_tied_head():
    return call(TiedHead, words(TIME))


def attend(model, x):
    mask = jnp.tril(jnp.ones((TIME, TIME), bool))
    return jax.vmap(lambda x: model(x, x, x, mask=mask))(x)


@table.model(WEIGHTS, {"query_proj/weight": ((), (1,), (0,))})
def attention():
    return call(partial(nn.MultiheadAttention, HEADS, D), tokens(BATCH, TIME, D), run=attend)


def unroll(cell, state):
    def run(cell, xs):
        def one(xs):
            return jax.lax.scan(lambda h, x: ((h := cell(x, h)), h), state, xs)[1]

        return jax.vmap(one)(xs)

    return call(cell, tokens(BATCH, TIME, D), run=run)


@table.model(WEIGHTS + "_[ih]h", {"weight_ih": ((), (1,), (0,)), "weight_hh": ((), (1,), (0,))})
def gru():
    return unroll(partial(nn.GRUCell, D, K), jnp.zeros(K))


@table.model(WEIGHTS + "_[ih]h")
def lstm():
    return unroll(partial(nn.LSTMCell, D, K), (jnp.zeros(K), jnp.zeros(K)))


class Stack(eqx.Module):
    layers: nn.MLP

    def __init__(self, key):
        self.layers = eqx.filter_vmap(lambda key: nn.MLP(D, D, 17, 1, key=key))(jax.random.split(key, LAYERS))

    def __call__(self, x):
        arrays, static = eqx.partition(self.layers, eqx.is_array)
        return jax.lax.scan(lambda x, layer: (eqx.combine(layer, static)(x), None), x, arrays)[0]


@table.model(WEIGHTS, {"layers/layers/0/weight": ((0,), (2,), (1,))})
def scan_over_layers():
    return call(Stack, tokens(BATCH, D))


class ConvNet(eqx.Module):
    conv: nn.Conv2d
    norm: nn.BatchNorm
    dropout: nn.Dropout
    head: nn.Linear

    def __init__(self, key):
        self.conv, self.norm = nn.Conv2d(5, K, 3, key=key), nn.BatchNorm(K, "batch", mode="batch")
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(K, 5, key=key)

    def __call__(self, x, state, key):
        x, state = self.norm(self.conv(x), state)
        return self.head(self.dropout(jax.nn.relu(x).mean((1, 2)), key=key)), state


@table.model("0/(conv|head)/weight")
def batch_norm_and_dropout():
    def run(model_and_state, x):
        model, state = model_and_state
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None, None), out_axes=(0, None))
        y, state = run(x, state, jax.random.key(3))
        return y, jax.tree.leaves(state)

    return call(nn.make_with_state(ConvNet), tokens(3, 5, 8, 7), run=run)


@table.model(WEIGHTS, materialize=True)
def weight_norm():
    return call(lambda key: nn.WeightNorm(nn.Linear(D, K, key=key)), tokens(BATCH, D))


test_laws = table.laws()
