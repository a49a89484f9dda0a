from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from ohmygpu.core.errors import InvalidRequest
from ohmygpu.runtime_api import Message
from ohmygpu.runtime_onnx import sandbox
from ohmygpu.runtime_onnx.template import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}
"""

LLAMA_3 = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- bos_token }}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must " ~
                            "alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""

QWEN_3 = """\
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not(message.content.startswith('<r>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- macro turn(role, text) %}
<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set thought = message.reasoning_content if message.reasoning_content else '' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last and thought %}
            {%- generation %}{{ turn('assistant', '<think>' ~ thought ~ '</think>' ~ content) }}\
{% endgeneration %}
        {%- else %}
            {{- turn('assistant', content) }}
        {%- endif %}
    {%- elif message.name is defined %}
        {{- turn(message.role, {"name": message.name, "text": message.content} | tojson) }}
    {%- else %}
        {{- turn(message.role, message.content) }}
    {%- endif %}
    {%- if loop.index > 40 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TALK = [
    Message("system", " Be kind. "),
    Message("user", "Hi <b>& 'you'"),
    Message("assistant", "<think>x</think>\n Hello "),
    Message("user", " Größe 🙂?\n"),
]
QUESTION = [Message("user", "Why?")]

# what transformers 5.23 renders from the same templates and messages (see `golden_by_transformers`)
GOLDENS = [
    (
        CHATML,
        TALK,
        (
            "<|im_start|>system\n Be kind. <|im_end|>\n<|im_start|>user\nHi <b>& 'you'<|im_end|>\n"
            "<|im_start|>assistant\n<think>x</think>\n Hello <|im_end|>\n"
            "<|im_start|>user\n Größe 🙂?\n<|im_end|>\n<|im_start|>assistant\n"
        ),
    ),
    (
        CHATML,
        QUESTION,
        (
            "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\n"
        ),
    ),
    (
        LLAMA_3,
        TALK,
        (
            "<s><|start_header_id|>system<|end_header_id|>\n\n"
            "Cutting Knowledge Date: December 2023\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi <b>& 'you'<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n<think>x</think>\n Hello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nGröße 🙂?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    (
        MISTRAL,
        TALK,
        (
            "<s>[INST] Hi <b>& 'you'[/INST] <think>x</think>\n Hello</s>[INST]  Be kind. \n\n"
            " Größe 🙂?\n[/INST]"
        ),
    ),
    (
        QWEN_3,
        [
            *TALK,
            Message("assistant", "\nYes.", reasoning="Let me see"),
            Message("tool", 'a "quote" é', name="ruler"),
        ],
        (
            "<|im_start|>system\n Be kind. <|im_end|>\n<|im_start|>user\nHi <b>& 'you'<|im_end|>\n"
            "<|im_start|>assistant\n Hello <|im_end|>\n<|im_start|>user\n Größe 🙂?\n<|im_end|>\n"
            "<|im_start|>assistant\n<think>Let me see</think>Yes.<|im_end|>\n"
            '<|im_start|>tool\n{"name": "ruler", "text": "a \\"quote\\" é"}<|im_end|>\n'
            "<|im_start|>assistant\n"
        ),
    ),
]


def render(template: str, messages: list[Message] | None = None) -> str:
    return ChatTemplate(template, TOKENS).render(messages or QUESTION)


def golden_by_transformers(template: str, messages: list[Message]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat: list[dict[str, Any]] = [
        {"role": each.role, "content": each.content}
        | ({"name": each.name} if each.name else {})
        | ({"reasoning_content": each.reasoning} if each.reasoning else {})
        for each in messages
    ]
    rendered, _ = render_jinja_template(
        [chat], chat_template=template, add_generation_prompt=True, **TOKENS
    )
    return str(rendered[0])


@pytest.mark.parametrize(("template", "messages", "golden"), GOLDENS)
def test_prompts_are_those_of_transformers(
    template: str, messages: list[Message], golden: str
) -> None:
    assert render(template, messages) == golden


@pytest.mark.reference
@pytest.mark.parametrize(("template", "messages", "golden"), GOLDENS)
def test_goldens_are_what_transformers_renders(
    template: str, messages: list[Message], golden: str
) -> None:
    assert golden_by_transformers(template, messages) == golden


def test_tojson_neither_escapes_html_nor_unicode_and_takes_options() -> None:
    text = "{{ {'b': '<é>', 'a': [1]} | tojson(indent=2, sort_keys=true) }}"
    assert render(text) == '{\n  "a": [\n    1\n  ],\n  "b": "<é>"\n}'
    assert render("{{ {'a': 1} | tojson(separators=(',', ':')) }}") == '{"a":1}'


def test_the_date_is_todays() -> None:
    assert render("{{ strftime_now('%Y-%m-%d') }}") in {
        datetime.now().strftime("%Y-%m-%d"),
        render("{{ strftime_now('%Y-%m-%d') }}"),
    }


def test_absent_tokens_and_tools_are_as_in_transformers() -> None:
    text = "{{ tools is none }}{{ pad_token is defined }}{{ documents is none }}"
    assert render(text) == "TrueFalseTrue"


def test_optional_fields_reach_the_template_only_when_given() -> None:
    text = "{% for m in messages %}{{ m.keys() | list }}{% endfor %}"
    assert render(text) == "['role', 'content']"
    full = [Message("tool", "x", name="n", tool_call_id="c", reasoning="r")]
    for key in ("name", "tool_call_id", "reasoning_content", "thinking"):
        assert f"'{key}'" in render(text, full)


def test_a_template_that_refuses_speaks_for_itself() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate user/assistant") as caught:
        render(MISTRAL, [Message("assistant", "x")])
    assert caught.value.details["param"] == "messages"


def test_an_invalid_template_is_an_error_of_the_request_not_of_the_load() -> None:
    template = ChatTemplate("{% for %}", TOKENS)
    with pytest.raises(InvalidRequest, match="template is not valid"):
        template.render(QUESTION)


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages[0].nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{{ messages.append(1) }}",
        "{% set _ = messages[0].update({'role': 'x'}) %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ lipsum(9) }}",
        "{{ 'x' | no_such_filter }}",
    ],
)
def test_other_failures_are_invalid_requests_too(text: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        render(text)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__base__.__subclasses__() }}",
        "{{ namespace(_x=1) }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{{ ['{0.__class__}']|map('format', '')|first|attr('__mro__') }}",
        "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
        "{{ caller.__globals__ }}",
        "{{ joiner.__init__.__builtins__ }}",
        "{% set x = messages|attr('__reduce__') %}{{ x() }}",
    ],
)
def test_templates_cannot_leave_the_sandbox(text: str) -> None:
    try:
        shown = render(text)
    except InvalidRequest:
        return
    assert "class" not in shown
    assert "module" not in shown
    assert "0x" not in shown


