"""The jinja2 sandbox that chat templates run in: transformers' dialect, on a budget.

Every loop turn, call, filter and text operation costs steps in proportion to the work it causes;
no text, list or integer may grow beyond a bound; and the whole may take only so much processor
time. What cannot be bounded (a few filters and methods that no chat template uses) is not there.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 500_000  # of one rendering; a turn of a conversation costs a few dozen
MAX_CPU_S = 5.0  # of one rendering, for what costs more than its steps say
MAX_CHARACTERS = 64 * 1024 * 1024  # of any text a template makes
MAX_INTEGER_BITS = 1024
MAX_ARGUMENT = 100_000  # of an integer argument: widths, counts, ranges
CHARACTERS_PER_STEP = 1024
ITEM_CHARACTERS = 16  # what an item of a list costs, in characters
# widths and precisions of printf, str.format and strftime that would blow a text up
_LONG_NUMBER = re.compile(r"%[^a-zA-Z%]*(?:[0-9]{6}|\*)|\{[^{}]*[0-9]{6}")
# filters and methods whose cost nothing bounds; no chat template has a use for them
_REMOVED_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_REMOVED_METHODS = frozenset({"encode", "maketrans", "translate", "to_bytes", "from_bytes"})


class OverBudget(jinja2.TemplateError):
    """The template asked for more than it may have."""


class SandboxEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox: transformers' dialect, and the budget of the rendering under way."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=self._finalized,
        )
        self.steps_left = 0
        self._payments = 0
        self._cpu_end_s = 0.0
        for name in _REMOVED_FILTERS:
            self.filters.pop(name)
        self.filters["tojson"] = _to_json
        self.filters = {name: self._metered(name, each) for name, each in self.filters.items()}
        self.globals.pop("lipsum")
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _Namespace,
            "dict": _new_dict,
        }

    # --- the budget ---

    def start(self) -> None:
        """Begin a rendering with a full budget."""
        self.steps_left = MAX_STEPS
        self._cpu_end_s = time.thread_time() + MAX_CPU_S

    def spend(self, steps: int) -> None:
        """Take `steps` from the budget; raises OverBudget when there are none left."""
        self.steps_left -= steps
        if self.steps_left < 0:
            raise OverBudget(f"it takes more than {MAX_STEPS} steps")
        self._payments += 1
        if self._payments % 16 == 0 and time.thread_time() > self._cpu_end_s:
            raise OverBudget(f"it computes for more than {MAX_CPU_S:g} s")

    def spend_text(self, characters: int) -> None:
        """Pay for a text (or list) of that many characters (or items) before it is made."""
        if characters > MAX_CHARACTERS:
            raise OverBudget(f"it makes a text of more than {MAX_CHARACTERS} characters")
        self.spend(1 + characters // CHARACTERS_PER_STEP)

    def weigh(self, value: Any, depth: int = 0) -> int:
        """Characters `value` has as text, roughly; a structure is walked, and paid for, in full."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if not isinstance(value, Collection):
            return ITEM_CHARACTERS
        if isinstance(value, range):
            return ITEM_CHARACTERS * len(value)
        self.spend(1)
        if depth > 100:
            raise OverBudget("it nests lists more than 100 deep")
        total = 0
        for item in value.items() if isinstance(value, Mapping) else value:
            total += ITEM_CHARACTERS + self.weigh(item, depth + 1)
            if total > MAX_CHARACTERS:
                break
        return total

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """`items`, one step each: what every for loop runs over."""
        for item in items:
            self.spend(1)
            yield item

    def joined(self, pieces: Iterable[str]) -> str:
        """The text of all pieces."""
        parts: list[str] = []
        total = 0
        for piece in pieces:
            total += len(piece)
            if total > MAX_CHARACTERS:
                self.spend_text(total)
            self.spend(1)
            parts.append(piece)
        return "".join(parts)

    def concatenated(self, *values: Any) -> str:
        """The `~` operator."""
        self.spend_text(sum(self.weigh(value) for value in values))
        return "".join(str(value) for value in values)

    def _finalized(self, value: Any) -> Any:
        """What `{{ value }}` prints, paid for; a list becomes text here."""
        self.spend_text(self.weigh(value))
        return value

    # --- where templates act ---

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _calling("counted", [loop.iter])
        _replace_concatenations(tree)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """The sandbox's rule, less the methods whose cost nothing bounds."""
        return attr not in _REMOVED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operator, once its result is known to stay within bounds."""
        if operator == "%" and isinstance(left, str):
            self._check_format(left)
            self.spend_text(len(left) + self.weigh(right))
        elif operator == "+" and isinstance(left, (str, list, tuple)):
            factor = 1 if isinstance(left, str) else ITEM_CHARACTERS
            self.spend_text(factor * (len(left) + (len(right) if hasattr(right, "__len__") else 0)))
        elif operator == "*":
            self._check_product(left, right)
        elif operator == "**":
            if not (abs(left) <= MAX_ARGUMENT and abs(right) <= 64):
                raise OverBudget("it computes a power that is too large")
        else:
            self.spend(1)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_INTEGER_BITS:
            raise OverBudget("it computes an integer that is too large")
        return result

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a function, macro or method, once its cost is paid."""
        self.spend(1)
        target = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(target, "__self__", None)
        if isinstance(owner, (str, list, tuple, dict, int, float)):
            self._check_arguments((*args, *kwargs.values()))
        if isinstance(owner, str):
            args = tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)
            self._pay_method(owner, target.__name__, (*args, *kwargs.values()))
        elif isinstance(function, LoopContext):  # `loop(children)` of a recursive loop
            args = tuple(self.counted(arg) for arg in args)
        return super().call(context, function, *args, **kwargs)

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, paying for its input and refusing outsized arguments."""
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            value, *rest = args[skip:]
            self._check_arguments((*rest, *kwargs.values()))
            if isinstance(value, Iterator):
                value = list(value)
            self._pay_filter(name, value, (*rest, *kwargs.values()))
            result = function(*args[:skip], value, *rest, **kwargs)
            # map, select, … are lazy: their items are paid for where they are used
            return self.counted(result) if isinstance(result, Iterator) else result

        return metered

    # --- bounds ---

    def _check_arguments(self, args: Iterable[Any]) -> None:
        for arg in args:
            if isinstance(arg, int) and abs(arg) > MAX_ARGUMENT:
                raise OverBudget(f"it passes a number above {MAX_ARGUMENT}")

    def _check_format(self, text: str) -> None:
        if _LONG_NUMBER.search(text):
            raise OverBudget("it formats with a width that is too large")

    def _check_product(self, left: Any, right: Any) -> None:
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(count, int):
                factor = 1 if isinstance(sequence, (str, bytes)) else ITEM_CHARACTERS
                self.spend_text(len(sequence) * max(count, 0) * factor)
                return
        self.spend(1)

    def _pay_filter(self, name: str, value: Any, args: Sequence[Any]) -> None:
        """Pay for a filter by the size of its input and of what it makes of it."""
        size = self.weigh(value)
        if name == "join":
            self._pay_method(str(args[0]) if args else "", name, [value])
        elif name == "tojson":
            size *= 1 + sum(_width(arg) for arg in args)
        elif name in {"list", "sort", "unique", "map", "select", "reject", "batch", "slice"}:
            size *= ITEM_CHARACTERS if isinstance(value, str) else 1
        elif name in {"format", "replace", "indent"}:
            self._pay_method(str(value), name, args)
        self.spend_text(size)

    def _pay_method(self, text: str, name: str, args: Sequence[Any]) -> None:
        """Pay for a text's method (or the filter of that name) by the size of its result."""
        size = len(text)
        if name in {"format", "format_map"}:
            self._check_format(text)
            size += sum(self.weigh(arg) for arg in args) * (1 + text.count("{") + text.count("%"))
        elif name == "replace" and len(args) >= 2:
            size += text.count(str(args[0])) * len(str(args[1]))
        elif name == "join" and args and isinstance(args[0], Collection):
            size = self.weigh(args[0]) + size * len(args[0])
        elif name == "expandtabs":
            size += text.count("\t") * max(8, *map(_width, args), 0)
        elif name == "indent":
            size += (text.count("\n") + 1) * max(4, *map(_width, args), 0)
        self.spend_text(size)


def _width(arg: Any) -> int:
    """Characters an indent given as a count or as a text has."""
    return len(arg) if isinstance(arg, str) else int(arg) if isinstance(arg, int) else 0


def _calling(method: str, args: list[Any]) -> nodes.Call:
    """Call of a method of the environment, out of reach of the template's own names."""
    return nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)


def _replace_concatenations(node: nodes.Node) -> None:
    """Turn every `a ~ b` below `node` into a call of `concatenated`."""
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _replace_concatenations(value)
            if isinstance(value, nodes.Concat):
                setattr(node, field, _calling("concatenated", value.nodes))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _replace_concatenations(item)
                    if isinstance(item, nodes.Concat):
                        value[index] = _calling("concatenated", item.nodes)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words; here it only scopes."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        """The block as a call with its body, as transformers parses it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body_text"), [], [], body).set_lineno(line)

    def body_text(self, caller: Callable[[], str]) -> str:
        """What the body renders to."""
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be an attribute
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # not its attributes, which may be large


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace cannot have an attribute named {name[:40]!r}"
        )


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:  # noqa: A002  the name templates may pass
    if _LONG_NUMBER.search(format):
        raise OverBudget("it formats with a width that is too large")
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escapes, as transformers' filter of that name."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
