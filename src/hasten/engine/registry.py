"""The registry of methods: what exists, and how it is named."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hasten.engine.context import ContextPolicy
from hasten.engine.drafting.drafter import Drafter
from hasten.engine.specification import pieces, require_parameter, values
from hasten.errors import UserError

if TYPE_CHECKING:
    from hasten.model.decoder import Model

Exactness = Literal["lossless", "lossy"]
Role = Literal[
    "drafter",
    "denoiser",
    "cache policy",
    "prompt reducer",
    "weight format",
    "batching",
    "search",
    "architecture",
    "kernel",
    "recipe",
    "evaluation",
    "simulator",
]
"""What a published system is. A drafter proposes next tokens and a denoiser fills canvases: a request chooses one of
these decoders, and perhaps a cache policy or a prompt reducer, which say what is kept of it. The others are chosen at
load, or are commands of their own."""
DECODERS: tuple[Role, ...] = ("drafter", "denoiser")
CONTEXT_POLICIES: tuple[Role, ...] = ("cache policy", "prompt reducer")
ENTRY_POINTS = "hasten.methods"


@dataclass(frozen=True)
class Target:
    """What a method may know of the model it accelerates.

    `tokenizer` is None for models without one (oracles); `folder` is the checkpoint's, where there is one; `end_ids`
    are all tokens that end a text.
    """

    model: Model
    tokenizer: Any = None
    folder: str | None = None
    end_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Knob:
    """What trades a method's accuracy for speed: one parameter, or several that move together.

    Attributes:
        name: of the parameter; with `scaled`, what the factor is called.
        values: from careful to fast.
        scaled: parameters that are the factor times their defaults.

    Raises:
        UserError: no values.
    """

    name: str
    values: tuple[float, ...]
    scaled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.values:
            raise UserError(f"the knob {self.name!r} has no values")

    @property
    def turns(self) -> tuple[str, ...]:
        """The parameters that it sets."""
        return self.scaled or (self.name,)

    def at(self, value: float, parameters: type[Any]) -> str:
        """A value of it, as a specification says it: `threshold=0.9`.

        Args:
            parameters: the method's, whose defaults are scaled.
        """
        defaults = parameters()
        settings = {name: value * getattr(defaults, name) for name in self.scaled} or {self.name: value}
        return ",".join(f"{name}={setting:g}" for name, setting in settings.items())


def no_defaults(target: Target) -> dict[str, Any]:
    """Of a method whose parameters have the same defaults whatever the model."""
    return {}


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        slug: its name on the command line and in reports.
        role: what it is.
        aliases: other names that find it.
        family: the folder it belongs to, such as "drafters".
        exactness: `lossless` gives plain decoding's tokens; `lossy` does not; None where that is no question.
        paper: identifier of the source, such as an arXiv number; empty where there is none.
        title: one line.
        needs_training: whether it needs weights that have to be trained for the target.
        command: shows it at work.
        parameters: a dataclass with defaults; its fields are what `slug:key=value` sets.
        create: (target, parameters) to a drafter or a context policy; None for what no request chooses.
        knob: what trades its accuracy for speed, if anything does.
        defaults: values of parameters that a target has of its own, where the dataclass's are not meant for it; what a
            specification names goes before them.
        beside: cores that it computes on beside those of the model's own threads.
    """

    slug: str
    role: Role
    aliases: tuple[str, ...]
    family: str
    exactness: Exactness | None
    paper: str
    title: str
    needs_training: bool
    command: str
    parameters: type[Any]
    create: Callable[[Target, Any], Drafter | ContextPolicy] | None
    knob: Knob | None = None
    defaults: Callable[[Target], dict[str, Any]] = no_defaults
    beside: int = 0


@dataclass(frozen=True)
class NoParameters:
    """Of a system that no specification names."""


_METHODS: dict[str, Method] = {}
D = TypeVar("D", bound=Callable[[Target, Any], Drafter | ContextPolicy])


