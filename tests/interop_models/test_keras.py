"""Keras 3 on JAX: `stateless_call(trainable, non_trainable, x)`."""

import os
import tempfile

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("KERAS_HOME", tempfile.gettempdir() + "/keras")  # importing it writes a file there

import pytest
from check import HEADS, TIME, VOCABULARY, Call, D, K, Table, tokens, words

keras = pytest.importorskip("keras", reason="keras is not installed")
layers = keras.layers

table = Table()
KERNELS = ".*kernel"


def call(*stack, x=None, training=False):
    """Trainable variables by their paths, as a dict."""
    x = tokens() if x is None else x
    keras.utils.set_random_seed(0)
    keras.backend.clear_session()
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype.name), *[make() for make in stack]])
    names = [v.path for v in model.trainable_variables]
    frozen = [v.value for v in model.non_trainable_variables]

    def fn(params, x):
        return model.stateless_call([params[name] for name in names], frozen, x, training=training)

    return Call(fn, {v.path: v.value for v in model.trainable_variables}, x)


@table.model("0|2", {"0": ((), (0,), (1,))})
def dense_with_a_list_of_variables():
    model = keras.Sequential([keras.Input((TIME, D)), layers.Dense(K, activation="relu"), layers.Dense(D)])
    trainable, frozen = (
        [v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables)
    )
    return Call(model.stateless_call, trainable, frozen, tokens())


@table.model(KERNELS, {"sequential/dense/kernel": ((), (0,), (1,))})
def dense():
    return call(lambda: layers.Dense(K, activation="relu"), lambda: layers.Dense(D))


@table.model(KERNELS, {"sequential/einsum_dense/kernel": ((), (0,), (1, 2))})
def einsum_dense():
    return call(lambda: layers.EinsumDense("btd,dhk->bthk", (None, HEADS, 5), bias_axes="hk"))


@table.model(KERNELS, {"sequential/conv2d/kernel": ((), (0, 1, 2), (3,))})
def conv():
    return call(lambda: layers.Conv2D(K, (3, 2), strides=2, padding="same"), x=tokens(2, 9, 8, 6))


@table.model(KERNELS)
def dilated_and_grouped_conv():
    return call(lambda: layers.Conv2D(8, 3, dilation_rate=2, groups=2), x=tokens(2, 9, 7, 6))


@table.model(KERNELS)
def causal_conv():
    return call(lambda: layers.Conv1D(K, 3, padding="causal"))


@table.model(KERNELS)
def depthwise_conv():
    return call(lambda: layers.DepthwiseConv2D(3, depth_multiplier=3), x=tokens(2, 9, 7, 6))


@table.model(KERNELS)
def separable_conv():
    return call(lambda: layers.SeparableConv2D(K, 3, depth_multiplier=3), x=tokens(2, 9, 7, 6))


@table.model(KERNELS)
def conv_transpose():
    return call(lambda: layers.Conv2DTranspose(K, 3, strides=2), x=tokens(2, 5, 4, 6))


@table.model(".*embeddings", {"sequential/embedding/embeddings": ((), (0,), (1,))})
def embedding():
    return call(lambda: layers.Embedding(VOCABULARY, D), x=words())


class SelfAttention(layers.Layer):
    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(HEADS, 5)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x, use_causal_mask=True)


@table.model(KERNELS, {"sequential/self_attention/multi_head_attention/query/kernel": ((), (0,), (1, 2))})
def attention():
    return call(SelfAttention)


@table.model(KERNELS)
def lstm():
    return call(lambda: layers.LSTM(K, return_sequences=True))


@table.model(KERNELS)
def gru():
    return call(lambda: layers.GRU(K, return_sequences=True))


@table.model(KERNELS)
def batch_normalization():
    return call(
        lambda: layers.Conv2D(K, 3, use_bias=False),
        layers.BatchNormalization,
        layers.ReLU,
        layers.GlobalAveragePooling2D,
        lambda: layers.Dense(5),
        x=tokens(3, 8, 7, 5),
        training=True,
    )


test_laws = table.laws()
