"""Flax Linen: `model.apply` with its variables."""

import jax
from check import BATCH, HEADS, LAYERS, VOCABULARY, Call, D, K, Table, drawn, tokens, words
from flax import linen as nn

table = Table()
KERNELS = "params/.*kernel"


def call(model, *args, **kwargs):
    shapes = jax.eval_shape(model.init, {"params": jax.random.key(0), "dropout": jax.random.key(0)}, *args)
    return Call(model.apply, drawn(shapes), *args, **kwargs)


def sequential(*layers, **kwargs):
    return call(nn.Sequential(layers), tokens(), **kwargs)


@table.model(KERNELS, {"params/layers_0/kernel": ((), (0,), (1,))}, eager=True)
def dense():
    return sequential(nn.Dense(K), nn.relu, nn.Dense(D, use_bias=False))


@table.model(
    KERNELS,
    {"params/layers_0/kernel": ((), (0,), (1, 2)), "params/layers_1/kernel": ((), (0, 1), (2,))},
)
def dense_general():
    return sequential(nn.DenseGeneral((HEADS, 5)), nn.DenseGeneral(K, axis=(-2, -1)))


@table.model(KERNELS, {"params/layers_0/kernel": ((0,), (1,), (2,))})
def dense_general_with_batch_axes():
    return sequential(nn.DenseGeneral(K, axis=-1, batch_dims=(0,)))


@table.model(KERNELS, {"params/kernel": ((), (0,), (1, 2))})
def einsum():
    return call(nn.Einsum((D, HEADS, 5), "btd,dhk->bhtk"), tokens())


@table.model(
    KERNELS,
    {"params/query/kernel": ((), (0,), (1, 2)), "params/out/kernel": ((), (0, 1), (2,))},
)
def attention():
    return call(nn.MultiHeadDotProductAttention(HEADS), tokens())


@table.model(KERNELS)
def causal_attention():
    mask = nn.make_causal_mask(words())
    model = nn.MultiHeadDotProductAttention(HEADS, qkv_features=20, out_features=K)
    return call(model, tokens(), mask=mask)


@table.model(KERNELS)
def attention_that_decodes_with_a_cache():
    model = nn.MultiHeadDotProductAttention(HEADS, decode=True)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), tokens()))
    return Call(model.apply, variables, tokens(BATCH, 1, D), mutable=["cache"])


@table.model(KERNELS, {"params/layers_0/kernel": ((), (0, 1), (2,))})
def conv_1d():
    return sequential(nn.Conv(K, (3,)), nn.gelu, nn.Conv(D, (2,), strides=(2,), padding="VALID"))


@table.model(KERNELS, {"params/kernel": ((), (0, 1, 2), (3,))})
def conv_2d():
    return call(nn.Conv(K, (3, 2), strides=(2, 1)), tokens(2, 9, 8, 6))


@table.model(KERNELS, {"params/kernel": ((), (0, 1, 2), (3,))})
def dilated_conv():
    return call(
        nn.Conv(K, (3, 3), padding=((2, 2), (0, 1)), kernel_dilation=2, input_dilation=(1, 2)), tokens(2, 9, 8, 6)
    )


@table.model(KERNELS)
def grouped_conv():
    return call(nn.Conv(8, (3, 3), feature_group_count=2), tokens(2, 9, 7, 6))


@table.model(KERNELS)
def depthwise_conv():
    return call(nn.Conv(18, (3, 3), feature_group_count=6), tokens(2, 9, 7, 6))


@table.model(KERNELS, {"params/kernel": ((), (0, 1), (2,))})
def circular_conv():
    return call(nn.Conv(K, (3,), padding="CIRCULAR"), tokens())


@table.model(KERNELS, {"params/kernel": ((), (0, 1), (2,))})
def causal_conv():
    return call(nn.Conv(K, (3,), padding="CAUSAL", kernel_dilation=2), tokens())


@table.model(KERNELS, {"params/kernel": ((), (0, 1, 2), (3,))})
def conv_transpose():
    return call(nn.ConvTranspose(K, (3, 2), strides=(2, 2)), tokens(2, 5, 4, 6))


@table.model(KERNELS)
def conv_transpose_with_the_kernel_transposed():
    return call(nn.ConvTranspose(K, (3, 2), strides=(2, 1), transpose_kernel=True), tokens(2, 5, 4, 6))


