"""Whether a fast method may run in place of a slow one: not past code of a user's own, a hook or a parametrization."""

# pyright: reportPrivateUsage=false
# torch has no public names for the hooks of a module.

from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.modules import module as hooked
from torch.utils.module_tracker import ModuleTracker

Shortcuts = Mapping[str, tuple[str, ...]]
"""Each slow method with the fast ones that stand for it."""


def why_overridden(module: nn.Module, shortcuts: Shortcuts) -> str:
    """Why the fast methods cannot stand for the slow ones, if they cannot.

    A slow one was overridden in a class below them, or set on the object.
    """
    cls = type(module)
    for slow, fast in shortcuts.items():
        if slow in module.__dict__:
            return f"{cls.__name__}.{slow} was set on the object"
        below = _depth(cls, slow)
        for name in fast:
            found = _depth(cls, name)
            if found == len(cls.__mro__):
                return f"{cls.__name__} has no {name}"
            if below < found:
                return f"{cls.__name__} overrides {slow} and not {name}"
    return ""


def why_replaced(module: nn.Module, owner: type, names: Iterable[str]) -> str:
    """Why `owner`'s own code cannot stand for these methods, if it cannot: a subclass or the object has others."""
    cls = type(module)
    for name in names:
        if name in module.__dict__:
            return f"{cls.__name__}.{name} was set on the object"
        if owner not in cls.__mro__ or _depth(cls, name) < cls.__mro__.index(owner):
            return f"{cls.__name__} overrides {name}"
    return ""


def why_watched(modules: Iterable[nn.Module]) -> str:
    """Why these modules must be called as modules, if they must: a hook or a parametrization stands on one."""
    if hooked._has_any_global_hook() and not _only_tracked():
        return "a hook stands on all modules"
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"a hook stands on {type(module).__name__}"
        if "parametrizations" in module._modules:  # as parametrize.is_parametrized asks, and sooner where there is none
            return f"{type(module).__name__} is parametrized"
    return ""


def _only_tracked() -> bool:
    """Whether all hooks on all modules are those by which torch's FLOP counter notes where a module begins and ends."""
    every = (
        hooked._global_forward_pre_hooks,
        hooked._global_forward_hooks,
        hooked._global_backward_pre_hooks,
        hooked._global_backward_hooks,
    )
    return all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hooks in every for hook in hooks.values())


def _depth(cls: type, name: str) -> int:
    """How far up the class is that defines it; as many as there are where none does.

    -1 where a function of another file was put into that class.
    """
    for depth, parent in enumerate(cls.__mro__):
        if name in parent.__dict__:
            return depth if getattr(parent.__dict__[name], "__module__", parent.__module__) == parent.__module__ else -1
    return len(cls.__mro__)
