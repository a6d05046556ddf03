"""Request bodies: read with a bound, decoded with errors that name the field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

import msgspec
from msgspec import inspect
from starlette.requests import Request

from flexpipe_serve.deployments.errors import ApiError, shorten
from flexpipe_serve.deployments.unsupported import drop_unsupported
from flexpipe_serve.errors import InvalidRequestError

_LOCATION = re.compile(r"(?P<problem>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?", re.DOTALL)
_FIELD = re.compile(r"Object (?P<problem>contains unknown|missing required) field `(?P<name>.*)`", re.DOTALL)

_T = TypeVar("_T", bound=msgspec.Struct)


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """The whole body. Raises ApiError (413) as soon as it is known to be longer than ``max_bytes``."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(f"{declared} bytes", max_bytes)
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise _too_large(f"more than {max_bytes} bytes", max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def decode(body: bytes, kind: type[_T]) -> _T:
    """``body`` as ``kind``.

    Raises:
        ApiError: 400 that names the offending field.
        InvalidRequestError: the same, found by ``kind`` itself.
    """
    try:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError:
            # Off the common path: perhaps a parameter that says nothing, such as "tools": [].
            return msgspec.convert(drop_unsupported(msgspec.json.decode(body), kind), kind, str_keys=True)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, InvalidRequestError):  # the struct's own check
            raise error.__cause__ from None
        raise _invalid_field(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None


def _too_large(seen: str, max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The body has {seen}; this server accepts at most {max_bytes} (limits.max_body). Send less at once.",
        code="request_too_large",
    )


def _invalid_field(message: str, kind: type[msgspec.Struct]) -> ApiError:
    location = _LOCATION.fullmatch(message)
    assert location is not None
    problem, path = location["problem"], location["path"] or ""
    field = _FIELD.fullmatch(problem)
    if field is not None:
        path = f"{path}.{field['name']}" if path else field["name"]
        problem = "required" if field["problem"] == "missing required" else "unknown field"
    elif problem.startswith(("Invalid enum value", "Invalid value")):
        problem += _known_values(kind, path)
    where = shorten(path) or "The body"
    problem = shorten(problem.replace("`", "'"))
    return ApiError(400, f"{where}: {problem[:1].lower() + problem[1:]}.", param=shorten(path) or None)


def _known_values(kind: type[msgspec.Struct], path: str) -> str:
    """Of the field at ``path``, such as ``messages[0].role``."""
    types = [inspect.type_info(kind)]
    for step in re.findall(r"[^.\[\]]+", path):
        types = [inner for outer in types for inner in _inside(outer, step)]
    known = [repr(value) for each in types for value in _values(each)]
    return f"; it is one of {', '.join(known)}" if known else ""


def _inside(outer: inspect.Type, step: str) -> Sequence[inspect.Type]:
    """What may stand at a field or an index, all kinds of it."""
    match outer:
        case inspect.ListType() | inspect.VarTupleType():
            return _alternatives(outer.item_type)
        case inspect.StructType() if step == outer.tag_field:
            return [inspect.LiteralType((outer.tag,))]
        case inspect.StructType():
            return [inner for field in outer.fields if field.name == step for inner in _alternatives(field.type)]
        case _:
            return []


def _alternatives(of: inspect.Type) -> Sequence[inspect.Type]:
    return of.types if isinstance(of, inspect.UnionType) else (of,)


def _values(of: inspect.Type) -> Sequence[object]:
    match of:
        case inspect.LiteralType():
            return of.values
        case inspect.EnumType():
            return [member.value for member in of.cls]
        case _:
            return ()