@table.model(KERNELS)
def circular_conv_transpose():
    return call(nn.ConvTranspose(K, (3,), strides=(2,), padding="CIRCULAR"), tokens())


@table.model(KERNELS)
def conv_local():
    return call(nn.ConvLocal(K, (2,), padding="VALID"), tokens())


class TiedHead(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(VOCABULARY, D, name="table")
        return table.attend(nn.tanh(nn.Dense(D, name="dense")(table(ids))))


@table.model("params/embedding", {"params/embedding": ((), (0,), (1,))})
def embed():
    return call(nn.Embed(VOCABULARY, D), words())


@table.model("params/.*(kernel|embedding)", {"params/table/embedding": ((), (0,), (1,))})
def embed_with_a_tied_head():
    return call(TiedHead(), words())


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1], name="out")(nn.gelu(nn.Dense(17, name="in")(nn.RMSNorm()(x))))


class Stack(nn.Module):
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        return scan(self.block(name="layers"), x, None)[0]


@table.model(
    KERNELS,
    {
        "params/layers/attention/query/kernel": ((0,), (1,), (2, 3)),
        "params/layers/attention/out/kernel": ((0,), (1, 2), (3,)),
        "params/layers/in/kernel": ((0,), (1,), (2,)),
    },
)
def scan_over_layers():
    return call(Stack(), tokens())


@table.model(KERNELS)
def scan_over_remat_layers():
    return call(Stack(nn.remat(Block, prevent_cse=False)), tokens())


@table.model(KERNELS)
def remat():
    return call(nn.remat(Block)(), tokens())


@table.model(KERNELS, {"params/kernel": ((0,), (1,), (2,))})
def vmap_over_experts():
    experts = nn.vmap(nn.Dense, in_axes=0, out_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})
    return call(experts(K), tokens())


def rnn(cell, *shape):
    return call(nn.RNN(cell), tokens(*shape))


@table.model(KERNELS, {"params/cell/hi/kernel": ((), (0,), (1,)), "params/cell/ii/kernel": ((), (0,), (1,))})
def lstm():
    return rnn(nn.LSTMCell(K))


@table.model(KERNELS)
def optimized_lstm():
    return rnn(nn.OptimizedLSTMCell(K))


@table.model(KERNELS)
def gru():
    return rnn(nn.GRUCell(K))


@table.model(KERNELS)
def simple_rnn():
    return rnn(nn.SimpleCell(K))


@table.model(KERNELS)
def conv_lstm():
    return rnn(nn.ConvLSTMCell(4, (3, 3)), 2, 3, 5, 6, 5)


@table.model(KERNELS)
def bidirectional():
    return call(nn.Bidirectional(nn.RNN(nn.GRUCell(K)), nn.RNN(nn.GRUCell(K))), tokens())


class ConvNet(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(K, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))
        x = nn.avg_pool(x, (2, 2), (2, 2)).mean((1, 2))
        return nn.Dense(5)(nn.Dropout(0.3, deterministic=not self.train)(x))


@table.model(KERNELS)
def batch_norm_that_trains():
    return call(ConvNet(train=True), tokens(3, 8, 7, 5), mutable=["batch_stats"], rngs={"dropout": jax.random.key(3)})


@table.model(KERNELS)
def batch_norm_that_runs():
    return call(ConvNet(train=False), tokens(3, 8, 7, 5))


class Sown(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(K)(x)
        self.sow("intermediates", "hidden", x)
        return nn.Dense(D)(nn.Dropout(0.5, deterministic=False)(nn.relu(x)))


@table.model(KERNELS)
def dropout_and_intermediates():
    return call(Sown(), tokens(), mutable="intermediates", rngs={"dropout": jax.random.key(3)})


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(K, name="dense"))(x)


@table.model("params/dense/kernel", materialize="params/dense/kernel")
def weight_norm():
    return call(Normed(), tokens())


class SpectrallyNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.SpectralNorm(nn.Dense(K, name="dense"))(x, update_stats=False)


@table.model("params/dense/kernel")
def spectral_norm():
    return call(SpectrallyNormed(), tokens())


test_laws = table.laws()
