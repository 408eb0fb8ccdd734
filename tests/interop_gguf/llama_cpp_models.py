"""Tiny models as llama.cpp has them: their GGUF, written as its converters do, and their logits."""

import ctypes

import gguf
import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not here: make test-gguf builds it")

# Names of tensors are those of the `gguf` package; what is written here by hand is what converters do to numbers.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
ARCHITECTURES |= {"gemma2": "gemma2", "gemma3_text": "gemma3"}


def write_model(path, facts, tensors, architecture=None, fused=False, with_head=False):
    """Write a model in fp32.

    Args:
        facts: its config.json.
        tensors: those of its published files.
        architecture: as llama.cpp calls it; by default that of the config.
        fused: join q, k and v, and gate and up, as Phi-3 has them.
        with_head: write a table that is the head a second time, as the head.
    """
    architecture = architecture or ARCHITECTURES[facts["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    write_facts(writer, facts, architecture)
    if with_head:
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    for name, tensor in converted(architecture, facts, tensors, fused).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_facts(writer, facts, architecture):
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(facts["vocab_size"])
    writer.add_context_length(256)
    writer.add_embedding_length(facts["hidden_size"])
    writer.add_block_count(facts["num_hidden_layers"])
    writer.add_feed_forward_length(facts["intermediate_size"])
    writer.add_head_count(facts["num_attention_heads"])
    writer.add_head_count_kv(facts["num_key_value_heads"])
    writer.add_key_length(facts["head_dim"])
    writer.add_value_length(facts["head_dim"])
    writer.add_rope_dimension_count(facts["head_dim"])
    writer.add_rope_freq_base(facts["rope_theta"])
    writer.add_layer_norm_rms_eps(facts["rms_norm_eps"])
    if "num_experts" in facts:
        writer.add_expert_count(facts["num_experts"])
        writer.add_expert_used_count(facts["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(facts["moe_intermediate_size"])
    if architecture in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(facts["sliding_window"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(facts["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(facts["final_logit_softcapping"])


def converted(architecture, facts, tensors, fused):
    """The tensors of a GGUF by their names."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, facts["num_hidden_layers"])
    if fused:
        tensors = joined(tensors)
    stacks, found = {}, {}
    for name, tensor in tensors.items():
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = facts["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if ".experts." in name:
            layer, _, rest = name.partition(".experts.")
            expert, _, last = rest.partition(".")
            stacks.setdefault(f"{layer}.experts.{last}", {})[int(expert)] = tensor
        else:
            found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor
    for name, each in stacks.items():
        found[names.get_name(name, try_suffixes=(".weight",))] = np.stack([each[e] for e in range(len(each))])
    return found


def joined(tensors):
    """The tensors of a Llama under the names of Phi-3."""
    found = {}
    for name, tensor in tensors.items():
        for first, whole, parts in (
            ("self_attn.q_proj", "self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_proj", "mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            if first in name:
                own = [tensors[name.replace(first, part)] for part in parts]
                found[name.replace(first, whole)] = np.concatenate(own)
        if not any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            found[name] = tensor
    return found


class LlamaCpp:
    """A model that llama.cpp has loaded, in fp32 and without flash attention."""

    def __init__(self, path, tokens=64):
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp does not load {path}: {_log[-3:]}"
        own = llama_cpp.llama_context_default_params()
        own.n_ctx = own.n_batch = own.n_ubatch = tokens
        own.n_threads = own.n_threads_batch = 1
        own.type_k = own.type_v = 0  # fp32
        own.flash_attn_type = 0  # off
        self.context = llama_cpp.llama_init_from_model(self.model, own)
        assert self.context, f"llama.cpp makes no context for {path}: {_log[-3:]}"
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def adapter(self, path):
        """Load an adapter; a null pointer, which is false, where llama.cpp refuses it."""
        return llama_cpp.llama_adapter_lora_init(self.model, str(path).encode())

    def logits(self, ids, *adapters):
        """Return the logits of each token of one text, with adapters of these scales: `(adapter, scale)`."""
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(adapters))(*(handle for handle, _ in adapters))
        scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
        assert llama_cpp.llama_set_adapters_lora(self.context, handles, len(adapters), scales) == 0
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
            batch.seq_id[i][0] = 0
        assert llama_cpp.llama_decode(self.context, batch) == 0
        rows = [llama_cpp.llama_get_logits_ith(self.context, i)[: self.vocabulary] for i in range(len(ids))]
        llama_cpp.llama_batch_free(batch)
        return np.array(rows, np.float32)

    def close(self):
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


_log = []


@llama_cpp.llama_log_callback
def _quiet(level, text, user_data):
    """Keep what llama.cpp says, for messages; it says much."""
    _log.append(text.decode(errors="replace"))
    del _log[:-50]