DOUBLE = "{% set ns = namespace(s='ab', l=[1, 2], n=3) %}{% for i in range(60) %}"
OUTSIZED = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(9999999) %}{% endfor %}",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999)|map('string')|list|length }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999)|list == [1] }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    DOUBLE + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    DOUBLE + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    DOUBLE + "{% set ns.s = [ns.s, ns.s]|join %}{% endfor %}",
    DOUBLE + "{% set ns.s = ns.s.join([ns.s, ns.s, ns.s]) %}{% endfor %}",
    DOUBLE + "{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
    DOUBLE + "{% set ns.s = ns.s|replace('a', ns.s) %}{% endfor %}",
    DOUBLE + "{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    DOUBLE + "{% set ns.s = '%s%s'|format(ns.s, ns.s) %}{% endfor %}",
    DOUBLE + "{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}",
    DOUBLE + "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
    DOUBLE + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    DOUBLE + "{% set ns.l = ns.l * 2 %}{% endfor %}",
    DOUBLE + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l|tojson }}",
    DOUBLE + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    DOUBLE + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ 'x' ~ ns.l }}",
    DOUBLE + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l|string }}",
    DOUBLE + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ '%s' % (ns.l,) }}",
    DOUBLE + "{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l.items() }}",
    DOUBLE + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ 'x' * 999999999 }}",
    "{{ 999999999 * 'x' }}",
    "{{ [1] * 999999999 }}",
    "{{ 'x' * 99999 * 99999 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 'x'.center(999999999) }}",
    "{{ 'x'.ljust(999999999) }}",
    "{{ 'x'.zfill(999999999) }}",
    "{{ '\t'.expandtabs(999999999) }}",
    "{{ 'x'|center(999999999) }}",
    "{{ 'x'|indent(999999999, true) }}",
    "{{ [1]|tojson(indent=999999999) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%.999999999f' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=999999999) }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ strftime_now('%999999999d') }}",
    "{{ (1).to_bytes(999999999, 'big') }}",
    "{{ ('x' * 9999999).encode('punycode') }}",
    "{{ ('<' * 999999)|striptags }}",
    "{{ (['x' * 9999] * 99999)|join }}",
    "{{ ((['x' * 9999] * 99999)|map('upper'))|join }}",
    "{{ ','.join((['x' * 9999] * 99999)|map('upper')) }}",
    "{{ [1]|batch(99999999, 'x')|list }}",
    "{{ [1]|slice(99999999)|list }}",
]


