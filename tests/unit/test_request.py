"""What is read of a body, what is cut from it, and what stays as it came."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xandrouting.core.errors import InvalidRequest
from xandrouting.proxy.request import (
    CUT,
    BodyParser,
    Chat,
    Inference,
    LoadRequest,
    Routing,
    UnloadRequest,
    body_for,
)

CHAT, ANY = BodyParser(Chat), BodyParser(Inference)
MODEL = "/models/m.gguf"
MESSAGES = b'"messages":[{"role":"user","content":"hi"}]'


def body(*fields: bytes, model: str = "m") -> bytes:
    """A chat request's body, with these fields after the usual ones."""
    return b"{" + b",".join((b'"model":"%b"' % model.encode(), MESSAGES, *fields)) + b"}"


def parse(*fields: bytes) -> Chat:
    return CHAT.parse(body(*fields))


def refused(data: bytes, parser: BodyParser[Any] = CHAT) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parser.parse(data)
    error = caught.value
    assert "JSON" not in error.message
    assert "Unexpected" not in error.message
    assert error.message.endswith(".")
    assert len(error.message) < 300
    return error


def sent_on(data: bytes, parser: BodyParser[Any] = CHAT) -> bytes:
    return body_for(data, parser.parse(data), MODEL)


# What is read.


def test_the_routing_fields_are_read() -> None:
    fields = parse(
        b'"backend":"llamacpp","device":"cuda:1","gpu_memory_utilization":0.5',
        b'"max_model_len":8,"n_gpu_layers":-1,"n_ctx":0,"n_parallel":2,"ttl":0,"stream":true',
        b'"tensor_parallel_size":2',
    )
    assert (fields.model, fields.backend, fields.device) == ("m", "llamacpp", "cuda:1")
    assert (fields.gpu_memory_utilization, fields.max_model_len) == (0.5, 8)
    assert fields.tensor_parallel_size == 2
    assert (fields.n_gpu_layers, fields.n_ctx, fields.n_parallel, fields.ttl) == (-1, 0, 2, 0)
    assert fields.stream is True


def test_unset_is_none() -> None:
    fields = parse()
    assert [getattr(fields, name) for name in CUT] == [None] * len(CUT)
    assert fields.stream is None


@pytest.mark.parametrize(
    "name",
    [
        *sorted(CUT),
        *("stream", "temperature", "top_p", "presence_penalty", "frequency_penalty"),
        *("max_tokens", "max_completion_tokens", "stop", "tools"),
    ],
)
def test_null_is_unset(name: str) -> None:
    assert getattr(parse(b'"%b":null' % name.encode()), name) is None


INTEGERS = {
    "max_model_len": (1, 2**31 - 1),
    "n_gpu_layers": (-1, 2**31 - 1),
    "n_ctx": (0, 2**31 - 1),
    "n_parallel": (1, 1024),
    "tensor_parallel_size": (1, 64),
    "ttl": (0, 2**31 - 1),
    "max_tokens": (1, 2**31 - 1),
    "max_completion_tokens": (1, 2**31 - 1),
}
NUMBERS = {
    "gpu_memory_utilization": (0.1, 1.0),
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


@pytest.mark.parametrize(("name", "ends"), [*INTEGERS.items(), *NUMBERS.items()])
def test_both_ends_of_a_range_are_in_it(name: str, ends: tuple[float, float]) -> None:
    for value in ends:
        assert getattr(parse(f'"{name}":{value}'.encode()), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, (low, high) in INTEGERS.items() for value in (low - 1, high + 1)]
    + [(name, low - 0.01) for name, (low, _) in NUMBERS.items()]
    + [(name, high + 0.01) for name, (_, high) in NUMBERS.items()]
    + [(name, 10**30) for name in (*INTEGERS, *NUMBERS)]
    + [(name, "1e999") for name in NUMBERS]
    + [(name, value) for name in INTEGERS for value in ("1.5", "1e3", '"5"', "true", "[]")],
)
def test_what_is_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    error = refused(body(f'"{name}":{value}'.encode()))
    assert error.param == name
    assert name in error.message


def test_a_whole_number_is_a_number() -> None:
    assert parse(b'"temperature":1').temperature == 1.0
    assert parse(b'"temperature":0').temperature == 0.0


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:7", "cuda:127"])
def test_devices(device: str) -> None:
    assert parse(f'"device":"{device}"'.encode()).device == device


@pytest.mark.parametrize(
    "device",
    [
        *("", "gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:1234", "cuda:00", "cuda:01"),
        *("cuda:0,1", "cuda\\n", "cuda:0\\n", " cpu", "cpu\\r\\nx: y", "mps"),
    ],
)
def test_no_devices(device: str) -> None:
    error = refused(body(f'"device":"{device}"'.encode()))
    assert error.param == "device"
    assert "cuda:N" in error.message


