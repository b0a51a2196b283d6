"""Families whose modules transformers calls by other names than all the rest.

Here every family has the same names: `model`, `embed_tokens`, `layers`, `self_attn`, `norm`, `lm_head`. So the modules
of a model get them when it is built, and its tensors when they are read; they are written under the names that the
family's checkpoints have.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from torch.nn import Module

from megadistill.errors import UserError
from megadistill.redaction import printable

MODULES: Final[Mapping[str, Mapping[str, str]]] = {
    "gpt_neox": {
        "gpt_neox": "model",
        "embed_in": "embed_tokens",
        "attention": "self_attn",
        "final_layer_norm": "norm",
        "embed_out": "lm_head",
    },
    "falcon_h1": {"final_layernorm": "norm"},
    "nemotron_h": {"backbone": "model", "embeddings": "embed_tokens", "norm_f": "norm"},
}
"""`model_type` -> name of a module in its checkpoints, or in transformers' model -> name here."""

_OUTSIDE_LAYERS: Final = ("model", "embed_tokens", "norm", "lm_head")
"""Names here that a layer's modules may have, too, and keep: a layer of Nemotron-H has a `norm`."""

_COMPUTED: Final = re.compile(r"\.attention\.(masked_)?bias$")
"""Buffers of masks that older releases of transformers stored."""


def names_here(stored: Collection[str], model_type: str, where: str = "the folder") -> dict[str, str]:
    """Name here -> stored name of a checkpoint's tensors, but for stored masks.

    Raises:
        UserError: two tensors of the folder `where` have one name here.
    """
    names = MODULES.get(model_type)
    if names is None:
        return {name: name for name in stored}
    here: dict[str, str] = {}
    for name in sorted(each for each in stored if not _COMPUTED.search(each)):
        ours = _translated(name, names)
        if ours in here:
            raise UserError(
                f"{where} has both {printable(here[ours][:100])!r} and {printable(name[:100])!r}, which are the same "
                f"tensor of a {model_type} model: the folder mixes two models; download it again, into an empty one"
            )
        here[ours] = name
    return here


def stored_name(name: str, model_type: str) -> str:
    """The name in a checkpoint of a tensor that has this name here."""
    names = {ours: theirs for theirs, ours in MODULES.get(model_type, {}).items()}
    outside, layers, inside = name.partition(".layers.")
    within = {ours: theirs for ours, theirs in names.items() if ours not in _OUTSIDE_LAYERS}
    return _translated(outside, names) + layers + _translated(inside, within)


def _translated(name: str, names: Mapping[str, str]) -> str:
    return ".".join(names.get(part, part) for part in name.split("."))


def rename_modules(model: Module, model_type: str) -> None:
    """Gives the modules of a model their names here; the code of transformers finds them by its own names as well."""
    names = MODULES.get(model_type, {})
    for module in list(model.modules()) if names else ():
        held = {theirs: ours for theirs, ours in names.items() if theirs in module._modules}
        if held:
            children = {held.get(name, name): child for name, child in module._modules.items()}
            module._modules.clear()
            module._modules.update(children)
            key = (type(module), *held)
            if key not in _CLASSES:
                _CLASSES[key] = _with_both_names(type(module), held)
            module.__class__ = _CLASSES[key]


_CLASSES: Final[dict[tuple[Any, ...], type[Module]]] = {}
"""(Class of transformers, its names) -> the class that finds the modules by both names."""


def _with_both_names(base: type[Module], names: Mapping[str, str]) -> type[Module]:
    both = {theirs: _same_as(ours) for theirs, ours in names.items()}
    return type(base.__name__, (base,), {"__module__": base.__module__, **both})


def _same_as(name: str) -> Any:
    def read(module: Module) -> Any:
        return getattr(module, name)

    return property(read)
