"""Fuzz targets (atheris, with coverage feedback) over what reads untrusted files in Python.

    python fuzz/readers.py READER [libFuzzer's options] [CORPUS …]      (make fuzz: see fuzz/run.py)

A reader gives something or raises ``UserError`` with one line. Anything else is a finding: another exception, a process
that takes more than ``MORE_MEMORY``, ten seconds for one file, a file that is opened outside of the model's folder.

Inputs of most readers are JSON: a whole folder as ``{"file name": content}``, a config, the metadata of a GGUF file.
Half of the mutations change bytes, the other half change one value of the JSON, so that what comes behind the parser is
reached. Chat templates are compiled but not filled in: they are programs, and may run for long.
"""

from __future__ import annotations

import gc
import importlib
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import atheris
import numpy as np

from tulle.errors import UserError
from tulle.format.pack import STORAGE, unpack_stored
from tulle.format.spec import QuantizationConfig
from tulle.models.description import describe, families
from tulle.models.gguf.file import GgufFile
from tulle.models.gguf.source import GgufSource
from tulle.models.gguf.tokenizer import tokenizer_of
from tulle.models.rotary import frequencies
from tulle.models.source import describe_source, open_source
from tulle.models.tensor_file import TensorFile
from tulle.text import sentencepiece
from tulle.text.chat_template import _compiled
from tulle.text.tokenizer_folder import read_tokenizer

MORE_MEMORY = 1 << 30
"""Bytes of address space that a reader may take beyond what the process has when it begins."""
MOST_DATA = 1 << 16
"""Bytes of a file that the target makes from a header."""
FOLDER = Path(tempfile.mkdtemp(prefix="tulle-fuzz-"))
CHAT_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
NUMBERS = (0, 1, -1, 2, 3, 7, 8, 64, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**12, 10**400)
VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "a\nb", "\ud800", [], {}, [[]], {"x": 1}, 0.0, -1.5, 1e308, float("nan"), float("inf"),
    "../x", "/x", [None], [1, 2], ["a"], {"content": "a"},
)  # fmt: skip


# Readers ---------------------------------------------------------------------------------------------------------


def safetensors(data: bytes) -> None:
    file = TensorFile(Path("x.safetensors"), np.frombuffer(data, np.uint8))
    for name in file.names():
        attempt(lambda name=name: (file.info(name).bytes, file.tensor(name)))


def folder(data: bytes) -> None:
    """A model folder: config, index, shards, settings of quantisers and adapters."""
    place = write_folder(as_json(data))
    source = open_source(place)
    for file in source.files:
        assert file.resolve().is_relative_to(place.resolve()), f"{file} is outside of the folder"
    attempt(lambda: describe_source(source))
    for name in source.names()[:20]:
        attempt(lambda name=name: (source.info(name), source.read(name)))
    attempt(source.identity)


def config(data: bytes) -> None:
    found = as_json(data)
    model = describe(found if isinstance(found, dict) else {})  # read_json lets nothing else through
    for rotary in model.rotary.values():
        if rotary.dim <= 1 << 16:
            frequencies(rotary, 4096)
    model.outer_tensors()


def packed(data: bytes) -> None:
    """``quantization_config``, and tensors of zeros as it asks for them."""
    found = QuantizationConfig.from_json(as_json(data))
    found.to_json()
    for spec in found.linears.values():
        kinds = spec.stored_tensors()
        if spec.shape[0] * spec.shape[1] > MOST_DATA or any(np.prod(shape) > MOST_DATA for _, shape in kinds.values()):
            continue
        arrays = {suffix: np.zeros(shape, STORAGE.get(kind, kind)) for suffix, (kind, shape) in spec.tensors().items()}
        attempt(lambda spec=spec, arrays=arrays: unpack_stored(spec, arrays))


def tokenizer(data: bytes) -> None:
    """The files of a tokenizer."""
    found = read_tokenizer(write_folder(as_json(data)))
    tokens = found.encode("Once upon a time, 敏捷的 <s>")
    found.decode(tokens)
    for name in ("bos_token", "eos_token"):
        found.special_id(name)


def template(data: bytes) -> None:
    """A chat template is a program of Jinja: it is compiled."""
    from jinja2 import TemplateError

    try:
        _compiled(data.decode("utf-8", "replace"))
    except (TemplateError, RecursionError):  # as chat_template.render catches them
        pass


def sentence_piece(data: bytes) -> None:
    found = sentencepiece.tokenizer_of(sentencepiece.parse(data))
    found.encode("Once upon a time, 敏捷的")


def gguf(data: bytes) -> None:
    """The bytes of a file."""
    path = FOLDER / "x.gguf"
    path.write_bytes(data)
    file = GgufFile(path)
    for name in file.tensors:
        attempt(lambda name=name: file.raw(name))
    read_gguf(path)


def gguf_metadata(data: bytes) -> None:
    """``{"metadata": …, "tensors": {name: [type, shape]}}``, written as a file."""
    path = FOLDER / "x.gguf"
    path.write_bytes(gguf_bytes(as_json(data)))
    read_gguf(path)