@pytest.mark.parametrize("backend", ["upstream", "", "LlamaCpp", "x - at `$.y`", "JSON", "x" * 999])
def test_a_backend_that_is_none_is_told_which_there_are(backend: str) -> None:
    error = refused(body(f'"backend":"{backend}"'.encode()))
    assert error.param == "backend"
    assert "llamacpp" in error.message


@pytest.mark.parametrize("stop", [b'"a"', b"[]", b'["a","b"]', b"null"])
def test_stop_is_a_text_or_several(stop: bytes) -> None:
    parse(b'"stop":' + stop)


@pytest.mark.parametrize(("stop", "param"), [(b"1", "stop"), (b"[1]", "stop[0]")])
def test_stop_is_nothing_else(stop: bytes, param: str) -> None:
    assert refused(body(b'"stop":' + stop)).param == param


@pytest.mark.parametrize(
    "messages",
    [
        b'[{"role":"user","content":[{"type":"text","text":"hi"}]}]',
        b'[{"role":"user"},{"role":"user"}]',
        b'[{"role":"assistant","content":null,"tool_calls":[{}]},{"role":"tool","content":""}]',
        b'[{"role":"developer","content":"","name":"x","new":{"a":[1]}}]',
    ],
)
def test_messages_the_engine_may_judge(messages: bytes) -> None:
    CHAT.parse(b'{"model":"m","messages":' + messages + b"}")


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b"{}", "model"),
        (b'{"messages":[]}', "messages"),
        (b'{"model":"m"}', "messages"),
        (b'{"model":null,"messages":[{"role":"user"}]}', "model"),
        (b'{"model":7,"messages":[{"role":"user"}]}', "model"),
        (b'{"model":"","messages":[{"role":"user"}]}', "model"),
        (b'{"model":"m","messages":[]}', "messages"),
        (b'{"model":"m","messages":null}', "messages"),
        (b'{"model":"m","messages":"hi"}', "messages"),
        (b'{"model":"m","messages":["hi"]}', "messages[0]"),
        (b'{"model":"m","messages":[{"role":"user"},{}]}', "messages[1]"),
        (b'{"model":"m","messages":[{"role":5}]}', "messages[0].role"),
        (body(b'"stream":1'), "stream"),
        (body(b'"tools":{}'), "tools"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, param: str) -> None:
    error = refused(data)
    assert error.param == param
    assert param in error.message


DEEP = 100_000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"   ",
        b"[]",
        b"null",
        b"1",
        b'"text"',
        b"hello",
        b"{",
        b"}",
        body()[:-1],
        body() + b"x",
        body() + body(),
        body(b'"x":NaN'),
        body(b'"temperature":NaN'),
        body(b'"temperature":Infinity'),
        body(b'"x":-Infinity'),
        body(b'"x":01'),
        body(b'"x":tru'),
        body(b'"x":1,'),
        body(b'"x":"\x01"'),
        body(b"'x':1"),
        body().replace(b'"m"', b'"\xff"'),
        body().replace(b'"m"', b'"\\ud800"'),
        body(b'"x":"\\ud800"'),
        b"\xef\xbb\xbf" + body(),
        body().decode().encode("utf-16"),
        b"model=m&messages=hi",
        b"[" * DEEP,
        b"[" * DEEP + b"]" * DEEP,
        body(b'"x":' + b"[" * DEEP + b"]" * DEEP),
        body(b'"x":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    ],
    ids=lambda data: data[:20].decode("latin-1"),
)
def test_what_is_no_request_at_all(data: bytes) -> None:
    assert refused(data, CHAT).param is None
    assert refused(data, ANY).param is None


# What is sent on.


@pytest.mark.parametrize(
    "value",
    [
        b"1.0",
        b"1e5",
        b"-0.0",
        b"1E+2",
        b"0.1000000000000000055511151231257827",
        b"123456789012345678901234567890",
        b'"\\u00e9\\n\\/\\ud83d\\ude00"',
        '"é😀"'.encode(),
        b'"\xff is the engine\'s to judge"',
        b'{ "b" : [ 1 , 2.50 ] ,\n"a":{}, "a":null }',
        b'[[[{"model":"x","ttl":1,"n_ctx":[]}]]]',
        b"true",
        b"null",
    ],
)
@pytest.mark.parametrize("name", [b"new_field", b"logit_bias", b"temperature2", b"nTTL"])
def test_every_other_value_stays_as_it_came(name: bytes, value: bytes) -> None:
    field = b'"%b":%b' % (name, value)
    data = body(b'"ttl":5', field, b'"n_ctx":9')
    assert sent_on(data) == b'{"model":"%b",%b,%b}' % (MODEL.encode(), MESSAGES, field)


