"""Conversations as tokens, against what transformers makes of them: the same ones, of which the same are learned."""

import chat_templates
import numpy as np
import pytest
import transformers

from lora_jax.recipes.examples import Conversation
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


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", chat_templates.SPECIAL)
def test_tokens_are_those_of_transformers(tmp_path, name, conversation):
    folder = chat_templates.make_folder(tmp_path / "model", name)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = messages_of(conversation)
    expected = theirs.apply_chat_template(upto_the_last_answer(messages), tokenize=True, return_dict=True)["input_ids"]
    found = tokenized([Conversation(messages)], Tokenizer.load(folder), 1000)
    assert found.ids.tolist() == expected
    assert found.learned.any()


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", chat_templates.ANSWERS)
def test_what_is_learned_is_what_transformers_says(tmp_path, name, conversation):
    """It needs a template that marks the answers; here they are also found without."""
    template = chat_templates.marked(name)
    folders = [chat_templates.make_folder(tmp_path / f"{i}", name, one) for i, one in enumerate([None, template])]
    theirs = transformers.AutoTokenizer.from_pretrained(folders[1])
    messages = messages_of(conversation)
    expected = theirs.apply_chat_template(
        upto_the_last_answer(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    for folder in folders:
        found = tokenized([Conversation(messages)], Tokenizer.load(folder), 1000)
        assert found.ids.tolist() == expected["input_ids"]
        np.testing.assert_array_equal(found.learned, np.array(expected["assistant_masks"], bool))
