"""Small chat templates in the styles of published ones, and a folder with a tiny tokenizer for each."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {{- message.content + '<|im_end|>' }}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Reasoning is only left in the last turn.
THINKING = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1] %}
        {%- if loop.last %}
            {%- set reasoning = message.content.split('</think>')[0].replace('<think>', '') %}
            {{- '<think>\\n' + reasoning.strip() + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content.strip() }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA_3 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' }}
{{- message['content'] | trim + '<end_of_turn>' }}
{{- '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

MISTRAL = """
{{- bos_token }}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and message == asked[-1] %}
            {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""

ANSWERS = {  # how each writes what the assistant wrote
    "chatml": "{{- message.content + '<|im_end|>' }}",
    "llama-3": "{{- message.content | trim + '<|eot_id|>' }}",
    "gemma": "{{- message['content'] | trim + '<end_of_turn>' }}",
    "mistral": "{{- ' ' + message.content + eos_token }}",
}


def marked(name):
    """Return a template that says itself what the assistant wrote."""
    template, answer = SPECIAL[name][0], ANSWERS[name]
    assert template.count(answer) == 1
    block = f"{{%- generation %}}{answer}{{%- endgeneration %}}"
    return template.replace(
        answer, f"{{%- if message.role == 'assistant' %}}{block}{{%- else %}}{answer}{{%- endif %}}"
    )


SPECIAL = {
    "chatml": (CHATML, "<|endoftext|>", "<|im_end|>", ("<|im_start|>",)),
    "thinking": (THINKING, "<|endoftext|>", "<|im_end|>", ("<|im_start|>",)),
    "llama-3": (
        LLAMA_3,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": (GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "mistral": (MISTRAL, "<s>", "</s>", ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")),
}


def of_bytes():
    """Return a tokenizer of bytes, as those of Llama 3 and Qwen, with a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ċ", "Ċ"), ("e", "r"), ("H", "i")]
    words = [*alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def of_pieces():
    """Return a tokenizer of characters, as those of Llama 2, Mistral and Gemma; what is no word becomes bytes."""
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("\n", "\n"), ("e", "r"), ("H", "i")]
    letters = [chr(i) for i in range(32, 127) if chr(i) != " "]
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\n", "▁", *letters, *(a + b for a, b in merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def make_folder(folder, name, template=None, pieces=False):
    """Write the files of a tiny tokenizer with one of these templates, and return the folder."""
    own, bos, eos, others = SPECIAL[name]
    tokenizer = of_pieces() if pieces else of_bytes()
    tokenizer.add_special_tokens([bos, eos, *others])
    if name != "chatml":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": eos, "special": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template or own}))
    stops = [i for token in others if (i := tokenizer.token_to_id(token)) and token in ("<|eot_id|>", "<end_of_turn>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.token_to_id(eos), *stops]}))
    return folder