@pytest.mark.parametrize("text", OUTSIZED)
def test_templates_cannot_take_more_than_their_budget(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 20_000)  # the same bound, met sooner
    with pytest.raises(InvalidRequest, match="chat template"):
        render(text)


def test_processor_time_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_CPU_S", 0.05)
    with pytest.raises(InvalidRequest, match=r"computes for more than 0\.05 s"):
        render("{% for i in range(99999) %}{{ i in range(99999)|list }}{% endfor %}")


def test_an_overspent_budget_does_not_outlast_its_rendering() -> None:
    template = ChatTemplate(
        "{% if messages|length > 1 %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}ok",
        TOKENS,
    )
    with pytest.raises(InvalidRequest, match="steps"):
        template.render(TALK)
    assert template.render(QUESTION) == "ok"


def test_long_conversations_and_texts_fit_the_budget() -> None:
    talk = [Message("user" if turn % 2 == 0 else "assistant", "word " * 20) for turn in range(4001)]
    assert render(CHATML, talk).count("<|im_start|>") == 4003
    assert render(MISTRAL, talk).count("[INST]") == 2001
    text = "line\n\n" * 400_000
    assert text.strip() in render(LLAMA_3, [Message("user", text)])


def test_markdown_and_numbers_in_formatted_texts_are_fine() -> None:
    assert render("{{ '**%s** since 20240101 {x}' % 'now' }}") == "**now** since 20240101 {x}"
    assert render("{{ '{} at 20240101'.format(5) }}") == "5 at 20240101"
    assert render("{{ 'a' ~ 1234567 ~ 'b' }}{{ 1234567 }}") == "a1234567b1234567"


def test_loop_variables_survive_the_count_of_turns() -> None:
    text = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }}"
        "{{ loop.previtem is defined }}{{ loop.nextitem is defined }} {% else %}none{% endfor %}"
    )
    assert render(text, TALK[:2]) == "1/2TrueFalseFalseTrue 2/2FalseTrueTrueFalse "
    tree = "{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}"
    assert render(tree) == "123"


def test_a_continuation_is_what_follows_the_reply() -> None:
    chatml = ChatTemplate(CHATML, TOKENS)
    assert chatml.render_continuation(QUESTION) == (
        "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ChatTemplate(MISTRAL, TOKENS).render_continuation(QUESTION) == "</s>[INST] Why?[/INST]"
    sly = [Message("user", "omgcontinues omgcontinuesx")]
    assert "omgcontinues omgcontinuesx<|im_end|>" in chatml.render_continuation(sly)


def test_a_template_that_forgets_replies_cannot_continue() -> None:
    with pytest.raises(InvalidRequest, match="leaves earlier replies out"):
        ChatTemplate("{{ messages[-1].content }}", TOKENS).render_continuation(QUESTION)
