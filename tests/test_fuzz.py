"""Random inputs: each is read right, or refused with one line that names the problem."""

import csv
import io
import json
import os
from functools import cache

from conftest import make_toy_session, toy_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.attacks import DIRECT_ATTACK
from analysis.datasets.loading import load_queries
from analysis.datasets.queries import Query
from analysis.models.chat_template import ChatTemplate
from analysis.models.loading import build_model_info
from analysis.studies.run_spec import build_run_spec
from defenses.catalog import choose_defenses, list_defense_names
from defenses.errors import UserError
from defenses.settings import get_settings

# More by hand: FUZZ_EXAMPLES=5000 python -m pytest tests/test_fuzz.py
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "20"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)

# --- files of queries -------------------------------------------------------------------------------------

_FRAGMENTS = (
    *(
        "text",
        "harmful",
        "id",
        "pair",
        "category",
        "split",
        "kind",
        "image",
        "true",
        "false",
        "yes",
        "1",
        "0",
    ),
    *(",", ";", "\t", "\n", "\r\n", "\r", '"', '""', "'", "|", "#", " ", "=1+1", "NaN", "NA", "1e5", "001"),
    *("{", "}", "[", "]", ":", '{"text": "a", "harmful": true}\n', '{"text": "b", "harmful": 0}\n', "null"),
    *(
        "\x00",
        "\ufeff",
        "\u2028",
        "\x85",
        "é",
        "漢",
        "🙂",
        "test",
        "train",
        "text,harmful\n",
        "a,1\n",
        "b,0\n",
    ),
    *("\\ud800", "\\u0000", "[" * 20_000, "1" * 5000, "-Infinity", "1e999"),
)
_ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252")
_SUFFIXES = (".csv", ".jsonl", ".json", ".tsv", ".CSV", ".jsonl.gz", ".parquet", ".txt", "")
_damaged_files = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda parts, encoding: "".join(parts).encode(encoding, "replace"),
        st.lists(st.sampled_from(_FRAGMENTS) | st.text(max_size=5), max_size=30),
        st.sampled_from(_ENCODINGS),
    ),
    st.builds(
        lambda rows: "\n".join(json.dumps(row) for row in rows).encode(),
        st.lists(
            st.dictionaries(
                st.sampled_from(("text", "harmful", "id", "pair", "category", "split", "kind", "image")),
                st.recursive(
                    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda values: (
                        st.lists(values, max_size=2) | st.dictionaries(st.text(max_size=2), values)
                    ),
                    max_leaves=3,
                ),
            ),
            max_size=4,
        ),
    ),
)


def assert_line(error):
    """Assert that the text of an error can be printed in a line."""
    line = " ".join(str(error).split())
    assert 10 < len(line) < 2000, line


@given(content=_damaged_files, suffix=st.sampled_from(_SUFFIXES))
@fuzz
def test_a_file_of_queries_is_read_or_refused(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"queries{suffix}"
    path.write_bytes(content)
    try:
        query_set = load_queries(str(path))
    except UserError as error:
        assert_line(error)
    else:
        assert {query.harmful for query in query_set.queries} == {True, False}
        for query in query_set.queries:
            query.text.encode()
            assert query.text.strip() and query.id


# Python's csv module leaves a carriage return unquoted, so that its own reader ends the row there.
_texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=20)
_texts = _texts.map(str.strip).filter(bool)
_rows = st.lists(
    st.tuples(_texts, st.booleans(), _texts),
    min_size=2,
    max_size=6,
    unique_by=(lambda row: row[2], lambda row: row[0]),
).filter(lambda rows: len({row[1] for row in rows}) == 2)


@given(
    rows=_rows,
    quoting=st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)),
    line_end=st.sampled_from(("\n", "\r\n")),
    encoding=st.sampled_from(("utf-8", "utf-8-sig")),
    suffix=st.sampled_from((".csv", ".jsonl")),
)
@fuzz
def test_a_good_file_of_queries_gives_its_texts_and_ids(
    tmp_path_factory, rows, quoting, line_end, encoding, suffix
):
    path = tmp_path_factory.getbasetemp() / f"good{suffix}"
    if suffix == ".csv":
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, quoting=quoting, lineterminator=line_end)
        writer.writerows([("text", "harmful", "id"), *rows])
        text = buffer.getvalue()
    else:
        keys = ("text", "harmful", "id")
        text = line_end.join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows)
    path.write_bytes(text.encode(encoding))
    queries = load_queries(str(path)).queries
    assert [(query.text, query.harmful, query.id) for query in queries] == [
        (text, harmful, query_id) for text, harmful, query_id in rows
    ]


# --- chat templates ---------------------------------------------------------------------------------------

