"""Controls have the length of the defense that they are compared with."""

from conftest import toy_tokenizer

from defenses.catalog import get_defense
from defenses.contract import ModelInfo
from defenses.tokens import encode_plain_text


def test_controls_have_the_length_of_the_secret():
    tokenizer = toy_tokenizer()
    for name, tolerance in (("neutral_prompt", 1), ("random_tokens", 0)):
        for length in (1, 40, 150):
            control = get_defense(name, {"length": str(length)}).prepare(ModelInfo("toy", tokenizer, ()))
            assert abs(len(encode_plain_text(tokenizer, control.text)) - length) <= tolerance, (name, length)
    assert get_defense("random_tokens").length == get_defense("neutral_prompt").length == 150


def test_random_tokens_depend_on_the_seed_of_the_run():
    tokenizer = toy_tokenizer()
    texts = [
        get_defense("random_tokens").prepare(ModelInfo("toy", tokenizer, (), seed=seed)).text
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