def read_gguf(path: Path) -> None:
    attempt(lambda: tokenizer_of(GgufFile(path).metadata))
    source = GgufSource(path)
    attempt(lambda: describe_source(source))
    for name in source.names()[:20]:
        attempt(lambda name=name: (source.info(name), source.read(name)))
        attempt(lambda name=name: source.coded(name))


def recipe(data: bytes) -> None:
    # Here, since all methods and torch come with them.
    from tulle.compression.recipe import load_recipe
    from tulle.training.recipe import load_recipe as load_training_recipe

    path = FOLDER / "x.yaml"
    path.write_bytes(data)
    attempt(lambda: load_recipe(path))
    load_training_recipe(path)


def request(data: bytes) -> None:
    """A body as a client sends it: its bounds, every schema that takes it, and the prompt of what is a conversation."""
    # Here, since the server's libraries come with them.
    from pydantic import ValidationError
    from starlette.exceptions import HTTPException

    from tulle.serve import conversation
    from tulle.serve.errors import ApiError, of_validation
    from tulle.serve.routes import chat, messages, responses
    from tulle.serve.schemas import anthropic, openai
    from tulle.serve.schemas.responses import ResponsesRequest
    from tulle.serve.security import parse_json

    model: Any = served_model()
    talks: dict[Any, Callable[[Any, Any], Any]] = {
        openai.ChatRequest: chat.talk_of, ResponsesRequest: responses.talk_of,
        anthropic.MessagesRequest: messages.talk_of, anthropic.CountRequest: messages.talk_of,
    }  # fmt: skip
    plain = (
        openai.CompletionRequest, openai.EmbeddingRequest, openai.ScoreRequest, openai.TokenizeRequest,
        openai.DetokenizeRequest,
    )  # fmt: skip

    def one(schema: Any, content: Any) -> None:
        try:
            body = schema.model_validate(content)
        except ValidationError as error:
            raise of_validation(error.errors()) from None
        if schema in talks:
            conversation.render(model, talks[schema](body, model))

    def answered(read: Callable[[], Any]) -> Any:
        """What the server would answer is an error of the client's, in one line."""
        try:
            return read()
        except HTTPException as error:
            assert isinstance(error, ApiError) and 400 <= error.status_code < 500, repr(error)
            raise UserError(str(error.detail)) from None

    content = answered(lambda: parse_json(data))
    for schema in (*talks, *plain):
        attempt(lambda schema=schema: answered(lambda: one(schema, content)))


@lru_cache
def served_model() -> Any:
    """What of a served model makes prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from tulle.text.tokenizer import ModelTokenizer
    from tulle.text.tool_formats import detect

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = ModelTokenizer(library, {"eos_token": "</s>"}, templates={"default": CHAT_TEMPLATE})
    return SimpleNamespace(
        text=text, format=detect(text, "llama"), template=CHAT_TEMPLATE + " enable_thinking", encode=text.encode
    )


READERS: dict[str, Callable[[bytes], None]] = {
    "safetensors": safetensors, "folder": folder, "config": config, "packed": packed, "tokenizer": tokenizer,
    "template": template, "sentencepiece": sentence_piece, "gguf": gguf, "gguf-metadata": gguf_metadata,
    "recipe": recipe, "request": request,
}  # fmt: skip


def attempt(read: Callable[[], object]) -> None:
    """Whatever a ``UserError`` in one line says is right."""
    try:
        read()
    except UserError as error:
        assert len(str(error).splitlines()) <= 1, f"more than one line: {error!r}"


# What inputs are made into -----------------------------------------------------------------------------------------


def as_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UserError("expected JSON") from None


def write_folder(content: Any) -> Path:
    """A folder of ``{"name": content}``: text as it is, other content as JSON; of a safetensors file the header, to
    which as many zeros are added as it asks for."""
    place = FOLDER / "home" / "model"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for name, part in content.items() if isinstance(content, dict) else ():
        # Tame names: what is written by the target itself must stay in the folder.
        if not name.isascii() or not name.replace(".", "").replace("_", "").replace("-", "").isalnum():
            continue
        text = (part if isinstance(part, str) else json.dumps(part)).encode("utf-8", "surrogatepass")
        if name.endswith(".safetensors"):
            text = len(text).to_bytes(8, "little") + text + bytes(data_end(part))
        (place / name).write_bytes(text)
    return place


def data_end(header: Any) -> int:
    entries = header.values() if isinstance(header, dict) else ()
    offsets = [e["data_offsets"] for e in entries if isinstance(e, dict) and isinstance(e.get("data_offsets"), list)]
    ends = [o[1] for o in offsets if len(o) == 2 and isinstance(o[1], int) and 0 <= o[1] <= MOST_DATA]
    return max(ends, default=0)


def gguf_bytes(content: Any) -> bytes:
    """A GGUF file; numbers that fit nowhere are cut."""

    def text(value: str) -> bytes:
        raw = value.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(raw)) + raw

    def value(of: Any) -> bytes:
        if isinstance(of, bool):
            return struct.pack("<I?", 7, of)
        if isinstance(of, int):
            return (
                struct.pack("<IQ", 10, of % 2**64)
                if of > 2**32
                else struct.pack("<Ii", 5, (of + 2**31) % 2**32 - 2**31)
            )
        if isinstance(of, float):
            return struct.pack("<Id", 12, of)
        if isinstance(of, list):
            return struct.pack("<I", 9) + array(of)
        return struct.pack("<I", 8) + text(of if isinstance(of, str) else json.dumps(of))

    def array(of: list[Any]) -> bytes:
        if of and all(type(item) is int for item in of):
            return struct.pack("<IQ", 5, len(of)) + b"".join(struct.pack("<I", i % 2**32) for i in of)
        if of and all(type(item) is float for item in of):
            return struct.pack("<IQ", 12, len(of)) + b"".join(struct.pack("<d", i) for i in of)
        if of and all(isinstance(item, list) for item in of):
            return struct.pack("<IQ", 9, len(of)) + b"".join(array(item) for item in of)
        return struct.pack("<IQ", 8, len(of)) + b"".join(text(i if isinstance(i, str) else json.dumps(i)) for i in of)

    content = content if isinstance(content, dict) else {}
    metadata, tensors = (content.get(k) if isinstance(content.get(k), dict) else {} for k in ("metadata", "tensors"))
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(text(key) + value(of) for key, of in metadata.items())
    place = 0
    for name, entry in tensors.items():
        kind, shape = entry if isinstance(entry, list) and len(entry) == 2 else (0, [])
        shape = [n % 2**64 for n in shape if type(n) is int] if isinstance(shape, list) else []
        header += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape[::-1])
        header += struct.pack("<IQ", kind % 2**32 if type(kind) is int else 0, place)
        place = min(place + (-(-int(np.prod(shape, dtype=object)) * 8 // 32) * 32), MOST_DATA)
    return header.ljust(-(-len(header) // 32) * 32, b"\0") + bytes(place)


# Mutations ------------------------------------------------------------------------------------------------------------


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Changes bytes, or a value of the JSON that the bytes are."""
    choice = random.Random(seed)
    if choice.random() < 0.5:
        try:
            content = json.loads(data)
            found = json.dumps(changed(content, choice), ensure_ascii=choice.random() < 0.5)
            if len(raw := found.encode("utf-8", "surrogatepass")) <= most:
                return raw
        except (ValueError, RecursionError):
            pass
    return bytes(atheris.Mutate(data, most))


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(content, dict):
        found += [p for key, item in content.items() for p in places(item, (*path, key))]
    elif isinstance(content, list):
        found += [p for i, item in enumerate(content[:64]) for p in places(item, (*path, i))]
    return found


