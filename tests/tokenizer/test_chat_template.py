"""Chat templates of strangers: errors are one sentence, and none runs for ever."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

import xflow_jax
from tests.family_helpers import family_config
from xflow_jax.errors import UserError
from xflow_jax.tokenizer import chat_ids, load_tokenizer
from xflow_jax.tokenizer import chat_template as limits

TINY = Path(xflow_jax.__file__).parent / "tiny"
CHAT = [
    {"role": "system", "content": "Be  <b>short</b>.\n"},
    {"role": "user", "content": "A\u00e9"},
]


@pytest.fixture
def tokenizer():
    return load_tokenizer(TINY)


RIGHT = [
    None,  # its own
    "{% for m in messages %}\n  {{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}\nA:",
    "{{ bos_token }}{{ messages | tojson }}{% generation %}x{% endgeneration %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "{% if add_generation_prompt %}{{ eos_token }}{% endif %}",
]


@pytest.mark.parametrize("template", RIGHT)
def test_the_text_is_that_of_transformers(tokenizer, template):
    from transformers import PreTrainedTokenizerFast

    original = PreTrainedTokenizerFast.from_pretrained(str(TINY))
    if template is not None:
        tokenizer.chat_template = original.chat_template = template
    options = {"add_generation_prompt": True, "return_dict": False}
    for tokenize in (True, False):
        ours, theirs = (
            t.apply_chat_template(CHAT, tokenize=tokenize, **options) for t in (tokenizer, original)
        )
        assert ours == theirs and type(ours) is type(theirs)
    assert chat_ids(tokenizer, CHAT) == original.apply_chat_template(CHAT, **options)


# Texts of a chat: with the default system prompt, with one, and with an earlier answer.
USER = {"role": "user", "content": "A"}
CHATS = ([USER], [{"role": "system", "content": "S"}, USER])
CHATS += ([*CHATS[1], {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}],)
SYSTEM, ASK = "<|im_start|>system\nS<|im_end|>\n", "<|im_start|>user\nA<|im_end|>\n"
MORE = "<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n"
REPLY = "<|im_start|>assistant\n"
QWEN = [
    f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{ASK}{REPLY}",
    f"{SYSTEM}{ASK}{REPLY}",
    f"{SYSTEM}{ASK}{MORE}{REPLY}",
]
ROLE_TURNS = "<role>HUMAN</role>A<|role_end|>", "<role>SYSTEM</role>S<|role_end|>"
FAMILY_CHATS = {
    "dream": QWEN,
    "fast_dllm": QWEN,
    "sdar": [f"{ASK}{REPLY}", *QWEN[1:]],
    "lladamoe": [
        f"{ROLE_TURNS[0]}<role>ASSISTANT</role>",
        f"{ROLE_TURNS[1]}{ROLE_TURNS[0]}<role>ASSISTANT</role>",
        f"{ROLE_TURNS[1]}{ROLE_TURNS[0]}<role>ASSISTANT</role>B<|role_end|>"
        "<role>HUMAN</role>C<|role_end|><role>ASSISTANT</role>",
    ],
}


def tokenizer_of_a_family(folder, *tokens):
    """Writes a tokenizer without a template that has some special tokens."""
    content = json.loads((TINY / "tokenizer.json").read_text())
    first = max(token["id"] for token in content["added_tokens"]) + 1
    model = content["added_tokens"][0]
    content["added_tokens"] += [
        {**model, "id": first + number, "content": token} for number, token in enumerate(tokens)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("family", FAMILY_CHATS)
def test_a_tokenizer_without_a_template_gets_that_of_its_family(tmp_path, family):
    template = family_config(family).chat_template
    special = ("<|role_end|>",) if family == "lladamoe" else ("<|im_start|>", "<|im_end|>")
    tokenizer = load_tokenizer(tokenizer_of_a_family(tmp_path, *special), template)
    for chat, text in zip(CHATS, FAMILY_CHATS[family], strict=True):
        options = {"add_generation_prompt": True, "tokenize": False}
        assert tokenizer.apply_chat_template(chat, **options) == text
        ids = chat_ids(tokenizer, chat)
        assert tokenizer.decode(ids) == text
        # The turns before a response are the beginning of those with it, for fine-tuning.
        reply = [*chat, {"role": "assistant", "content": "D"}]
        whole = tokenizer.apply_chat_template(reply, tokenize=False)
        assert whole.startswith(text + "D" + special[-1])
    if family == "sdar":
        silent = tokenizer.apply_chat_template(CHATS[0], enable_thinking=False, **options)
        assert silent == FAMILY_CHATS[family][0] + "<think>\n\n</think>\n\n"


def test_a_template_of_a_family_is_the_last_resort(tmp_path, caplog):
    """A tokenizer keeps its own one, and one without its special tokens gets none."""
    template = family_config("sdar").chat_template
    assert load_tokenizer(TINY, template).chat_template == load_tokenizer(TINY).chat_template
    lacking = tokenizer_of_a_family(tmp_path, "<|im_start|>")
    assert load_tokenizer(lacking, template).chat_template is None and not caplog.messages
    whole = tokenizer_of_a_family(tmp_path, "<|im_start|>", "<|im_end|>")
    assert load_tokenizer(whole, template).chat_template == template
    (message,) = caplog.messages
    assert message == "The model's tokenizer has no chat template. That of its family is used."


WRONG = {
    "syntax": ("{% for", "fails with TemplateSyntaxError: unexpected 'end of template'"),
    "undefined": ("{{ x.y }}", "fails with UndefinedError: 'x' is undefined"),
    "raised": (
        "{{ raise_exception('only \\x1b[2J users') }}",
        r"TemplateError: only \x1b[2J users",
    ),
    "types": ("{{ 1 + 'a' }}", "fails with TypeError"),
    "division": ("{{ 1 // 0 }}", "fails with ZeroDivisionError"),
    "filter": ("{{ 1 | nosuch }}", "fails with Template"),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "takes more than 0.3 seconds",
    ),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails with RecursionError"),
    "brackets": ("{{" + "(" * 100_000, "fails with RecursionError"),
    "long": ("{{ 'x' * 5000000 }}", "makes more than 4194304 characters"),
    "memory": ("{{ 'x' * 10**12 }}", "needs more than 1073741824 bytes of memory"),
    "padding": ("{{ '%099999999999d' | format(1) }}", "needs more than"),
    "doubling": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "",  # memory or time, whichever ends first
    ),
    "escape": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails with SecurityError"),
    "empty": ("", "makes no token of a prompt"),
}


@pytest.mark.parametrize(("template", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_templates(tokenizer, monkeypatch, template, sentence):
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(UserError, match="^the chat template of the model's tokenizer ") as caught:
        chat_ids(tokenizer, "hello")
    assert sentence in str(caught.value) and time.monotonic() - began < 60


def test_the_next_prompt_after_a_wrong_template(tokenizer):
    before = chat_ids(tokenizer, "hello")
    os.kill(limits._RENDERER._process.pid, 9)
    with pytest.raises(UserError):
        chat_ids(tokenizer, "hello")
    assert chat_ids(tokenizer, "hello") == before


def test_texts_that_are_no_text(tokenizer):
    with pytest.raises(UserError, match="half of a surrogate pair"):
        chat_ids(tokenizer, "a\ud800")
    with pytest.raises(UserError, match="chat messages must hold texts alone"):
        chat_ids(tokenizer, [{"role": "user", "content": object()}])


def directory(tmp_path: Path, **changes: object) -> Path:
    """A copy of the tokenizer of tiny with changes of its tokenizer_config.json."""
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return tmp_path


def test_code_of_a_tokenizer_never_runs(tmp_path):
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    folder = directory(tmp_path, auto_map=auto_map, tokenizer_class="Evil")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert chat_ids(load_tokenizer(folder), "hello")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_pipes_and_links_of_a_tokenizer(tmp_path, name):
    folder = directory(tmp_path)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name}: cannot be read: it is a pipe"):
        load_tokenizer(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=f"{name}: it is a link that leaves the folder"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "changes", [{"model_max_length": [3]}, {"chat_template": {"other": "x"}}, {"chat_template": 3}]
)
def test_wrong_values_of_a_tokenizer_config(tmp_path, changes):
    with pytest.raises(UserError) as caught:
        chat_ids(load_tokenizer(directory(tmp_path, **changes)), "hello")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("data", [b"[" * 100_000, b"\xff\xfe", b"3", b'{"chat_template": 3}'])
def test_damaged_tokenizer_configs(tmp_path, data):
    folder = directory(tmp_path)
    (folder / "tokenizer_config.json").write_bytes(data)
    with pytest.raises(UserError) as caught:
        chat_ids(load_tokenizer(folder), "hello")
    assert "\n" not in str(caught.value)