def test_the_order_stays() -> None:
    data = b'{"z":1,"ttl":1,"messages":[{"role":"user"}],"a":2,"model":"m","device":null,"b":3}'
    assert list(json.loads(sent_on(data))) == ["z", "messages", "a", "model", "b"]


def test_all_of_the_routing_is_cut() -> None:
    fields = [b'"%b":null' % name.encode() for name in sorted(CUT)]
    assert sent_on(body(*fields)) == body(model=MODEL)
    assert {"model", "messages", "stream", "temperature", "max_tokens", "stop"}.isdisjoint(CUT)


@pytest.mark.parametrize("name", [b'"n_ct\\u0078"', b'"\\u0074tl"'])
def test_a_name_in_disguise_is_read_and_cut(name: bytes) -> None:
    assert sent_on(body(name + b":7")) == body(model=MODEL)
    with pytest.raises(InvalidRequest):
        parse(name + b":-1")


def test_a_body_that_needs_no_change_is_the_same_object() -> None:
    data = b' { "model" : "%b" , %b , "x" : 1.0 } ' % (MODEL.encode(), MESSAGES)
    assert sent_on(data) is data


def test_another_name_of_the_model_is_replaced() -> None:
    assert sent_on(body()) == body(model=MODEL)


def test_the_model_s_name_is_written_as_it_must_be() -> None:
    odd = '/models/a"b\\c é.gguf'
    assert json.loads(body_for(body(), parse(), odd))["model"] == odd


def test_of_two_fields_of_one_name_the_last_counts() -> None:
    data = body(b'"n_ctx":1,"n_ctx":2', b'"model":"other"', b'"x":1,"x":2')
    fields = CHAT.parse(data)
    assert (fields.n_ctx, fields.model) == (2, "other")
    assert json.loads(body_for(data, fields, MODEL))["model"] == MODEL
    assert sent_on(data).count(b'"model"') == 1


def test_a_field_s_name_that_is_no_text_is_refused() -> None:
    data = body(b'"\xff":1')
    fields = CHAT.parse(data)  # it looks at no field it does not know
    with pytest.raises(InvalidRequest, match="broken"):
        body_for(data, fields, MODEL)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5, alphabet="abcé\"\\\n"), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
NAMES = st.sampled_from([*sorted(CUT), "x", "stop_words", "é", 'a"b', "\n", ""])


@settings(max_examples=25, deadline=None)
@given(
    fields=st.dictionaries(NAMES, JSON, max_size=6),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_what_is_sent_on_means_what_came(
    fields: dict[str, Any], ascii_only: bool, indent: int | None
) -> None:
    fields = {name: None if name in CUT else value for name, value in fields.items()}
    data = json.dumps({"model": "m", **fields}, ensure_ascii=ascii_only, indent=indent).encode()
    sent = json.loads(sent_on(data, ANY))
    kept = {name: value for name, value in fields.items() if name not in CUT}
    assert sent == {"model": MODEL, **kept}


@settings(max_examples=40, deadline=None)
@given(
    data=st.binary(max_size=30)
    | st.lists(
        st.sampled_from(
            [
                *b'{}[]:,"\\\xff\xc3 1e-.',
                *map(bytes, (b'"model"', b'"m"', b"null", b'"x"', b"true")),
            ]
        ).map(lambda piece: bytes([piece]) if isinstance(piece, int) else piece),
        max_size=12,
    ).map(b"".join)
)
def test_whatever_comes_is_parsed_or_refused(data: bytes) -> None:
    for candidate in (data, b'{"model":"m",' + data + b"}", b'{"model":"m","x":' + data + b"}"):
        try:
            body_for(candidate, ANY.parse(candidate), MODEL)
        except InvalidRequest:
            pass


# The control calls' bodies.


def test_load_and_unload_are_checked_alike() -> None:
    wanted = BodyParser(LoadRequest).parse(b'{"model":"m","ttl":0,"wait":false,"n_ctx":1}')
    assert (wanted.ttl, wanted.wait, wanted.n_ctx) == (0, False, 1)
    going = BodyParser(UnloadRequest).parse(b'{"model":"m","device":"cuda:1","force":true}')
    assert (going.device, going.force, going.backend) == ("cuda:1", True, None)
    assert refused(b'{"model":"m","ttl":-1}', BodyParser(LoadRequest)).param == "ttl"
    assert refused(b'{"model":"m","device":"gpu"}', BodyParser(UnloadRequest)).param == "device"
    assert refused(b"[]", BodyParser(UnloadRequest)).param is None


def test_the_routing_fields_are_the_contract_s() -> None:
    assert set(Routing.__struct_fields__) == {
        *("model", "backend", "device", "gpu_memory_utilization", "max_model_len"),
        *("tensor_parallel_size",),
        *("n_gpu_layers", "n_ctx", "n_parallel", "cache_type_k", "cache_type_v", "ttl"),
    }