def at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def changed(content: Any, choice: random.Random) -> Any:
    """One to three places changed: another value, a copy of another place, a key renamed, added or removed."""
    for _ in range(choice.choice((1, 1, 1, 2, 3))):
        paths = places(content)
        path = choice.choice(paths)
        if not path:
            continue
        holder, key = at(content, path[:-1]), path[-1]
        how = choice.randrange(6)
        if how == 0:
            holder[key] = choice.choice(VALUES)
        elif how == 1:
            value = holder[key]
            number = choice.choice(NUMBERS)
            whole = isinstance(value, int) and not isinstance(value, bool)
            holder[key] = (
                choice.choice((value + 1, value - 1, value * 2, value // 2, -value, number)) if whole else number
            )
        elif how == 2:
            holder[key] = json.loads(json.dumps(at(content, choice.choice(paths))))
        elif how == 3:
            del holder[key]
        elif isinstance(holder, dict):
            names = [p[-1] for p in paths if p and isinstance(p[-1], str)]
            holder[choice.choice(names)] = holder.pop(key) if how == 4 else choice.choice(VALUES)
        else:
            holder.insert(key, json.loads(json.dumps(holder[key])))
    return content


def load_recipes() -> None:
    """All methods, so that their import counts for no input."""
    from tulle.compression.recipe import METHODS, method_class
    from tulle.training.recipe import TrainRecipe  # noqa: F401

    for name in METHODS:
        method_class(name)


def instrument() -> None:
    """Makes Tulle's functions report what they reach. (atheris' own import hook sees nothing of an editable install,
    which brings its own.)"""
    for family in families():
        importlib.import_module(f"tulle.models.families.{family}")
    for module in ("compiler", "lexer", "parser"):
        importlib.import_module(f"jinja2.{module}")
    ours = ("tulle.", "jinja2.parser", "jinja2.lexer", "jinja2.compiler")  # a template is read by Jinja alone
    functions = [f for f in gc.get_objects() if isinstance(f, FunctionType) and str(f.__module__).startswith(ours)]
    for function in functions:
        atheris.instrument_func(function)


def main() -> None:
    reader = READERS[sys.argv[1]]
    if reader is recipe:
        load_recipes()
    if reader is request:  # what it imports is instrumented, too
        attempt(lambda: request(b"{}"))
    instrument()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MORE_MEMORY, resource.RLIM_INFINITY))
    arguments = [sys.argv[0], *sys.argv[2:]]
    atheris.Setup(arguments, lambda data: attempt(lambda: reader(data)), custom_mutator=mutate)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main()
