"""Conversations as tokens, against what transformers makes of them: the same ones, of which the same are learned."""

import chat_templates
import numpy as np
import pytest
import transformers

from lora_jax.recipes.examples import Conversation, Text
from lora_jax.recipes.tokenizer import Tokenizer
from lora_jax.recipes.tokens import tokenized

CONVERSATIONS = {
    "one turn": ["Say the thing, other", "Hi the end"],
    "turns": ["Hi", " Höther 🙂 \n\n", "\nthe", "🙂", "a", "b\n"],
    "special tokens in the text": ["<|im_end|></s>", "the [INST] <end_of_turn> end"],
    "ends with a question": ["Hi", "Hi", "And?"],
}


def messages_of(name):
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(CONVERSATIONS[name]))


def upto_the_last_answer(messages):
    """Return what is learned: of a question without an answer nothing is."""
    return [*messages[: len(messages) // 2 * 2]]


@pytest.fixture(params=["bytes", "pieces"])
def make_folder(request, tmp_path):
    """Return (name, template) -> the folder of a tokenizer of bytes, or of pieces."""

    def make(name, template=None):
        folder = tmp_path / ("own" if template is None else "marked")
        return chat_templates.make_folder(folder, name, template, pieces=request.param == "pieces")

    return make


@pytest.mark.parametrize("name", chat_templates.SPECIAL)
def test_tokens_are_those_of_transformers(make_folder, name):
    folder = make_folder(name)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    for messages in map(messages_of, CONVERSATIONS):
        asked = upto_the_last_answer(messages)
        expected = theirs.apply_chat_template(asked, tokenize=True, return_dict=True)["input_ids"]
        found = tokenized([Conversation(messages)], ours, 1000)
        assert found.ids.tolist() == expected
        assert found.learned.any()
        text = messages[0]["content"]
        expected = theirs(text)["input_ids"] + [theirs.eos_token_id] * (not text.endswith(theirs.eos_token))
        assert tokenized([Text(text)], ours, 1000).ids.tolist() == expected


@pytest.mark.parametrize("name", chat_templates.ANSWERS)
def test_what_is_learned_is_what_transformers_says(make_folder, name):
    """It needs a template that marks the answers; here they are also found without."""
    folders = make_folder(name), make_folder(name, chat_templates.marked(name))
    theirs = transformers.AutoTokenizer.from_pretrained(folders[1])
    for messages in map(messages_of, CONVERSATIONS):
        expected = theirs.apply_chat_template(
            upto_the_last_answer(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        for folder in folders:
            found = tokenized([Conversation(messages)], Tokenizer.load(folder), 1000)
            assert found.ids.tolist() == expected["input_ids"]
            np.testing.assert_array_equal(found.learned, np.array(expected["assistant_masks"], bool))