_TEMPLATE_PARTS = (
    *("{% for message in messages %}", "{% for m in messages[1:] %}", "{% endfor %}", "{% if loop.first %}"),
    *(
        "{{ message['content'] }}",
        "{{ message.role }}",
        "{{ messages[0]['content'] }}",
        "{{ messages[5].role }}",
    ),
    *("{% if add_generation_prompt %}", "{% else %}", "{% endif %}", "{{ bos_token }}", "{{ eos_token }}"),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "\n",
        " ",
        "assistant",
        "<think>",
        "</think>",
        "{{ raise_exception('no') }}",
    ),
    *(
        "{{ strftime_now('%Y') }}",
        "{{ 1 / 0 }}",
        "{{ nothing.here }}",
        "{{ 'a' + 1 }}",
        "{{ message | tojson }}",
    ),
    *(
        "{% set ns = namespace(x=1) %}",
        "{{ message.content | trim }}",
        "{% generation %}",
        "{% endgeneration %}",
    ),
    *(
        "{{",
        "}}",
        "{%",
        "{# note #}",
        "{{ undefined() }}",
        "{{ messages | length }}",
        "{{ tools[0] }}",
        "\ud800",
    ),
    "{{ messages[0].content.split('x')[3] }}",
)
_WORKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_templates = st.one_of(
    st.lists(st.sampled_from(_TEMPLATE_PARTS) | st.text(max_size=3), max_size=12).map("".join),
    st.builds(
        lambda part, place: _WORKING_TEMPLATE[:place] + part + _WORKING_TEMPLATE[place:],
        st.sampled_from(_TEMPLATE_PARTS),
        st.integers(0, len(_WORKING_TEMPLATE)),
    ),
)
_CHATS = (
    [{"role": "user", "content": "How do I sing?"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How do I sing?"}],
    [{"role": "user", "content": "How do I sing?"}, {"role": "assistant", "content": "Sure, here"}],
)


@given(template=_templates)
@fuzz
def test_a_chat_template_renders_a_prompt_or_is_refused(template):
    tokenizer = toy_tokenizer("chatml")
    tokenizer.chat_template = template
    try:
        chat_template = ChatTemplate(tokenizer)
        prompts = [chat_template.render_prompt(chat) for chat in _CHATS]
        notices = chat_template.notices
    except UserError as error:
        assert_line(error)
        return
    assert all(notices)
    if "strftime_now" in template:  # the date is a fixed one
        return
    # Up to the end of the request, the prompt is what the template writes.
    text = tokenizer.apply_chat_template(_CHATS[0], add_generation_prompt=True, tokenize=False)
    before, request, _ = text.rpartition("How do I sing?")
    assert prompts[0].text.startswith(before + request)


# --- settings of defenses, and options --------------------------------------------------------------------

_SETTINGS = [
    (name, key) for name in list_defense_names() for key in get_settings(choose_defenses([name], [])[-1])
]
_VALUES = st.one_of(
    st.integers(-3, 40).map(str),
    st.floats(-3, 3).map(str),
    st.sampled_from(
        (
            "",
            " ",
            "nan",
            "inf",
            "-inf",
            "1e400",
            "true",
            "None",
            "@",
            "@nowhere",
            "@.",
            "a,b",
            ",,",
            "{}",
            "{x}",
        )
    ),
    st.sampled_from(
        ("\n", "\x00", "\ud800", "漢", "🙂" * 5, "%s", "=", "==", "0x10", "１", "1_0", "~", "..")
    ),
    st.text(max_size=8),
)


@cache
def toy_session():
    """A session with a tiny model, and what defenses may know about it."""
    session = make_toy_session()
    return session, build_model_info("toy", session.loaded_model.tokenizer)


@given(setting=st.sampled_from(_SETTINGS), value=_VALUES, text=st.text(max_size=12))
@fuzz
def test_a_setting_of_a_defense_is_used_or_refused(setting, value, text):
    (name, key), (session, model_info) = setting, toy_session()
    query = Query("q", f"How {text}?", True)
    try:
        defense = choose_defenses([name], [f"{key}={value}"])[-1].prepare(model_info)
        if not defense.missing_requirements():
            ((*prompts,),) = session.render_prompts(defense, DIRECT_ATTACK.build_query_chats([query]))
            assert prompts and all(prompt.ids for prompt in prompts)
    except UserError as error:
        assert_line(error)


@given(texts=st.lists(st.text(max_size=6) | st.sampled_from(_SETTINGS).map("=".join), max_size=3))
@fuzz
def test_texts_that_are_no_settings_are_refused(texts):
    try:
        choose_defenses(["policy"], texts)
    except UserError as error:
        assert_line(error)


_words = st.text(max_size=8) | st.sampled_from(
    ("\ud800", "\udcff", "a\0", "auto", "all", "none", "words", "prefilled-5", "1", "-1", "direct")
)


@given(
    data=_words | st.sampled_from(("contrast", "twins+plain", "a=b", "+", "jbb=", "x.csv", "/", ".")),
    split=st.none() | _words,
    limit=st.none() | st.integers(),
    batch_size=_words,
    attack=_words | st.sampled_from(("direct+ignore", "base64", "all", "x.jsonl", "+ignore")),
    readout=_words | st.sampled_from(("prefilled-0", "prefilled-999", "prefilled-" + "9" * 500)),
    responses=_words,
)
@fuzz
def test_options_of_a_run_are_used_or_refused(data, split, limit, batch_size, attack, readout, responses):
    try:
        spec = build_run_spec(
            "toy",
            data,
            split,
            limit,
            batch_size,
            offline=True,
            attack=attack,
            readout=readout,
            responses=responses,
        )
        spec.select_queries()
    except UserError as error:
        assert_line(error)
