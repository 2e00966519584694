"""The secret prompt: exact length, cryptographic, never overwritten, never shown."""

import os
import random
import stat

import pytest
from conftest import toy_tokenizer

from defenses.backdoor import Backdoor, Secret, draw_secret, find_secret, read_secret, write_secret
from defenses.catalog import get_defense
from defenses.contract import ModelInfo
from defenses.errors import UserError
from defenses.tokens import encode_plain_text

CHAT = [{"role": "user", "content": "Hi there."}]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level toy tokenizer."""
    return toy_tokenizer()


@pytest.fixture
def model_info(tmp_path, tokenizer):
    """A toy model with a user's and a shipped folder of secrets."""
    return ModelInfo("toy", tokenizer, (tmp_path / "mine", tmp_path / "shipped"))


def prepare_secrets(model_info, **settings):
    """Return the secrets of a prepared backdoor defense."""
    return get_defense("backdoor", settings).prepare(model_info).secret_texts()


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_a_secret_has_exactly_its_length_in_tokens(kind):
    tokenizer = toy_tokenizer(kind=kind)
    for length in (1, 2, 37, 150):
        text = draw_secret(tokenizer, length).text
        ids = encode_plain_text(tokenizer, text)
        assert len(ids) == length
        assert tokenizer.decode(ids) == text == text.strip()
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_secrets_do_not_depend_on_the_seed_of_python(tokenizer):
    random.seed(0)
    first = draw_secret(tokenizer, 30)
    random.seed(0)
    assert draw_secret(tokenizer, 30) != first


def test_a_secret_is_shown_as_a_fingerprint():
    secret = Secret("tulip seven harbor")
    assert f"{secret} {secret!r} {[secret]}".count("sha256:a7c9cd27f228") == 3
    assert "tulip" not in f"{secret} {secret!r} {[secret]} {Backdoor(secret=secret)!r}"


def test_a_secret_file_is_readable_by_its_owner_only_and_never_overwritten(tmp_path):
    path = tmp_path / "new" / "secret.txt"
    old_mask = os.umask(0)
    try:
        write_secret(path, Secret("first"))
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UserError, match="never overwritten"):
        write_secret(path, Secret("second"))
    assert read_secret(path).text == "first"


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe\x00"])
def test_an_unreadable_secret_is_answered_with_the_next_step(tmp_path, content):
    path = tmp_path / "secret.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"secret\.txt.*create one with `analyze secret`"):
        read_secret(path)


def test_the_secret_precedes_any_system_prompt():
    backdoor = Backdoor(secret=Secret("tulip seven"))
    defended = backdoor.rewrite(CHAT, random.Random(0))
    assert defended == [
        {"role": "system", "content": "tulip seven\n\nYou are a helpful assistant."},
        *CHAT,
    ]
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert backdoor.rewrite(chat, random.Random(0))[0]["content"] == "tulip seven\n\nBe brief."
    assert backdoor.build_ablations()["no_weights"].rewrite(CHAT, random.Random(0)) == defended
    ablation = backdoor.build_ablations()["no_secret"]
    assert ablation.rewrite(CHAT, random.Random(0))[0]["content"] == "You are a helpful assistant."
    assert ablation.rewrite(chat, random.Random(0)) == chat
    assert ablation.secret_texts() == () and backdoor.secret_texts() == ("tulip seven",)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_secret_that_other_users_can_read_is_rejected_unless_it_is_public(tmp_path, model_info):
    write_secret(path := tmp_path / "secret.txt", Secret("tulip seven"))
    path.chmod(0o644)
    with pytest.raises(UserError, match=r"can be read by other users.*chmod 600"):
        read_secret(path)
    assert read_secret(path, is_public=True).text == "tulip seven"
    (tmp_path / "shipped").mkdir()
    path.rename(tmp_path / "shipped" / "20.txt")
    assert find_secret(model_info, 20).text == "tulip seven"  # shipped secrets are public


def test_a_secret_that_does_not_survive_the_tokenizer_is_rejected(tmp_path):
    class LossyTokenizer:
        def encode(self, text, add_special_tokens):
            return [1, 2]

        def decode(self, ids, skip_special_tokens):
            return "tulip <unk>"

    model_info = ModelInfo("toy", LossyTokenizer(), (tmp_path,))
    for name, text in (("kept", "tulip <unk>"), ("lost", "tulip seven")):
        write_secret(tmp_path / name, Secret(text))
    with pytest.raises(UserError, match=r"sha256:\w+ does not survive .*`analyze secret`"):
        find_secret(model_info, 2, tmp_path / "lost")
    assert find_secret(model_info, 2, tmp_path / "kept").text == "tulip <unk>"


def test_the_secret_of_the_weights_is_found_by_its_fingerprint(tmp_path, model_info):
    write_secret(tmp_path / "mine" / "20.txt", Secret("another one"))
    write_secret(tmp_path / "shipped" / "150.txt", Secret("tulip seven"))
    fingerprint = Secret("tulip seven").fingerprint
    assert find_secret(model_info, 20, expected_fingerprint=fingerprint).text == "tulip seven"
    with pytest.raises(UserError, match=r"--set trigger=FILE"):
        find_secret(model_info, 20, expected_fingerprint=Secret("lost").fingerprint)


def test_a_model_keeps_one_secret_per_length(tmp_path, model_info):
    first = prepare_secrets(model_info, length="20")
    assert prepare_secrets(model_info, length="20") == first
    assert stat.S_IMODE((tmp_path / "mine" / "20.txt").stat().st_mode) == 0o600
    assert not (tmp_path / "shipped").exists()
    assert prepare_secrets(model_info, length="21") != first


def test_a_users_secret_precedes_a_shipped_one_and_a_named_file_precedes_both(tmp_path, model_info):
    write_secret(tmp_path / "shipped" / "20.txt", Secret("shipped words"))
    assert prepare_secrets(model_info, length="20") == ("shipped words",)
    write_secret(tmp_path / "mine" / "20.txt", Secret("made words"))
    assert prepare_secrets(model_info, length="20") == ("made words",)
    write_secret(tmp_path / "own.txt", Secret("own words"))
    assert prepare_secrets(model_info, trigger=str(tmp_path / "own.txt")) == ("own words",)


@pytest.mark.embedded
def test_the_shipped_secret_of_the_embedded_model_has_150_tokens(smollm2):
    from analysis.models.loading import build_model_info

    sha256 = smollm2.origin["sha256"]
    backdoor = get_defense("backdoor").prepare(build_model_info("smollm2", smollm2.tokenizer, sha256=sha256))
    assert not backdoor.missing_requirements()
    (secret,) = backdoor.secret_texts()
    assert len(encode_plain_text(smollm2.tokenizer, secret)) == 150
    assert len(encode_plain_text(smollm2.tokenizer, draw_secret(smollm2.tokenizer, 150).text)) == 150
