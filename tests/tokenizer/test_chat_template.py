"""Chat templates of strangers: errors are one sentence, and none runs for ever."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

import xflow_jax
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
    assert sentence in str(caught.value) and time.monotonic() - began < 10


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
