"""Whole models of other packages, tiny and random: a protein language model, Llama, GPT-NeoX, graph networks."""

import jax
import jax.numpy as jnp
import pytest
from check import BATCH, LAYERS, VOCABULARY, Call, D, K, Table, drawn, tokens, words

table = Table()


@table.model(
    ".*(proj|linear.)/weight",
    {
        "layers/attn/query_proj/weight": ((0,), (2,), (1,)),
        "logit_head/linear2/weight": ((), (0,), (1,)),  # also the embedding
    },
)
def esm2():
    """A transformer over stacked layers, with rotary embeddings, padding and a tied head."""
    eqx, esm2quinox = pytest.importorskip("equinox"), pytest.importorskip("esm2quinox")
    make = eqx.Partial(esm2quinox.ESM2, LAYERS, D, 3, token_dropout=True)
    params, static = eqx.partition(drawn(eqx.filter_eval_shape(make, key=jax.random.key(0))), eqx.is_inexact_array)
    proteins = esm2quinox.tokenise(["SP#DERM#N", "FOO"])
    return Call(lambda params, ids: jax.vmap(eqx.combine(params, static))(ids), params, jnp.asarray(proteins))


def penzai(build, config):
    """Penzai names the axes of its arrays, and gathers its parameters from all over the model."""
    pz = pytest.importorskip("penzai.pz")

    def init():
        _, params = pz.unbind_params(build(config, init_base_rng=jax.random.key(0)), freeze=True)
        return {param.label: param for param in params}

    def fn(params, ids):
        model = pz.bind_variables(build(config), list(params.values()))
        return model(pz.nx.wrap(ids).tag("batch", "seq")).unwrap("batch", "seq", "vocabulary")

    return Call(fn, drawn(jax.eval_shape(init)), words())


LLAMA = {
    "num_kv_heads": 2,
    "query_head_multiplier": 2,
    "embedding_dim": D,
    "projection_dim": 6,
    "mlp_hidden_dim": 17,
    "num_decoder_blocks": LAYERS,
    "vocab_size": VOCABULARY,
    "mlp_variant": "swiglu",
}
MATRICES = ".*/(attention/|mlp/|embedder|lm_head).*"


@table.model(MATRICES)
def llama():
    """Grouped query attention, in a loop over the layers."""
    common = pytest.importorskip("penzai.models.transformer.variants.llamalike_common")
    config = common.LlamalikeTransformerConfig(**LLAMA, tie_embedder_and_logits=False, use_layer_stack=True)
    return penzai(common.build_llamalike_transformer, config)


@table.model(MATRICES)
def gemma():
    """The embedding is the head, and attention slides over a window in every second layer."""
    common = pytest.importorskip("penzai.models.transformer.variants.llamalike_common")
    attention = (common.AttentionTypeSlidingWindowCausal(3), common.AttentionTypeGlobalCausal())
    config = common.LlamalikeTransformerConfig(**LLAMA, tie_embedder_and_logits=True, attention_type=attention)
    return penzai(common.build_llamalike_transformer, config)


def graph(jraph):
    """Six nodes, and nine edges between them."""
    return jraph.GraphsTuple(
        nodes=tokens(6, D),
        edges=tokens(9, 4),
        senders=jnp.array([0, 1, 2, 3, 4, 5, 0, 2, 4]),
        receivers=jnp.array([1, 2, 3, 4, 5, 0, 3, 5, 1]),
        n_node=jnp.array([4, 2]),
        n_edge=jnp.array([5, 4]),
        globals=tokens(2, 3),
    )


@table.model("params/Dense_[^2]/kernel")
def graph_networks():
    """A graph convolution, attention over edges, and an interaction of nodes, edges and globals."""
    jraph = pytest.importorskip("jraph")
    nn = pytest.importorskip("flax.linen")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, graph):
            graph = jraph.GraphConvolution(nn.Dense(K))(graph)
            graph = jraph.GAT(nn.Dense(D), lambda s, r, _: nn.Dense(1)(jnp.concatenate([s, r], axis=1)))(graph)
            joined = jraph.concatenated_args
            mlps = [joined(lambda x, k=k: nn.relu(nn.Dense(k)(x))) for k in (K, D, BATCH)]
            return jraph.GraphNetwork(*mlps)(graph)

    inputs = graph(jraph)
    shapes = jax.eval_shape(Network().init, jax.random.key(0), inputs)
    return Call(
        lambda params, nodes: Network().apply(params, inputs._replace(nodes=nodes)), drawn(shapes), inputs.nodes
    )


test_laws = table.laws()
