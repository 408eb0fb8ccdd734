"""From a file of examples to batches: what is read, what is learned of it, and where each token is."""

import contextlib
import itertools
import json
import math
import re
import sys
from datetime import datetime
from functools import partial

import assets
import chat_templates
import decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lora
from lora_jax.recipes import examples as examples_of
from lora_jax.recipes.chat import prompt, render
from lora_jax.recipes.examples import Completion, Conversation, Preference, Text, make_example, read_examples
from lora_jax.recipes.packed_rows import pack, packed_batches
from lora_jax.recipes.preferences import PairLogProbs, dpo_loss, pair_log_probs, preference_batches
from lora_jax.recipes.templates import Template
from lora_jax.recipes.tokenizer import Tokenizer
from lora_jax.recipes.tokens import Tokenized, TokenizedPairs, tokenized, tokenized_pairs

NOW = datetime(2026, 2, 3)
MESSAGES = (
    {"role": "user", "content": "Say the thing, other"},
    {"role": "assistant", "content": "Hi 🙂 the\n\nend"},
    {"role": "user", "content": "\nHi"},
    {"role": "assistant", "content": "Höther."},
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        name: Tokenizer.load(chat_templates.make_folder(folder / name, name), now=NOW)
        for name in chat_templates.SPECIAL
    }


def marked(tokenizer, name):
    """Return the tokenizer with a template that marks the answers itself."""
    source = chat_templates.marked(name)
    return Tokenizer(tokenizer._tokenizer, tokenizer.special, tokenizer.eos_ids, {"default": source}, NOW)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


# Files ----------------------------------------------------------------------------------------------------------------

