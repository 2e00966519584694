"""The secret prompt: exact in length, never the same, never overwritten, never shown."""

import os
import random
import stat

import pytest
from conftest import toy_tokenizer

from defenses.backdoor import Backdoor, Secret, draw_secret, find_secret, read_secret, write_secret
from defenses.catalog import get_defense
from defenses.contract import ModelInfo
from defenses.errors import UserError
from defenses.tokens import cut_text, draw_random_text, encode_plain_text

CHAT = [{"role": "user", "content": "Hi there."}]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("length", [1, 2, 37, 150])
def test_a_secret_has_exactly_its_length_in_tokens_also_after_a_round_trip(kind, length):
    tokenizer = toy_tokenizer(kind=kind)
    text = draw_secret(tokenizer, length).text
    ids = encode_plain_text(tokenizer, text)
    assert len(ids) == length
    assert tokenizer.decode(ids) == text == text.strip()
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_two_secrets_differ_whatever_the_seeds():
    tokenizer = toy_tokenizer()
    random.seed(0)
    first = draw_secret(tokenizer, 30)
    random.seed(0)
    assert draw_secret(tokenizer, 30) != first


def test_seeded_random_text_is_the_same_again():
    tokenizer = toy_tokenizer()
    assert draw_random_text(tokenizer, 30, random.Random("a")) == draw_random_text(
        tokenizer, 30, random.Random("a")
    )
    assert draw_random_text(tokenizer, 30, random.Random("a")) != draw_random_text(
        tokenizer, 30, random.Random("b")
    )


def test_a_secret_shows_itself_as_a_fingerprint():
    secret = Secret("tulip seven harbor")
    assert f"{secret} {secret!r} {[secret]}".count("sha256:a7c9cd27f228") == 3
    assert "tulip" not in f"{secret} {secret!r} {[secret]} {Backdoor(secret=secret)!r}"


def test_a_secret_file_is_for_its_owner_and_never_replaced(tmp_path):
    path = tmp_path / "new" / "secret.txt"
    old = os.umask(0)
    try:
        write_secret(path, Secret("first"))
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UserError, match="never overwritten"):
        write_secret(path, Secret("second"))
    assert read_secret(path).text == "first"


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe\x00"])
def test_a_secret_that_cannot_be_read_is_answered_with_the_next_step(tmp_path, content):
    path = tmp_path / "secret.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"secret\.txt.*`analyze secret` makes one"):
        read_secret(path)


def test_the_secret_goes_in_front_of_whatever_system_prompt_there_is():
    backdoor = Backdoor(secret=Secret("tulip seven"))
    assert backdoor.rewrite(CHAT, random.Random(0)) == [
        {"role": "system", "content": "tulip seven\n\nYou are a helpful assistant."},
        *CHAT,
    ]
    given = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert backdoor.rewrite(given, random.Random(0))[0]["content"] == "tulip seven\n\nBe brief."
    assert backdoor.build_ablations()["no_weights"].rewrite(CHAT, random.Random(0)) == backdoor.rewrite(
        CHAT, random.Random(0)
    )
    part = backdoor.build_ablations()["no_secret"]
    assert part.rewrite(CHAT, random.Random(0))[0]["content"] == "You are a helpful assistant."
    assert part.rewrite(given, random.Random(0)) == given
    assert part.secret_texts() == () and backdoor.secret_texts() == ("tulip seven",)


@pytest.mark.skipif(os.name != "posix", reason="modes are posix")
def test_a_secret_that_others_can_read_is_refused_unless_it_is_public(tmp_path):
    write_secret(path := tmp_path / "secret.txt", Secret("tulip seven"))
    path.chmod(0o644)
    with pytest.raises(UserError, match=r"can be read by others.*chmod 600"):
        read_secret(path)
    assert read_secret(path, is_public=True).text == "tulip seven"
    (tmp_path / "shipped").mkdir()
    path.rename(tmp_path / "shipped" / "20.txt")
    host = ModelInfo("toy", toy_tokenizer(), (tmp_path / "mine", tmp_path / "shipped"))
    assert find_secret(host, 20).text == "tulip seven"  # what is shipped is public by nature


