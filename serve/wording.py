"""What a client says that a prompt is -> the text that is kept and drawn: the settings' templates and their arms,
variables and random choices, blends and schedules in pieces.

What is kept is text alone, so that a record reads like an order, and posting it again repeats the pictures. Text that a
client wrote stays as it was written; what came in pieces is put into words in A1111's syntax (`serve.prompts.written`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.domain.text import LongPrompt, Syntax, Weighting
from serve.errors import InvalidRequest
from serve.prompts.parse import parse
from serve.prompts.structured import Pieces, blended, scheduled
from serve.prompts.templates import expand, names
from serve.prompts.written import written
from serve.settings.orders import ArmSettings, LimitSettings, TemplateSettings

PROMPT = "prompt"
"""What stands in a template for the order's own prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPrompt:
    """The part of an order that says what its prompts are, as a client writes it; None takes the default.

    `prompt` and `negative_prompt` are text, or pieces that are blended. `schedule` has entries {from, to, prompt, ramp}
    over the prompt. `template` names one of the settings', in which `prompt` stands for `{prompt}`; `arm` is one of its
    arms; `variables` are what stands in the place of `{name}`.
    """

    prompt: str | Pieces | None = None
    negative_prompt: str | Pieces | None = None
    schedule: Pieces | None = None
    prompt_syntax: Syntax | None = None
    prompt_weighting: Weighting = Weighting.A1111
    long_prompt: LongPrompt = LongPrompt.CHUNK
    variables: Mapping[str, str] | None = None
    template: str | None = None
    arm: str | None = None

    @property
    def characters(self) -> int:
        """Of all that was written, about."""
        return sum(len(str(each)) for each in (self.prompt, self.negative_prompt, self.schedule, self.variables))


@dataclass(frozen=True, slots=True, kw_only=True)
class Worded:
    """The texts, what both are written in, and the configured prompt that they came from. `arm` is None where the
    template has none."""

    prompt: str
    negative_prompt: str | None
    syntax: Syntax
    template: str | None = None
    arm: str | None = None


@dataclass(frozen=True, slots=True)
class _Form:
    """What is to be filled in: the order's own texts, or those of a template. `known` are the variables that are read
    somewhere, be it in an arm that was not chosen."""

    prompt: str | Pieces
    negative_prompt: str | Pieces | None
    syntax: Syntax
    variables: Mapping[str, str]
    known: frozenset[str]
    arm: str | None = None


def worded(
    new: NewPrompt,
    templates: Mapping[str, TemplateSettings],
    limits: LimitSettings,
    *,
    seed: int,
    num_inference_steps: int,
    may_be_empty: bool = False,
) -> Worded:
    """The same order with the same seed gives the same texts, in every process. `may_be_empty`: the prompt may say
    nothing. Raises InvalidRequest that names the field at fault, and the place in it."""
    _check_sizes(new, limits)
    form = _of_template(new, templates, seed) if new.template is not None else _own(new)
    for name in form.variables:
        if name not in form.known:
            raise InvalidRequest(f"variables.{name}: no text of the order has {{{name}}}", f"variables.{name}")
    filling = _Filling(form, seed)
    prompt = filling.of("prompt", form.prompt)
    negative = None if form.negative_prompt is None else filling.of("negative_prompt", form.negative_prompt)
    if new.schedule is None and isinstance(prompt, str) and not isinstance(negative, list):
        texts, syntax = (prompt, negative), form.syntax
    else:
        base = _tree("prompt", prompt, form.syntax)
        if new.schedule is not None:
            entries = [
                {**entry, "prompt": filling.of(f"schedule.{at}.prompt", entry["prompt"])}
                for at, entry in enumerate(new.schedule)
            ]
            base = scheduled(base, entries, num_inference_steps, "schedule", form.syntax)
        below = None if negative is None else written(_tree("negative_prompt", negative, form.syntax))
        texts, syntax = (written(base), below), Syntax.A1111
    _check(*texts, limits, may_be_empty)
    return Worded(prompt=texts[0], negative_prompt=texts[1], syntax=syntax, template=new.template, arm=form.arm)


def check_length(field: str, text: str, limits: LimitSettings) -> None:
    """Raises InvalidRequest for a text that is too long to be looked at."""
    if len(text) > limits.max_prompt_bytes or len(text.encode(errors="replace")) > limits.max_prompt_bytes:
        raise InvalidRequest(f"{field} is longer than {limits.max_prompt_bytes} bytes", field)


def arm_of(name: str, arms: Mapping[str, ArmSettings], seed: int) -> str:
    """The arm that an order with this seed gets: each as often as its share says, whatever the seeds are."""
    digest = hashlib.blake2b(f"{name}\0{seed}".encode(), digest_size=8).digest()
    left = int.from_bytes(digest) / 2**64 * sum(arm.share for arm in arms.values())
    chosen = ""
    for chosen, arm in arms.items():  # noqa: B007 -- the last one, where the shares' sum was rounded up
        left -= arm.share
        if left < 0:
            break
    return chosen