RECORDS = {
    "text": ({"text": "a", "id": 3}, Text("a")),
    "completion": ({"prompt": "a", "completion": "b"}, Completion("a", "b")),
    "messages": ({"messages": [user("a"), assistant("b")], "tools": None}, Conversation((user("a"), assistant("b")))),
    "tools": (
        {"messages": [user("a"), assistant(None)], "tools": '[{"name": "f"}]'},
        Conversation((user("a"), {"role": "assistant"}), ({"name": "f"},)),
    ),
    "messages to complete": (
        {"prompt": [user("a")], "completion": [assistant("b")]},
        Conversation((user("a"), assistant("b")), (), 1),
    ),
    "preference": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        Preference(Completion("a", "b"), Completion("a", "c")),
    ),
    "preference of messages": (
        {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        Preference(Conversation((user("a"), assistant("b")), (), 1), Conversation((user("a"), assistant("c")), (), 1)),
    ),
    "preference after messages": (
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        Preference(Conversation((user("a"), assistant("b")), (), 1), Conversation((user("a"), assistant("c")), (), 1)),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_each_kind_of_record(tmp_path, name):
    record, expected = RECORDS[name]
    path = tmp_path / "data"
    path.write_text("\ufeff" + f"\n{json.dumps(record)}\r\n  \n{json.dumps(record)}", encoding="utf-8")
    found = read_examples(path)
    for _ in range(2):  # each loop reads anew
        assert [*found] == [expected, expected]
        assert [example.line for example in found] == [2, 4]
    assert (found.kind, found.read, found.bad) == (type(expected), 2, 0)


@pytest.mark.parametrize("name", RECORDS)
def test_parquet_holds_the_same(tmp_path, name):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    record, expected = RECORDS[name]
    path = tmp_path / "data"
    parquet.write_table(pyarrow.Table.from_pylist([{**record, "other": b"\xff"}] * 300), path)
    found = [*read_examples(path)]
    assert found == [expected] * 300
    assert found[-1].line == 300
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(lora.LoraError, match="cannot be read as Parquet"):
        next(iter(read_examples(path)))


def test_parquet_without_pyarrow_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(lora.LoraError, match=re.escape("pip install 'lora_jax[parquet]'")):
        next(iter(read_examples(tmp_path / "data.parquet")))


BAD = {
    '{"text": "a"': "is no JSON",
    '{"text": 3}': '"text" is 3, expected text',
    '{"text": ""}': "expected text",
    '{"text": "a", "text": "b"}': "twice",
    "3": "it is 3, expected a JSON object",
    "[{}]": "it is a list",
    "{}": "expected one of these sets: .*messages",
    '{"prompt": "a", "answer": "b"}': "expected one of these sets",
    '{"messages": []}': "expected a list of messages",
    '{"messages": "a"}': "expected a list of messages",
    '{"messages": [{"content": "a"}]}': '"messages" 0 is .*"role"',
    '{"messages": [{"role": "user", "content": 3}]}': "has the content 3",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "only text is read",
    '{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}': "has the weight 0.5",
    '{"conversations": [{"from": "human", "value": "a"}]}': '"conversations", which is not supported: write "messages"',
    '{"messages": [{"role": "user", "content": "a"}], "images": ["a.png"]}': '"images", which is not supported',
    '{"chosen": "a", "rejected": "b"}': 'without a "prompt"',
    '{"prompt": "x", "chosen": "a", "rejected": "a"}': "are the same",
    '{"chosen": [{"role": "user"}], "rejected": [{"role": "system"}]}': "not two ways",
    '{"text": "a", "tools": 3, "messages": [{"role": "user"}]}': '"tools" is 3',
    '{"prompt": "a", "completion": "b"}': "this is a Completion, and what comes before it is a Text",
    '{"text": "\\ud800"}': "no text",
    '{"text": "' + "a" * 300 + '"}': "more than 200 bytes",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_lines_are_named_or_counted(tmp_path, monkeypatch, line):
    monkeypatch.setattr(examples_of, "LONGEST_LINE", 200)
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n')
    with pytest.raises(lora.LoraError, match=BAD[line]) as found:
        list(read_examples(path))
    assert str(found.value).startswith(f"{path}, line 2: ")
    left = read_examples(path, skip_bad=True)
    assert [*left] == [Text("a"), Text("b")]
    assert (left.read, left.bad) == (2, 1)
    assert re.search(BAD[line], left.first_bad)


def test_files_without_examples(tmp_path):
    with pytest.raises(lora.LoraError, match="cannot be read"):
        read_examples(tmp_path / "missing")
    with pytest.raises(lora.LoraError, match="is a folder"):
        read_examples(tmp_path)
    path = tmp_path / "data"
    path.write_text("\n\n")
    with pytest.raises(lora.LoraError, match="holds no examples"):
        list(read_examples(path))
    path.write_text("{}\n3\n")
    with pytest.raises(lora.LoraError, match="all 2 were left out, the first for line 1: it has the keys"):
        list(read_examples(path, skip_bad=True))
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(lora.LoraError, match="line 1: it is no JSON: 'utf-8' codec"):
        list(read_examples(path))


KEYS = ["messages", "prompt", "completion", "text", "chosen", "rejected", "tools", "role", "content", "weight", "type"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "a", "user", "assistant", "text", "[{}]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=100)
@given(record=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4) | JSON)
def test_whatever_a_line_holds(tokenizers, record):
    """It is an example whose tokens can be made, or an error of the library says why not."""
    with contextlib.suppress(lora.LoraError):
        example = make_example(record, 3)
        (tokenized_pairs if isinstance(example, Preference) else tokenized)([example], tokenizers["gemma"], 50)


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=60) | st.text('{}[]":text,ab\\n\\\\u0d8', max_size=60).map(str.encode))
def test_whatever_a_file_holds(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_bytes(b" " + data)  # nothing that begins as Parquet does
    found = read_examples(path, skip_bad=True)
    try:
        count = len([*found])
    except lora.LoraError as error:
        assert "holds no examples" in str(error)  # noqa: PT017 (another error may not come)
    else:
        assert found.read == count > 0


# Tokenizers -----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_reads_its_folder(tokenizers):
    llama = tokenizers["llama-3"]
    assert [llama.decode([i], special=True) for i in llama.eos_ids] == ["<|end_of_text|>", "<|eot_id|>"]
    assert llama.eos_id == llama.eos_ids[0]
    text = "the other 🙂"
    tokens = llama.encode(text)
    assert len(tokens.ids) > 4  # neither cut nor padded
    assert llama.decode(tokens.ids) == text
    assert llama.encode(text, special=True).ids == [llama.encode("<|begin_of_text|>").ids[0], *tokens.ids]
    assert [text[a:b] for a, b in tokens.offsets[:3]] == ["the", " ", "o"]


def test_a_tokenizer_has_to_fit_the_embeddings(tokenizers):
    tokenizer = tokenizers["chatml"]
    tokenizer.check(tokenizer.size)
    with pytest.raises(lora.LoraError, match=r"its last token, '<\|im_start\|>', is number 264.* 264 tokens"):
        tokenizer.check(tokenizer.size - 1)
    with pytest.warns(lora.LoraWarning, match="of another model"):
        tokenizer.check(2 * tokenizer.size)


def test_files_of_tokenizers_that_are_wrong(tmp_path):
    with pytest.raises(lora.LoraError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    folder = chat_templates.make_folder(tmp_path / "a", "gemma")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for key, value, problem in [
        ("chat_template", 3, "chat_template is 3"),
        ("chat_template", [{"template": "a"}], "a name and a template"),
        ("eos_token", 3, "eos_token is 3"),
    ]:
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(lora.LoraError, match=problem):
            Tokenizer.load(folder)
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.template().source, tokenizer.template(tools=True).source) == ("A", "B")
    (folder / "chat_template.jinja").write_text("C")
    assert Tokenizer.load(folder).template().source == "C"
    (folder / "chat_template.jinja").unlink()
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(lora.LoraError, match="has no chat template"):
        Tokenizer.load(folder).template()
    (folder / "generation_config.json").write_text('{"eos_token_id": "a"}')
    with pytest.raises(lora.LoraError, match="eos_token_id is 'a'"):
        Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(lora.LoraError, match="is no tokenizer"):
        Tokenizer.load(folder)


# Chat templates -------------------------------------------------------------------------------------------------------

ANSWERS = {
    "chatml": ["Hi 🙂 the\n\nend<|im_end|>", "Höther.<|im_end|>"],
    "thinking": ["<think>\nHöther.\n</think>\n\nHöther.<|im_end|>"],
    "llama-3": ["Hi 🙂 the\n\nend<|eot_id|>", "Höther.<|eot_id|>"],
    "gemma": ["Hi 🙂 the\n\nend<end_of_turn>", "Höther.<end_of_turn>"],
    "mistral": [" Hi 🙂 the\n\nend</s>", " Höther.</s>"],
}


def answers_of(conversation, tokenizer):
    found = render(conversation, tokenizer.template(bool(conversation.tools)), tokenizer.special_texts)
    return [found.text[start:stop] for start, stop in found.answers], found


@pytest.mark.parametrize("name", ANSWERS)
def test_what_the_assistant_wrote_is_learned(tokenizers, name):
    """And nothing else: the tokens, put together again, are the answers with what ends them."""
    tokenizer = tokenizers[name]
    conversation = Conversation(MESSAGES)
    answers, found = answers_of(conversation, tokenizer)
    assert answers == ANSWERS[name]
    assert bool(found.last_only) == (name == "thinking")
    tokens = tokenized([conversation], tokenizer, 1000)
    assert tokenizer.decode(tokens.ids, special=True) == found.text
    runs = [
        tokenizer.decode([i for _, i in run], special=True)
        for is_learned, run in itertools.groupby(
            zip(tokens.learned, tokens.ids.tolist(), strict=True), key=lambda one: one[0]
        )
        if is_learned
    ]
    assert runs == ANSWERS[name]
    assert found.text.startswith(prompt(Conversation(MESSAGES[:3]), tokenizer.template()))


def test_turns_of_the_context_and_of_weight_0_are_not_learned(tokenizers):
    for tokenizer in (tokenizers["chatml"], marked(tokenizers["chatml"], "chatml")):
        last = [ANSWERS["chatml"][1]]
        assert answers_of(Conversation(MESSAGES, context=2), tokenizer)[0] == last
        weighted = (MESSAGES[0], {**MESSAGES[1], "weight": 0}, *MESSAGES[2:])
        assert answers_of(Conversation(weighted), tokenizer)[0] == last


TEXTS = st.text("aHi the\n.<>|_ö🙂", max_size=12)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from([*chat_templates.ANSWERS]), texts=st.lists(TEXTS, min_size=2, max_size=6))
def test_both_ways_to_find_answers_agree(tokenizers, name, texts):
    """A template that marks them, and one of which they are found turn by turn."""
    conversation = Conversation(tuple((user, assistant)[i % 2](text) for i, text in enumerate(texts)))
    tokenizer = tokenizers[name]
    ways = [render(conversation, one.template(), one.special_texts) for one in (tokenizer, marked(tokenizer, name))]
    assert ways[0] == ways[1]
    assert len(ways[0].answers) == len(texts) // 2


def test_reasoning_of_one_turn_is_learned_without_a_note(tokenizers):
    conversation = Conversation((user("a"), assistant("<think>b</think>c")))
    answers, found = answers_of(conversation, tokenizers["thinking"])
    assert answers == ["<think>\nb\n</think>\n\nc<|im_end|>"]
    assert not found.last_only


def test_where_tools_move_only_the_last_answer_is_learned(tokenizers):
    found = answers_of(Conversation(MESSAGES, ({"name": "f"},)), tokenizers["mistral"])
    assert found[0] == [" Höther.</s>"]
    assert '[AVAILABLE_TOOLS][{"name": "f"}]' in found[1].text
    assert found[1].last_only.startswith("turn 2: the chat template writes the messages before it in another way")


def template_of(source):
    return Template(source, {}, NOW)


@pytest.mark.parametrize(
    ("source", "messages", "problem"),
    [
        ("{% for %}", MESSAGES, "template of the model's folder is no Jinja, in its line 1"),
        ("{{ 1 / 0 }}", MESSAGES, "fails for it: ZeroDivisionError"),
        ("{{ messages[9].content + 1 }}", MESSAGES, "refuses it: list object has no element 9"),
        ("{{ ''.__class__.__mro__ }}", MESSAGES, "refuses it: .*unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", MESSAGES, "fails for it: OverflowError"),
        (chat_templates.MISTRAL, ({"role": "system", "content": "a"}, *MESSAGES), "Only user and assistant"),
        (chat_templates.CHATML, MESSAGES[:1], "none of its 1 messages is an answer"),
        (chat_templates.CHATML, (user("a"), assistant("b", weight=0)), "none of its 2 messages is an answer"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", MESSAGES, "leaves out this answer"),
        (
            "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
            MESSAGES,
            "turn 4: .*before it in another way",
        ),
        (chat_templates.CHATML, (user("\ufdd0"), assistant("b")), "U\\+FDD0"),
        ("{{ messages | length }}", MESSAGES[:2], "turn 2: .* before it in another way once more follow: '2' in"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(source, messages, problem):
    with pytest.raises(lora.LoraError, match=problem):
        render(Conversation(tuple(messages)), template_of(source))


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize(
    ("templates", "problem"),
    [
        ({"default": "{% for %}"}, "the chat template of the model's folder is no Jinja"),
        ({}, ".* has no chat template"),
    ],
)
def test_what_is_wrong_with_the_template_is_no_fault_of_a_line(tokenizers, templates, problem, skip_bad, monkeypatch):
    tokenizer = tokenizers["thinking"]
    monkeypatch.setattr(tokenizer, "templates", templates)
    with pytest.raises(lora.LoraError, match=f"^{problem}"):
        tokenized([Conversation(tuple(MESSAGES))], tokenizer, 50, skip_bad=skip_bad)


def test_a_marked_turn_in_several_parts_has_no_weights():
    source = "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}"
    assert render(Conversation(MESSAGES), template_of(source)).answers == [(0, 4), (4, 13), (13, 17), (17, 26)]
    with pytest.raises(lora.LoraError, match="marks 4 parts as the assistant's, and there are 2 turns"):
        render(Conversation(MESSAGES, context=2), template_of(source))


@pytest.mark.assets
@pytest.mark.skipif(assets.cached(assets.SMOLLM2) is None, reason="needs SmolLM2: make assets")
def test_the_template_of_smollm2_is_what_is_written_by_hand():
    file = decoder.open_gguf(*assets.cached(assets.SMOLLM2))
    templates = {"default": file.metadata["tokenizer.chat_template"]}
    tokenizer = Tokenizer(decoder.load_tokenizer(file), {"eos_token": decoder.STOP}, templates=templates)
    tokenizer.check(49_152)
    messages = ({"role": "system", "content": "Be short."}, user("What is 2 + 2?"), assistant("4, of course."))
    found = tokenized([Conversation(messages)], tokenizer, 100)
    prompt = decoder.chat("What is 2 + 2?", system="Be short.")
    assert tokenizer.decode(found.ids, special=True) == f"{prompt}4, of course.{decoder.STOP}\n"
    assert learned_text(found, tokenizer) == f"4, of course.{decoder.STOP}"
    assert found.ids[: len(tokenizer.encode(prompt).ids)].tolist() == tokenizer.encode(prompt).ids


# Tokens ---------------------------------------------------------------------------------------------------------------


def learned_text(tokens, tokenizer):
    return tokenizer.decode(tokens.ids[tokens.learned], special=True)


def test_completions_and_texts_end_with_the_end(tokenizers):
    tokenizer = tokenizers["gemma"]
    tokens = tokenized([Completion("Hi the", " other")], tokenizer, 100)
    assert tokenizer.decode(tokens.ids, special=True) == "<bos>Hi the other<eos>"
    assert learned_text(tokens, tokenizer) == " other<eos>"
    tokens = tokenized([Text("Hi the"), Text("<bos>Hi<eos>")], tokenizer, 100)  # what is there is not added again
    assert tokenizer.decode(tokens.ids, special=True) == "<bos>Hi the<eos><bos>Hi<eos>"
    assert tokens.learned.tolist() == [False, True, True, True, False, True, True]
    assert tokens.lengths.tolist() == [3, 2]
    assert tokens.select([1]).ids.tolist() == tokens.ids[4:].tolist()
    assert tokens.select([1]).counts.examples == 1
    assert tokens.fingerprint != tokens.select([1]).fingerprint


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
def test_what_is_too_long(tokenizers, limit):
    """Nine tokens are eight that are read; the last four are learned."""
    tokenizer = tokenizers["chatml"]
    given_ = [Completion("abcde", "fgh", line=5)]
    whole = tokenized(given_, tokenizer, 8)
    assert len(whole.ids) == 9
    parts = tokenized(given_, tokenizer, limit, too_long="split")
    learned = [
        (int(parts.ids[i]), int(parts.ids[i - 1]))
        for n in range(len(parts))
        for i in range(parts.starts[n] + 1, parts.starts[n + 1])
        if parts.learned[i]
    ]
    assert learned == [
        (int(whole.ids[i]), int(whole.ids[i - 1])) for i in range(5, 9)
    ]  # each once, after the same token
    assert parts.lengths.max() <= limit
    for how, counted in [("cut", "cut"), ("drop", "dropped")]:
        if limit == 8:
            assert tokenized(given_, tokenizer, limit, too_long=how).counts == whole.counts
        elif how == "drop" or limit < 5:
            with pytest.raises(lora.LoraError, match=r"nothing to be learned: 0 examples(.|\n)*1 dropped(.|\n)*line 5"):
                tokenized(given_, tokenizer, limit, too_long=how)
        else:
            found = tokenized(given_, tokenizer, limit, too_long=how)
            assert found.ids.tolist() == whole.ids[: limit + 1].tolist()
            assert getattr(found.counts, counted) == 1


def test_what_was_lost_is_said(tokenizers, tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [{"messages": [*messages]} for messages in (MESSAGES, MESSAGES[:2], MESSAGES[1:2], MESSAGES[:1])]
    path.write_text("\n".join(map(json.dumps, [*lines, 3])))
    with pytest.raises(lora.LoraError, match=r"data\.jsonl, line 4: none of its 1 messages is an answer"):
        tokenized(read_examples(path, skip_bad=True), tokenizers["thinking"], 50)
    found = tokenized(read_examples(path, skip_bad=True), tokenizers["thinking"], 50, skip_bad=True)
    counts = found.counts
    assert (counts.examples, counts.cut, counts.bad, counts.last_only, counts.dropped) == (2, 2, 2, 1, 1)
    assert str(counts).split("\n")[1] == (
        "2 cut at the longest length, 1 dropped, 2 bad and left out, 1 with only their last answer learned."
    )
    assert counts.notes[-1] == "First that could not be read: line 5: it is 3, expected a JSON object."
    assert counts.learned == found.learned.sum()
    assert counts.places == found.lengths.sum()


@pytest.mark.parametrize("arguments", [{"max_length": 0}, {"max_length": True}, {"max_length": 2, "too_long": "fold"}])
def test_settings_of_tokens_are_checked(tokenizers, arguments):
    with pytest.raises(lora.LoraError, match="tokenized: `"):
        tokenized([Text("a")], tokenizers["chatml"], **arguments)


# Packing --------------------------------------------------------------------------------------------------------------


def make_tokens(lengths):
    """Examples of so many places, in which each token is another one, from 1 on."""
    starts = np.concatenate([[0], np.cumsum(np.array(lengths, int) + 1)])
    ids = np.arange(1, starts[-1] + 1, dtype=np.int32)
    return Tokenized(ids, ids % 3 == 0, starts)


def equal(one, other):
    return len(one) == len(other) and all(
        np.array_equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a
    )


BATCHES = {
    "lengths": st.lists(st.integers(1, 12), min_size=1, max_size=40),
    "length": st.integers(12, 30),
    "parts": st.integers(1, 3),
    "own": st.integers(1, 2),
    "seed": st.integers(0, 3),
    "epoch": st.integers(0, 2),
}


@settings(deadline=None, max_examples=60)
@given(**BATCHES, data=st.data())
def test_each_token_is_in_one_place(lengths, length, parts, own, seed, epoch, data):
    tokens, rows = make_tokens(lengths), parts * own
    arguments = {"rows": rows, "length": length, "seed": seed, "epoch": epoch}
    batches = packed_batches(tokens, **arguments)
    count = len(batches)
    found = [*batches]
    assert len(found) == count
    assert all(array.shape == (rows, length) for batch in found for array in batch.values())
    seen = []
    for row in itertools.chain.from_iterable(zip(*batch.values(), strict=True) for batch in found):
        ids, positions, segments, targets, weights = row
        used = segments > 0
        assert not np.any([ids[~used], targets[~used], weights[~used], positions[~used]])
        assert np.array_equal(used, np.arange(length) < used.sum())  # padding is at the end
        for segment in range(1, segments.max() + 1):
            [at] = np.nonzero(segments == segment)
            assert np.array_equal(positions[at], np.arange(len(at)))
            assert np.array_equal(ids[at], np.arange(ids[at[0]], ids[at[0]] + len(at)))  # one whole example
            assert np.array_equal(targets[at], ids[at] + 1)
            assert np.array_equal(weights[at], (ids[at] + 1) % 3 == 0)
            seen += [int(ids[at[0]]), len(at)]
    starts = tokens.starts[:-1] + 1
    assert sorted(zip(seen[::2], seen[1::2], strict=True)) == [*zip(starts, lengths, strict=True)]
    # the same again, from any batch on, by any number of hosts
    start = data.draw(st.integers(0, count))
    assert equal([*packed_batches(tokens, **arguments, start=start)], found[start:])
    shards = [[*packed_batches(tokens, **arguments, shard=(i, parts))] for i in range(parts)]
    joined = [{name: np.concatenate([b[name] for b in of]) for name in of[0]} for of in zip(*shards, strict=True)]
    assert equal(joined, found)


def test_a_killed_run_goes_on_with_the_same_batches():
    tokens = make_tokens(np.random.default_rng(0).integers(1, 12, 60))
    arguments = {"rows": 4, "length": 16, "seed": 1, "epochs": 3}
    whole = [*packed_batches(tokens, **arguments)]
    batches = packed_batches(tokens, **arguments)
    assert len(whole) == len(batches) == sum(map(batches.batches_of, range(3)))
    for n in (0, 3, batches.batches_of(0), len(whole) - 1, len(whole)):
        first = packed_batches(tokens, **arguments)
        [*itertools.islice(first, n)]
        again = packed_batches(tokens, **arguments)
        next(again)
        again.set_state(json.loads(json.dumps(first.get_state())))
        assert equal([*again], whole[n:])
    a, b = batches.batches_of(0), batches.batches_of(0) + batches.batches_of(1)
    assert not equal(whole[: b - a], whole[a:b])  # epochs have orders of their own


@pytest.mark.parametrize("changed", ["rows", "length", "seed", "data"])
def test_a_state_of_other_batches_is_refused(changed):
    arguments = {"rows": 2, "length": 8, "seed": 0}
    tokens = make_tokens([3, 4, 5])
    state = packed_batches(tokens, **arguments).get_state()
    if changed == "data":
        tokens = make_tokens([3, 5, 4])
    else:
        arguments[changed] += 2
    with pytest.raises(lora.LoraError, match=f"had another `{changed}`"):
        packed_batches(tokens, **arguments).set_state(state)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"rows": 0}, "`rows` is 0"),
        ({"length": 4}, "example 2 takes 5 places, and a row has 4"),
        ({"seed": -1}, "`seed` is -1"),
        ({"start": 9}, "epoch 0 has 1 batches, and `start` is 9"),
        ({"epochs": 0}, "`epochs` is 0"),
        ({"shard": (2, 2)}, "`shard` is"),
        ({"shard": (0, 4)}, "2 rows cannot be split evenly over 4 hosts"),
    ],
)
def test_settings_of_batches_are_checked(arguments, problem):
    with pytest.raises(lora.LoraError, match=problem):
        packed_batches(make_tokens([3, 4, 5]), **{"rows": 2, "length": 8, "seed": 0, **arguments})


def test_rows_are_full():
    """Of examples as they are in files of conversations, 98 % at least; and the string says so."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 0.9, 2000).astype(int), 1, 512)
    rows = pack(lengths, 512, seed=0)
    assert lengths.sum() / (512 * len(rows)) > 0.98
    assert sorted(itertools.chain.from_iterable(rows)) == [*range(2000)]
    assert max(map(len, pack(lengths, 512, seed=0, most=3))) == 3
    text = str(packed_batches(make_tokens(lengths), 8, 512, 0))
    assert re.fullmatch(
        r"\d+ batches an epoch of 8 rows of 512 tokens: \d+\.\d examples a row, which fill 9.*%.*", text
    )


# Preferences ----------------------------------------------------------------------------------------------------------


def make_pairs(count=9, length=10):
    random = np.random.default_rng(0)
    sides = [make_tokens(random.integers(2, length, count)) for _ in range(2)]
    return TokenizedPairs(*(Tokenized(one.ids % 7, np.arange(len(one.ids)) % 2 == 0, one.starts) for one in sides))


def test_pairs_share_a_row_and_a_segment(tokenizers):
    records = [{"prompt": "Hi", "chosen": "a" * n, "rejected": "b" * m} for n, m in [(1, 2), (3, 1), (2, 2), (9, 1)]]
    pairs = tokenized_pairs([make_example(one, i) for i, one in enumerate(records)], tokenizers["chatml"], 6)
    assert len(pairs) == 3
    assert pairs.chosen.counts.dropped == 1
    batch = next(preference_batches(pairs, rows=2, length=12, seed=0))
    a, b, eos = (tokenizers["chatml"].encode(text).ids[0] for text in ("a", "b", "<|im_end|>"))
    found = []
    for row in range(2):
        for segment in range(1, batch["segments"].max() + 1):
            targets = [
                batch["targets"][at][(batch["segments"][at] == segment) & (batch["weights"][at] > 0)].tolist()
                for at in ((row, 0), (row, 1))
            ]
            found += [targets] if targets[0] else []
    assert sorted(found) == sorted(
        [[a] * len(one["chosen"]) + [eos], [b] * len(one["rejected"]) + [eos]] for one in records[:3]
    )
    with pytest.raises(lora.LoraError, match='expected "chosen" and "rejected"'):
        tokenized_pairs([Text("a")], tokenizers["chatml"], 6)
    with pytest.raises(lora.LoraError, match="use tokenized_pairs"):
        tokenized([make_example(records[0])], tokenizers["chatml"], 6)


def test_the_sums_over_answers_are_those_of_each_alone():
    pairs = make_pairs()
    table = np.log(np.random.default_rng(1).dirichlet(np.ones(7), 7))  # log p(target | token)

    def alone(side, n):
        part = slice(side.starts[n], side.starts[n + 1])
        ids, learned = side.ids[part], side.learned[part]
        return sum(table[a, b] for a, b, counts in zip(ids, ids[1:], learned[1:], strict=False) if counts)

    expected = sorted((alone(pairs.chosen, n), alone(pairs.rejected, n)) for n in range(len(pairs)))
    add_up, found = jax.jit(partial(pair_log_probs, most=3)), []
    for batch in preference_batches(pairs, rows=2, length=24, seed=0, most=3):
        log_probs = table[batch["ids"], batch["targets"]].astype(np.float32)
        sums = add_up(log_probs, batch["segments"], batch["weights"])
        assert sums.chosen.shape == (2, 3)
        found += [*zip(sums.chosen[sums.is_pair].tolist(), sums.rejected[sums.is_pair].tolist(), strict=True)]
    np.testing.assert_allclose(sorted(found), expected, rtol=1e-5)


def test_the_loss_is_that_of_the_paper():
    random = np.random.default_rng(0)
    numbers = random.normal(size=(4, 2, 3)) * 5
    is_pair = np.array([[True, True, False], [True, False, False]])
    policy = PairLogProbs(*map(jnp.array, (*numbers[:2].astype(np.float32), is_pair)))
    reference = PairLogProbs(*map(jnp.array, (*numbers[2:].astype(np.float32), is_pair)))
    margins = 0.3 * ((numbers[0] - numbers[2]) - (numbers[1] - numbers[3]))[is_pair]
    sigmoid = 1 / (1 + np.exp(-margins))
    found = dpo_loss(policy, reference, beta=0.3, label_smoothing=0.2)
    np.testing.assert_allclose(found.loss, (-0.8 * np.log(sigmoid) - 0.2 * np.log(1 - sigmoid)).mean(), rtol=1e-5)
    np.testing.assert_allclose(found.margin, margins.mean(), rtol=1e-5)
    assert float(found.accuracy) == pytest.approx((margins > 0).mean())
    for bad in ({"beta": 0.0}, {"beta": math.nan}, {"label_smoothing": 0.5}):
        with pytest.raises(lora.LoraError, match="dpo_loss"):
            dpo_loss(policy, reference, **bad)


def test_dpo_trains_adapters_against_the_frozen_base():
    """The reference is the same function without adapters: the loss begins at log 2, then the better answers win."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"table": jax.random.normal(keys[0], (7, 8)), "kernel": jax.random.normal(keys[1], (8, 8)), "head": 0}
    params["head"] = jax.random.normal(keys[2], (8, 7))

    def log_probs(params, batch):
        hidden = params["table"][batch["ids"]] @ params["kernel"]
        return lora.losses.linear_log_probs(hidden, params["head"], batch["targets"], ignore=None)

    batch = jax.tree.map(jnp.array, next(preference_batches(make_pairs(), rows=2, length=30, seed=0)))
    plan = lora.plan(log_probs, params, batch, rules={"kernel": lora.Lora(rank=4)})
    adapters = lora.init(jax.random.key(1), params, plan)
    apply = lora.lora_apply(log_probs)

    @jax.jit
    @jax.value_and_grad
    def loss(adapters, params, batch):
        sums = [
            pair_log_probs(found, batch["segments"], batch["weights"])
            for found in (apply(params, adapters, batch), log_probs(params, batch))
        ]
        return dpo_loss(*sums).loss

    first, gradient = loss(adapters, params, batch)
    assert float(first) == pytest.approx(math.log(2), abs=1e-6)
    for _ in range(20):
        adapters = jax.tree.map(lambda a, g: a - 0.3 * g, adapters, gradient)
        last, gradient = loss(adapters, params, batch)
    assert float(last) < 0.9 * float(first)
