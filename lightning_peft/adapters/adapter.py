"""The base type of every adapter: a frozen dataclass that says everything about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from torch import nn

from lightning_peft.adapters.own_parameters import own_parameters
from lightning_peft.matching import nearest
from lightning_peft.version import __version__

PLAIN_FORMAT = 2
"""Number of the plain-data layout; it rises when an older library could no longer read it."""


@dataclass(frozen=True)
class Adapter(ABC):
    """What is added to a network, and what of it trains.

    To write one, subclass it as a frozen dataclass of plain values and define :meth:`insert`; the functions
    ``add_adapter``, ``remove_adapter``, ``merge_adapter`` ... then work with it, as do the mixins.

    Args:
        train_also: Globs of modules or parameters of the network that train beside what the adapter trains, such as a head
            inside the network, or its norms. They belong to the adapter: put away and brought back with it.

    Raises:
        ValueError: If ``train_also`` is a plain string, here; if a glob matches nothing, when a network is adapted.
    """

    train_also: list[str] | tuple[str, ...] = field(default=(), kw_only=True)

    kinds: ClassVar[dict[str, type[Adapter]]] = {}
    """Every adapter class by its name; subclasses enter themselves."""

    frozen_features: ClassVar[bool] = False
    """Whether the network stays in eval mode while the rest trains, so that its features are fixed."""

    keeps_base: ClassVar[bool] = True
    """Whether base values that train are remembered as they were: then the pretrained network is never lost, and several
    adapters may train them, each for itself. False where that would double the network."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Enter the subclass under its name, so that checkpoints can name it."""
        super().__init_subclass__(**kwargs)
        Adapter.kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        """Check what all adapters have; subclasses that check more call it too."""
        if isinstance(self.train_also, str):
            raise ValueError(f"{type(self).__name__}: train_also={self.train_also!r} must be a list of globs.")
        object.__setattr__(self, "train_also", tuple(self.train_also))  # equal and hashable, whichever sequence it was

    def __repr__(self) -> str:
        """Say what differs from the defaults."""
        changed = [
            f"{entry.name}={getattr(self, entry.name)!r}"
            for entry in sorted(fields(self), key=lambda entry: entry.kw_only is True)
            if getattr(self, entry.name)
            != (entry.default_factory() if callable(entry.default_factory) else entry.default)
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    @abstractmethod
    def insert(self, model: nn.Module, name: str) -> list[str]:
        """Put this adapter's parameters into ``model`` and return the names of the parameters that train.

        Those of ``train_also`` need not be among them; ``add_adapter`` sees to it.

        Args:
            model: The network to adapt, in place. Flags of ``requires_grad`` are the caller's business.
            name: The name of the adapter; its parameters carry it.

        Raises:
            ValueError: If the adapter does not fit the network. Nothing has been changed then.
        """

    def also(self, model: nn.Module) -> list[str]:
        """Return the parameters of ``model`` itself that ``train_also`` chooses.

        Raises:
            ValueError: If a glob of it matches nothing.
        """
        return own_parameters(model, self.train_also, owner=f"{type(self).__name__}: train_also")

    def learn_start(self, model: nn.Module, name: str, batches: Iterable[Any]) -> Adapter:
        """Choose where the inserted parameters start by looking at data; return the adapter as it came out.

        Args:
            model: The network, with this adapter in it.
            name: The name of the adapter.
            batches: What the network is called with: mappings become keyword arguments; of a tuple or list the first
                entry counts.

        Raises:
            ValueError: If the adapter does not look at data.
        """
        raise ValueError(f"add_adapter: {self!r} starts without data; leave batches= out.")

    def select(self, model: nn.Module) -> Any:
        """Return where the adapter goes in ``model``, in a form of its own; nothing is changed.

        Raises:
            ValueError: If it fits nowhere.
        """
        if not any(True for _ in model.parameters()):
            raise ValueError(f"{type(self).__name__}: this {type(model).__name__} has no parameters.")

    def refusal(self, model: nn.Module) -> str | None:
        """Say why the adapter cannot be added to ``model``, None if it can; nothing is changed."""
        try:
            self.select(model)
            self.also(model)
        except ValueError as error:
            return str(error)
        return None

    def to_plain(self) -> dict[str, Any]:
        """Return the adapter as numbers, strings and lists, with a format number and our version."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"format": PLAIN_FORMAT, "version": __version__, "kind": type(self).__name__, **values}

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Adapter:
        """Build the adapter that :meth:`to_plain` described.

        Raises:
            ValueError: If the format is newer than this library, or a kind or field is unknown.
        """
        values = dict(plain)
        format_, version = values.pop("format", PLAIN_FORMAT), values.pop("version", "unknown")
        if not isinstance(format_, int) or format_ > PLAIN_FORMAT:
            raise ValueError(
                f"Adapter.from_plain: format {format_!r}, written by lightning_peft {version}, is newer than this "
                f"library ({__version__}, format {PLAIN_FORMAT}). Upgrade lightning_peft."
            )
        kind = values.pop("kind", None)
        if kind not in Adapter.kinds:
            raise ValueError(
                f"Adapter.from_plain: unknown kind {kind!r}. Nearest: {nearest(str(kind), Adapter.kinds)}. "
                "A kind of your own must be imported before a checkpoint that names it is loaded."
            )
        cls = Adapter.kinds[kind]
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"Adapter.from_plain: {kind} has no field {unknown}; it has {sorted(known)}.")
        return cls(**values)