def register(
    slug: str,
    *,
    family: str,
    exactness: Exactness,
    paper: str,
    title: str,
    parameters: type[Any],
    role: Literal["drafter", "denoiser", "cache policy", "prompt reducer"] = "drafter",
    aliases: tuple[str, ...] = (),
    needs_training: bool = False,
    command: str = "",
    knob: Knob | None = None,
    defaults: Callable[[Target], dict[str, Any]] = no_defaults,
    beside: int = 0,
) -> Callable[[D], D]:
    """Decorator of a class, or of a function, that makes a drafter or context policy from (target, parameters).

    Without a command of its own, a decoder is shown at work beside plain decoding, on a model that ships. With a knob
    it is one of those that `hasten sweep` compares. What is registered is described at `Method`.

    Raises:
        UserError: the knob sets what is no parameter, or a value that the parameters refuse.
    """
    model = " --model tiny-block" if role == "denoiser" else ""

    def decorate(create: D) -> D:
        method = Method(
            slug, role, aliases, family, exactness, paper, title, needs_training,
            command or f"hasten bench{model} --methods {slug}", parameters, create, knob, defaults, beside,
        )  # fmt: skip
        if knob is not None:
            _try_out(method, knob)
        _METHODS[slug] = method
        return create

    return decorate


def _try_out(method: Method, knob: Knob) -> None:
    """Turn a knob through all of its values.

    Raises:
        UserError: one cannot be set.
    """
    for name in knob.turns:
        require_parameter(method.slug, method.parameters, name)
    for value in knob.values:
        method.parameters(**values(method.slug, method.parameters, knob.at(value, method.parameters)))


def register_system(
    slug: str,
    *,
    role: Role,
    family: str,
    paper: str,
    title: str,
    command: str,
    exactness: Exactness | None = None,
    aliases: tuple[str, ...] = (),
) -> None:
    """List a published system that is no decoder: a kernel, a recipe, an evaluation."""
    _METHODS[slug] = Method(
        slug, role, aliases, family, exactness, paper, title, False, command, NoParameters, None
    )  # fmt: skip


@cache
def _load_entry_points() -> None:
    """Import hasten's own methods and third parties': both register through the same entry-point group."""
    for point in entry_points(group=ENTRY_POINTS):
        point.load()


def methods() -> Mapping[str, Method]:
    """All that is registered, by slug."""
    _load_entry_points()
    return dict(sorted(_METHODS.items()))


def decoders() -> Mapping[str, Method]:
    """The ways of decoding, by slug: drafters and denoisers."""
    return {slug: method for slug, method in methods().items() if method.role in DECODERS}


def find(slug: str) -> Method:
    """A method by slug or alias.

    Raises:
        UserError: unknown, with the nearest names.
    """
    known = methods()
    names = {name: method for method in known.values() for name in (method.slug, *method.aliases)}
    if slug not in names:
        near = difflib.get_close_matches(slug, names, n=3, cutoff=0.4) or list(known)
        raise UserError(f"unknown method {slug!r}; did you mean {', '.join(near)}?")
    return names[slug]


def parse(spec: str) -> tuple[Method, Any]:
    """`slug` or `slug:key=value,key=value` to a decoder and its parameters.

    A value that has separators of its own stands in brackets: `auto:candidates=[suffix:length=4,depth=8]`.

    Raises:
        UserError: unknown method or key, a value of the wrong type or out of range, a system that is no decoder.
    """
    method, named = read(spec)
    return method, method.parameters(**named)


def read(spec: str, roles: Sequence[Role] = DECODERS) -> tuple[Method, dict[str, Any]]:
    """A method, and the values that a specification names.

    Args:
        roles: what it may be.

    Raises:
        UserError: unknown method or key, a value of the wrong type, a system that is something else.
    """
    slug, _, rest = spec.partition(":")
    method = find(slug.strip())
    if method.role not in roles:
        wanted = "a way of decoding" if roles == DECODERS else " or ".join(f"a {role}" for role in roles)
        what = f"{'an' if method.role[0] in 'ae' else 'a'} {method.role}"
        raise UserError(f"{slug.strip()} is {what}, not {wanted}; it is run by: {method.command}")
    return method, values(method.slug, method.parameters, rest)


def split(spec: str, separator: str = "+") -> list[str]:
    """The parts of a composition `a+b:key=value`; a separator inside a value (a file name) separates nothing."""
    parts: list[str] = []
    names = {name for method in methods().values() for name in (method.slug, *method.aliases)}
    for piece in pieces(spec, separator):
        slug = piece.partition(":")[0].strip()
        if parts and ":" in parts[-1] and slug not in names:
            parts[-1] += separator + piece
        else:
            parts.append(piece)
    return parts