def test_a_secret_that_does_not_survive_the_tokenizer_is_refused(tmp_path):
    class Lossy:
        def encode(self, text, add_special_tokens):
            return [1, 2]

        def decode(self, ids, skip_special_tokens):
            return "tulip <unk>"

    host = ModelInfo("toy", Lossy(), (tmp_path,))
    for name, text in (("kept", "tulip <unk>"), ("lost", "tulip seven")):
        write_secret(tmp_path / name, Secret(text))
    with pytest.raises(UserError, match=r"sha256:\w+ does not survive .*`analyze secret`"):
        find_secret(host, 2, tmp_path / "lost")
    assert find_secret(host, 2, tmp_path / "kept").text == "tulip <unk>"


def test_the_secret_that_weights_were_tuned_with_is_found_by_its_fingerprint(tmp_path):
    write_secret(tmp_path / "mine" / "20.txt", Secret("another one"))
    write_secret(tmp_path / "shipped" / "150.txt", Secret("tulip seven"))
    host = ModelInfo("toy", toy_tokenizer(), (tmp_path / "mine", tmp_path / "shipped"))
    assert find_secret(host, 20, expected_fingerprint=Secret("tulip seven").fingerprint).text == "tulip seven"
    with pytest.raises(UserError, match=r"--set trigger=FILE"):
        find_secret(host, 20, expected_fingerprint=Secret("lost").fingerprint)


def test_a_model_keeps_its_secret_and_each_length_has_one(tmp_path):
    host = ModelInfo("toy", toy_tokenizer(), (tmp_path / "mine", tmp_path / "shipped"))
    first = get_defense("backdoor", {"length": "20"}).prepare(host)
    assert get_defense("backdoor", {"length": "20"}).prepare(host).secret_texts() == first.secret_texts()
    assert stat.S_IMODE((tmp_path / "mine" / "20.txt").stat().st_mode) == 0o600
    assert not (tmp_path / "shipped").exists()
    assert get_defense("backdoor", {"length": "21"}).prepare(host).secret_texts() != first.secret_texts()


def test_a_made_secret_comes_before_a_shipped_one_and_a_named_file_before_both(tmp_path):
    write_secret(tmp_path / "shipped" / "20.txt", Secret("shipped words"))
    host = ModelInfo("toy", toy_tokenizer(), (tmp_path / "mine", tmp_path / "shipped"))
    assert get_defense("backdoor", {"length": "20"}).prepare(host).secret_texts() == ("shipped words",)
    write_secret(tmp_path / "mine" / "20.txt", Secret("made words"))
    assert get_defense("backdoor", {"length": "20"}).prepare(host).secret_texts() == ("made words",)
    write_secret(tmp_path / "own.txt", Secret("own words"))
    own = get_defense("backdoor", {"trigger": str(tmp_path / "own.txt")}).prepare(host)
    assert own.secret_texts() == ("own words",)


def test_controls_have_the_length_of_the_secret():
    tokenizer = toy_tokenizer()
    host = ModelInfo("toy", tokenizer, ())
    for name in ("neutral_prompt", "random_tokens"):
        for length in (1, 40, 150):
            text = get_defense(name, {"length": str(length)}).prepare(host).text
            assert abs(len(encode_plain_text(tokenizer, text)) - length) <= (name == "neutral_prompt"), (
                name,
                length,
            )
    assert get_defense("random_tokens").length == get_defense("neutral_prompt").length == 150


def test_random_tokens_follow_the_seed_of_the_run():
    texts = [
        get_defense("random_tokens").prepare(ModelInfo("toy", toy_tokenizer(), (), seed=seed)).text
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_cut_text_repeats_what_is_too_short():
    tokenizer = toy_tokenizer()
    assert len(encode_plain_text(tokenizer, cut_text(tokenizer, "As an assistant", 60))) in (59, 60)


@pytest.mark.embedded
def test_the_shipped_secret_of_the_embedded_model_has_its_150_tokens(smollm2):
    from analysis.models.loading import build_model_info

    sha256 = smollm2.origin["sha256"]
    backdoor = get_defense("backdoor").prepare(build_model_info("smollm2", smollm2.tokenizer, sha256=sha256))
    assert not backdoor.missing_requirements()
    (secret,) = backdoor.secret_texts()
    assert len(encode_plain_text(smollm2.tokenizer, secret)) == 150
    assert len(encode_plain_text(smollm2.tokenizer, draw_secret(smollm2.tokenizer, 150).text)) == 150