@dataclass(frozen=True, slots=True)
class _Filling:
    """Fills in variables and makes the choices; all texts of an order make theirs by its one seed."""

    form: _Form
    seed: int

    def of(self, field: str, text: str | Pieces) -> str | list[dict[str, Any]]:
        if isinstance(text, str):
            return self._filled(field, text)
        return [{**piece, "text": self._filled(f"{field}.{at}.text", piece["text"])} for at, piece in enumerate(text)]

    def _filled(self, field: str, text: str) -> str:
        if self.form.syntax is Syntax.PLAIN:
            return text
        return expand(text, self.form.variables, self.seed, field)


def _own(new: NewPrompt) -> _Form:
    """The texts are the order's own."""
    if new.arm is not None:
        raise InvalidRequest("arm: there is no template that it would be of", "arm")
    if new.prompt is None:
        raise InvalidRequest("prompt: neither a prompt nor a template", "prompt")
    syntax = new.prompt_syntax or Syntax.A1111
    if new.variables and syntax is Syntax.PLAIN:
        raise InvalidRequest("variables: braces of a plain prompt are text", "variables")
    return _Form(
        new.prompt, new.negative_prompt, syntax, new.variables or {}, _names(_own_texts(new) if new.variables else ())
    )


def _of_template(new: NewPrompt, templates: Mapping[str, TemplateSettings], seed: int) -> _Form:
    """The prompt is the template's, and so is the negative one where the order has none."""
    name = new.template or ""
    template = templates.get(name)
    if template is None:
        told = ", ".join(templates) or "none"
        raise InvalidRequest(f"template: {name!r} is none of this server's; there are {told}", "template")
    syntax = Syntax(template.syntax)
    if new.prompt_syntax not in (None, syntax):
        raise InvalidRequest(f"prompt_syntax: the template {name} is written in {syntax}", "prompt_syntax")
    if new.arm is not None and new.arm not in template.arms:
        told = ", ".join(template.arms) or "none"
        raise InvalidRequest(f"arm: the template {name} has no {new.arm!r}; there are {told}", "arm")
    arm = new.arm or (arm_of(name, template.arms, seed) if template.arms else None)
    text, below = template.text, template.negative_prompt
    if arm is not None:
        chosen = template.arms[arm]
        text, below = chosen.text, below if chosen.negative_prompt is None else chosen.negative_prompt
    everywhere = [template.text, template.negative_prompt]
    everywhere += [each for one in template.arms.values() for each in (one.text, one.negative_prompt)]
    known = _names([*filter(None, everywhere), *_own_texts(new)])
    if new.prompt is not None:
        own = _for_the_template(name, new, known)
        # Put in before choices are made, so that the order's own are made too.
        text, below = (each and each.replace(f"{{{PROMPT}}}", own) for each in (text, below))
    negative = below if new.negative_prompt is None else new.negative_prompt
    return _Form(text or "", negative, syntax, new.variables or {}, known, arm)


def _for_the_template(name: str, new: NewPrompt, known: frozenset[str]) -> str:
    if not isinstance(new.prompt, str):
        raise InvalidRequest(f"prompt: the template {name} takes text", "prompt")
    if PROMPT not in known:
        raise InvalidRequest(f"prompt: the template {name} has no {{{PROMPT}}}; send variables", "prompt")
    if PROMPT in (new.variables or {}):
        raise InvalidRequest(f"variables.{PROMPT}: the order has a prompt too", f"variables.{PROMPT}")
    return new.prompt


def _tree(field: str, text: str | Pieces, syntax: Syntax) -> Any:
    return parse(text, field, syntax) if isinstance(text, str) else blended(text, field, syntax)


def _own_texts(new: NewPrompt) -> list[str]:
    """Those in which variables may stand."""
    own = [new.prompt, new.negative_prompt, *(entry["prompt"] for entry in new.schedule or ())]
    texts: list[str] = []
    for each in own:
        if each is not None:
            texts += [each] if isinstance(each, str) else [piece["text"] for piece in each]
    return texts


def _names(texts: Sequence[str]) -> frozenset[str]:
    return frozenset().union(*map(names, texts))


def _check_sizes(new: NewPrompt, limits: LimitSettings) -> None:
    """Before anything reads them."""
    for field, value in (("prompt", new.prompt), ("negative_prompt", new.negative_prompt)):
        _check_size(field, value, limits)
    for at, entry in enumerate(new.schedule or ()):
        _check_size(f"schedule.{at}.prompt", entry["prompt"], limits)
    for name, value in (new.variables or {}).items():
        check_length(f"variables.{name}", value, limits)


def _check_size(field: str, value: str | Pieces | None, limits: LimitSettings) -> None:
    if isinstance(value, str):
        check_length(field, value, limits)
    elif value is not None:
        if not value:
            raise InvalidRequest(f"{field} has no pieces", field)
        for at, piece in enumerate(value):
            check_length(f"{field}.{at}.text", piece["text"], limits)


def _check(prompt: str, negative: str | None, limits: LimitSettings, may_be_empty: bool) -> None:
    if not prompt.strip() and not may_be_empty:
        raise InvalidRequest("prompt is empty", "prompt")
    for field, text in (("prompt", prompt), ("negative_prompt", negative or "")):
        check_length(field, text, limits)
