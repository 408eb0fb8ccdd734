"""dm-haiku: `hk.transform(f).apply` takes a key between parameters and inputs."""

import jax
import jax.numpy as jnp
import pytest
from check import BATCH, HEADS, LAYERS, TIME, VOCABULARY, Call, D, K, Table, drawn, tokens, words

hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")

table = Table()
KERNELS = ".*/w"


def call(f, *args):
    model = hk.transform(f)
    return Call(model.apply, drawn(jax.eval_shape(model.init, jax.random.key(0), *args)), jax.random.key(3), *args)


def call_with_state(f, *args):
    model = hk.transform_with_state(f)
    params, state = drawn(jax.eval_shape(model.init, jax.random.key(0), *args))
    return Call(model.apply, params, state, jax.random.key(3), *args)


@table.model(KERNELS, {"linear/w": ((), (0,), (1,))})
def linear():
    return call(lambda x: hk.Linear(D)(hk.dropout(hk.next_rng_key(), 0.3, jax.nn.relu(hk.Linear(K)(x)))), tokens())


@table.model(KERNELS)
def mlp():
    return call(lambda x: hk.nets.MLP([17, K])(x), tokens())


@table.model(KERNELS, {"conv2_d/w": ((), (0, 1, 2), (3,))})
def conv():
    return call(lambda x: hk.Conv2D(K, (3, 2), stride=(2, 1), rate=1)(x), tokens(2, 9, 8, 6))


@table.model(KERNELS, {"conv2_d/w": ((), (0, 1, 2), (3,))})
def conv_of_channels_first():
    return call(lambda x: hk.Conv2D(K, (3, 2), data_format="NCHW")(x), tokens(2, 6, 9, 8))


@table.model(KERNELS, {"conv2_d_transpose/w": ((), (0, 1, 3), (2,))})
def conv_transpose():
    return call(lambda x: hk.Conv2DTranspose(K, (3, 2), stride=2)(x), tokens(2, 5, 4, 6))


@table.model(KERNELS)
def depthwise_conv():
    return call(lambda x: hk.DepthwiseConv2D(3, (3, 3))(x), tokens(2, 9, 7, 6))


@table.model(KERNELS)
def separable_conv():
    return call(lambda x: hk.SeparableDepthwiseConv2D(3, (3, 3))(x), tokens(2, 9, 7, 6))


@table.model(KERNELS, {"multi_head_attention/query/w": ((), (0,), (1,))})
def attention():
    def f(x):
        mask = jnp.tril(jnp.ones((1, 1, TIME, TIME)))
        return hk.MultiHeadAttention(HEADS, 5, model_size=K, w_init=hk.initializers.VarianceScaling())(
            x, x, x, mask=mask
        )

    return call(f, tokens())


@table.model(".*/embeddings", {"embed/embeddings": ((), (0,), (1,))})
def embed():
    return call(lambda ids: hk.Embed(VOCABULARY, D)(ids), words())


@table.model(".*/embeddings", {"embed/embeddings": ((), (0,), (1,))})
def embed_by_one_hot():
    return call(lambda ids: hk.Embed(VOCABULARY, D, lookup_style="ONE_HOT")(ids), words())


@table.model(".*/(embeddings|w)", {"embed/embeddings": ((), (0,), (1,))})
def embed_with_a_tied_head():
    def f(ids):
        embed = hk.Embed(VOCABULARY, D)
        return hk.Linear(D)(embed(ids)) @ embed.embeddings.T

    return call(f, words())


def unroll(make):
    def f(x):
        core = make()
        return hk.dynamic_unroll(core, x, core.initial_state(BATCH), time_major=False)[0]

    return call(f, tokens())


@table.model(KERNELS, {"lstm/linear/w": ((), (0,), (1,))})
def lstm():
    return unroll(lambda: hk.LSTM(K))


@table.model(".*/w_[ih]", {"gru/w_h": ((), (0,), (1,)), "gru/w_i": ((), (0,), (1,))})
def gru():
    """It slices w_h into gates."""
    return unroll(lambda: hk.GRU(K))


@table.model(KERNELS)
def vanilla_rnn():
    return unroll(lambda: hk.VanillaRNN(K))


def block(x):
    return x + hk.Linear(D, name="down")(jax.nn.gelu(hk.Linear(17, name="up")(x)))


@table.model(KERNELS, {"__layer_stack_no_per_layer/up/w": ((0,), (1,), (2,))})
def layer_stack():
    return call(lambda x: hk.experimental.layer_stack(LAYERS)(block)(x), tokens())


@table.model(KERNELS)
def layer_stack_of_remat():
    return call(lambda x: hk.experimental.layer_stack(LAYERS)(hk.remat(block))(x), tokens())


@table.model(KERNELS)
def batch_norm():
    def f(x):
        x = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(K, 3)(x), is_training=True)
        return hk.Linear(5)(jax.nn.relu(x).mean((1, 2)))

    return call_with_state(f, tokens(2, 8, 7, 5))


@table.model(KERNELS)
def mobilenet():
    def f(x):
        net = hk.nets.MobileNetV1(strides=(2,), channels=(10,), num_classes=5)
        return net(x, is_training=True)

    return call_with_state(f, tokens(2, 8, 8, 3))


test_laws = table.laws()
