"""Chat messages: checks, and files that hold them."""

from __future__ import annotations

from pathlib import Path

from xflow_jax.errors import UserError, describe, require
from xflow_jax.input_files import read_json, read_jsonl, to_path

ROLES = ("system", "user", "assistant")
Messages = list[dict[str, str]]


def check_messages(value: object, where: str) -> Messages:
    """Checks a chat that the model is to continue.

    Args:
        value: a list of {"role": ..., "content": ...}, oldest first.
        where: the place of the chat, the beginning of an error message.

    Returns:
        The messages.

    Raises:
        UserError: unless each message has a known role and a text, a system message comes first
            only, and the last message is the user's.
    """
    if not isinstance(value, list | tuple):
        raise UserError(f"{where} must be a list of messages, not {describe(value)}")
    require(bool(value), f"{where} is empty: give at least one message of the user")
    messages = [_check_message(item, f"{where}: message {i + 1}") for i, item in enumerate(value)]
    for number, message in enumerate(messages[1:], 2):
        require(
            message["role"] != "system",
            f"{where}: message {number} is a system message, but only the first may be one",
        )
    last = messages[-1]["role"]
    require(last == "user", f"{where}: the last message is of the role {last}, but must be user")
    return messages


def _check_message(value: object, where: str) -> dict[str, str]:
    """Checks one message."""
    if not isinstance(value, dict):
        raise UserError(
            f'{where} must be an object {{"role": ..., "content": ...}}, not {describe(value)}'
        )
    missing = [key for key in ("role", "content") if key not in value]
    require(not missing, f"{where} has no {' and no '.join(missing)}")
    unknown = [key for key in value if key not in ("role", "content")]
    if unknown:
        raise UserError(f"{where} has the unknown key {describe(unknown[0])}: leave it out")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise UserError(f"{where} has the role {describe(role)}, but it must be {_list(ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"{where} has the content {describe(content)}, but it must be a text")
    # Templates trim contents, so white space alone is an empty turn.
    require(role != "user" or bool(content.strip()), f"{where} has an empty content")
    return {"role": role, "content": content}


def _list(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def read_messages(path: str | Path) -> Messages:
    """Reads one chat from a file.

    Args:
        path: a JSON file that holds a list of messages, or a jsonl file with one message a line.

    Returns:
        The messages, checked.

    Raises:
        UserError: if the file cannot be read, or as `check_messages`.
    """
    if to_path(path).suffix in (".jsonl", ".gz"):
        return check_messages([value for _, value in read_jsonl(path)], str(path))
    value = read_json(path)
    if isinstance(value, dict) and "messages" in value:  # the body of a request to a server
        value = value["messages"]
    return check_messages(value, str(path))


def with_system(messages: Messages, system: str | None) -> Messages:
    """Puts a system prompt before a chat.

    Args:
        messages: the chat.
        system: the system prompt, or None for the chat as it is.

    Raises:
        UserError: if the chat has one already.
    """
    if system is None:
        return messages
    require(
        messages[0]["role"] != "system",
        "the messages begin with a system prompt already, so no other can be given",
    )
    return [{"role": "system", "content": system}, *messages]
