"""Sees every operation of a private forward pass, and hands parameters to their rules.

A :class:`Tape` is a torch function mode. Parameters never meet autograd: an operation that
takes a trainable parameter runs on a detached alias under a *rule*, which keeps what the
per-example gradients need and takes the output's gradient in the one backward pass. Every
tensor is one of

* *data*: computed from the batch. Its first dimension is the examples, or a multiple of
  them, example by example (``(B*T, ...)``);
* *derived*: computed from parameters and constants alone (a transpose, a slice, a position
  embedding, a merged adapter). Its gradient is taken back to the parameters afterwards;
* a constant, which is anything else.

An operation on a trainable parameter and data without a rule is refused. So is anything
else by which a gradient could reach a parameter: :mod:`engine` checks that none did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from cenacle.training.privacy.gradients import Formed, Use
from cenacle.training.privacy.outside import Outside, Waiting
from cenacle.training.privacy.precision import exact_products, has_bfloat16
from cenacle.training.privacy.refusals import KeepExamplesApartError, ReplaceOperationError
from cenacle.training.privacy.targets import (
    DATA,
    RULES,
    TAG,
    TO_BATCH,
    Derived,
    Sight,
    Source,
    Target,
    is_transpose,
    moves_only,
    opened,
    operation_name,
)
from cenacle.training.privacy.trees import map_tensors, tensors_in

__all__ = ["Tape"]

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size, slice)


class Tape(TorchFunctionMode):
    """Records one forward pass over ``examples`` examples.

    Args:
        parameters: the trainable parameters by name.
        examples: B of this pass.
        batch: tensors that hold the examples.
        watch: keep a :class:`Sight` of everything that rules see, for the probe.
        done: called when a parameter without derivations has all its gradients.
        low: norms may be upper bounds from bfloat16 products.
        outside: who computes products with weights, where that is not done here.
    """

    comes_first = True  # for modes that are entered within: what they hide would be no data

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        examples: int,
        batch: Sequence[Tensor],
        *,
        watch: bool = False,
        done: Callable[[Target], None] | None = None,
        low: bool = False,
        outside: Outside | None = None,
    ) -> None:
        super().__init__()
        self.low = low
        self._outside = outside
        self.examples = examples
        self.targets = {name: Target(name, p) for name, p in parameters.items()}
        self.derived: list[Derived] = []
        self.sights: list[Sight] | None = [] if watch else None
        self.signature: list[tuple[str, ...]] = []
        self.done = done
        self._by_id = {id(p): name for name, p in parameters.items()}
        self._aliases: dict[str, Tensor] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        self._tagged: list[Tensor] = []
        self.mark_batch(batch)

    def close(self) -> None:
        """Forget which tensors are data; breaks the cycles between tensors and targets."""
        for tensor in self._tagged:
            if hasattr(tensor, TAG):
                delattr(tensor, TAG)
        self._tagged = []
        self.done = None

    # ------------------------------------------------------------------ provenance

    def is_data(self, tensor: Tensor) -> bool:
        """Whether the tensor was computed from the batch."""
        return getattr(tensor, TAG, None) is DATA

    def target(self, tensor: Tensor | None) -> Target | None:
        """The target that a tensor is, or ``None`` for a frozen parameter or a constant."""
        if tensor is None:
            return None
        name = self._by_id.get(id(tensor))
        if name is not None:
            return self.targets[name]
        tag = getattr(tensor, TAG, None)
        return tag if isinstance(tag, Derived) else None

    def plain(self, tensor: Any) -> Any:
        """The tensor without a way for autograd to reach a parameter."""
        if isinstance(tensor, Tensor) and self.target(tensor) is not None:
            return tensor.detach()
        return tensor

    def rows(self, where: str, tensor: Tensor) -> int:
        """How many consecutive rows of ``tensor`` an example has.

        Raises:
            KeepExamplesApartError: the first dimension is no multiple of the examples.
        """
        if tensor.dim() == 0 or tensor.shape[0] % self.examples or tensor.shape[0] == 0:
            raise KeepExamplesApartError(
                f"an input of {where} does not have the examples in its first dimension",
                found=f"shape {tuple(tensor.shape)} in a batch of {self.examples}",
                expected="(examples, ...) or (examples * positions, ...)",
                remedy="put the batch first (batch_first=True), and use no statistic over it",
            )
        return tensor.shape[0] // self.examples

    def split(self, where: str, tensor: Tensor) -> Tensor:
        """View ``(B*n, ...)`` as ``(B, n, ...)``."""
        return tensor.unflatten(0, (self.examples, self.rows(where, tensor)))  # type: ignore[no-any-return, no-untyped-call]

    # ------------------------------------------------------------------ for rules

    def expect(self, *targets: Target | None) -> bool:
        """Announce a use of each target; ``False`` if there is nothing to do."""
        present = [t for t in targets if t is not None]
        for target in present:
            target.expected += 1
        return bool(present)

    def use(self, target: Target | None, make: Callable[[], Use]) -> None:
        """Deliver a use that was announced."""
        if target is None:
            return
        kind = target.value.device.type
        with exact_products(kind):
            made = make()
            made.low = self.low and has_bfloat16(kind)
            target.uses.append(made)
            if self.done is None:
                made.prepare()
            elif len(target.uses) == target.expected and not isinstance(target, Derived):
                self.done(target)

    def product(
        self, forward: Callable[[], Tensor], waiting: list[Waiting]
    ) -> Callable[[], Tensor]:
        """``forward``, a product with a weight, that tells what waits of it."""
        if self._outside is None:
            return forward
        outside = self._outside

        def run() -> Tensor:
            with outside.collecting() as found:
                out = forward()
            if len(found) == 1:  # else it was not one product: its gradient is taken here
                waiting.extend(found)
            return out

        return run

    def see(self, where: str, *tensors: Tensor | None, data: bool = True) -> None:
        """Show the probe what a rule depends on."""
        if self.sights is not None:
            for t in tensors:
                if t is not None:
                    self.sights.append(Sight(where, t.detach().clone(), data))

    def run(
        self,
        where: str,
        inputs: Sequence[Tensor | None],
        forward: Callable[[], Tensor],
        take: Callable[[Tensor], None],
    ) -> Tensor:
        """Run an operation and have ``take`` called with its output's gradient.

        Args:
            where: the operation and its parameter, for messages.
            inputs: the data that the operation reads; kept from being changed in place.
            forward: the operation on plain tensors.
            take: gets the gradient, of the output's shape.
        """
        if not torch.is_grad_enabled():
            return forward()
        kept = [(t, t._version) for t in inputs if t is not None]
        taker = [take]
        self.see(where, *inputs)

        def received(gradient: Tensor) -> None:
            with torch.no_grad():
                for tensor, version in kept:
                    if tensor._version != version:
                        raise KeepExamplesApartError(
                            f"an input of {where} was changed in place after its use",
                            remedy="use the operation that makes a new tensor",
                        )
                # This function lives as long as the graph; what it read need not.
                kept.clear()
                self.see(where + " (gradient)", gradient)
                taker.pop()(gradient)

        if any(t is not None and t.requires_grad for t in inputs):
            out = forward()
            out.register_hook(received)  # type: ignore[no-untyped-call]
        else:
            out = Source.apply(self._anchor, forward, received)  # type: ignore[no-untyped-call]
        return out

    def expanded(self, where: str, tensor: Tensor, dims: int, rows: int = 1) -> Tensor:
        """A parameter as one copy per example, whose gradient is the per-example gradient.

        No memory is taken: the copies are one. For operations that broadcast.

        Args:
            where: the operation, for messages.
            tensor: a parameter or derived tensor with at most ``dims`` dimensions, or with
                just that many if the first has length 1.
            dims: dimensions of the result; the first is the examples' times ``rows``.
            rows: consecutive rows of an example.
        """
        target = self.target(tensor)
        plain = self.plain(tensor)
        if target is None:
            return plain  # type: ignore[no-any-return]
        shape = tuple(plain.shape)
        if len(shape) == dims:
            if shape[0] != 1:
                self.refuse(where, target)
            shape = shape[1:]
        elif len(shape) > dims:
            self.refuse(where, target)
        size = (self.examples, *(1,) * (dims - 1 - len(shape)), *shape)
        copies = self.source(where, plain.reshape((1, *size[1:])).expand(size), target)
        if rows > 1:
            copies = copies.unsqueeze(1).expand(-1, rows, *size[1:]).flatten(0, 1)
        return copies

    def source(self, where: str, copies: Tensor, target: Target) -> Tensor:
        """Copies of a parameter, one per example in order, as something autograd stops at."""
        if not torch.is_grad_enabled():
            return copies
        self.expect(target)

        def received(gradient: Tensor) -> None:
            self.see(where + " (gradient)", gradient.reshape(self.examples, -1))
            each = gradient.reshape(self.examples, -1, *target.value.shape)
            self.use(target, lambda: Formed(each[:, 0] if each.shape[1] == 1 else each.sum(1)))

        return Source.apply(self._anchor, copies.detach, received)  # type: ignore[no-any-return, no-untyped-call]

    def leaf(self, values: Tensor, take: Callable[[Tensor], None]) -> Tensor:
        """A tensor of constants whose gradient ``take`` gets."""
        return Source.apply(self._anchor, values.detach, take)  # type: ignore[no-any-return, no-untyped-call]

    # ------------------------------------------------------------------ derivations

    def pull_back(
        self, gradients: Sequence[Tensor], derived: Sequence[Derived], name: str
    ) -> Tensor:
        """The gradient of a parameter from gradients of what was derived from it."""
        (found,) = torch.autograd.grad(
            [d.graph for d in derived], [self.alias(name)], list(gradients), retain_graph=True
        )
        return found

    def pull_back_each(self, derived: Sequence[Derived], names: Sequence[str]) -> dict[str, Tensor]:
        """Per-example gradients (B, *shape) of parameters, from those of derived tensors."""
        gradients = []
        for d in derived:
            use = d.combined()
            assert use is not None
            gradients.append(use.per_example().to(d.graph.dtype))
        found = torch.autograd.grad(
            [d.graph for d in derived],
            [self.alias(name) for name in names],
            gradients,
            retain_graph=True,
            is_grads_batched=True,
        )
        return dict(zip(names, found, strict=True))

    def refuse(self, func: Any, target: Target | None = None) -> None:
        """Raise for an operation that has no rule."""
        name = func if isinstance(func, str) else operation_name(func)
        raise ReplaceOperationError(
            f"no rule gives per-example gradients of '{target.name if target else '?'}' in {name}",
            remedy=(
                "use the parameter in a layer of torch.nn or an elementwise operation, freeze it "
                "with requires_grad_(False), or register a rule with register_rule"
            ),
        )

    # ------------------------------------------------------------------ the mode

    def __torch_function__(  # noqa: PLR0911
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors, involved, data = self._scan((*args, *kwargs.values()) if kwargs else args)
        rule = RULES.get(func)
        if rule is not None and getattr(rule, "always", False):
            out = rule(self, func, *args, **kwargs)
            return self.tag(out) if data else out
        if not involved:
            out = func(*args, **kwargs)
            return self.tag(out) if data else out
        if not data and not self._rows_of_constants(func, args):
            return self._derive(func, args, kwargs, tensors, involved)
        if operation_name(func) in {"shape", "dtype", "device", "size", "dim", "is_cuda"}:
            return func(*args, **kwargs)
        if operation_name(func) in TO_BATCH and self.target(tensors[0]) is None:
            return self.tag(func(*args, **kwargs))  # data takes a parameter's shape
        if rule is not None:
            if self.sights is not None or torch.is_grad_enabled():
                self.signature.append((operation_name(func), *(t.name for t in involved)))
            return self.tag(rule(self, func, *args, **kwargs))
        body = opened(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        if operation_name(func) in {"expand_as", "type_as", "view_as", "reshape_as", "to"}:
            return self._derive(func, args, kwargs, tensors, involved)
        return self.refuse(func, involved[0])

    # Every operation of the model comes through here, so it is written for speed.
    def _scan(self, values: tuple[Any, ...]) -> tuple[list[Tensor], list[Target], bool]:
        """Tensors among arguments, the targets among those, and whether one is data."""
        tensors: list[Tensor] = []
        for value in values:
            kind = type(value)
            if kind is Tensor or kind is Parameter:
                tensors.append(value)
            elif kind not in _PLAIN:
                tensors.extend(tensors_in(value))
        involved: list[Target] = []
        data = False
        names, targets = self._by_id, self.targets
        for tensor in tensors:
            name = names.get(id(tensor))
            if name is not None:
                involved.append(targets[name])
                continue
            found = getattr(tensor, TAG, None)
            if found is DATA:
                data = True
            elif isinstance(found, Derived):
                involved.append(found)
        return tensors, involved, data

    def tag(self, out: Any) -> Any:
        """Mark tensors as data."""
        for tensor in (out,) if type(out) is Tensor else tensors_in(out):
            if self.target(tensor) is None:
                setattr(tensor, TAG, DATA)
        return out

    def mark_batch(self, batch: Any) -> None:
        """Tell which tensors hold the examples."""
        tensors = tensors_in(batch)
        self.tag(tensors)
        self._tagged.extend(tensors)

    def _rows_of_constants(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether a table is looked up by constants that were laid out example by example."""
        ids = args[0] if args and operation_name(func) == "embedding" else None
        return isinstance(ids, Tensor) and ids.dim() > 1 and ids.shape[0] == self.examples

    def alias(self, name: str) -> Tensor:
        """The parameter as a leaf of its own, from which derivations start."""
        if name not in self._aliases:
            self._aliases[name] = self.targets[name].value.detach().requires_grad_()
        return self._aliases[name]

    def _derive(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
        involved: Sequence[Target],
    ) -> Any:
        """Run an operation on parameters and constants, with its history."""
        name = operation_name(func)

        def swap(tensor: Tensor) -> Tensor:
            target = self.target(tensor)
            if isinstance(target, Derived):
                return target.graph
            return tensor if target is None else self.alias(target.name)

        if name in TO_BATCH and torch.is_grad_enabled():
            shape = func(
                *map_tensors(args, Tensor.detach), **map_tensors(kwargs, Tensor.detach)
            ).shape
            own = tuple(tensors[0].shape)
            grown = len(shape) == len(own) + 1 or (len(shape) == len(own) and own[0] == 1)
            if grown and shape[0] == self.examples and self.target(tensors[0]) is not None:
                copies = self.expanded(name, tensors[0], len(shape))
                with torch.enable_grad():
                    return self.tag(copies.expand(shape).clone())
        out = func(*map_tensors(args, swap), **map_tensors(kwargs, swap))
        sources: frozenset[str] = frozenset().union(
            *(t.sources if isinstance(t, Derived) else {t.name} for t in involved)
        )
        first = involved[0]
        direct = len(involved) == 1 and not isinstance(first, Derived)
        simple = direct or (len(involved) == 1 and isinstance(first, Derived) and first.isometric)
        label = "+".join(sorted(sources))
        for tensor in tensors_in(out):
            if not tensor.requires_grad or self.target(tensor) is not None:
                continue
            moved = moves_only(name, args, kwargs) and tensor.dtype == first.value.dtype
            made = Derived(
                f"{name}({label})",
                tensor,
                graph=tensor,
                sources=sources,
                isometric=simple and moved,
                transposed=direct and moved and is_transpose(tensor, first.value),
            )
            self.see(made.name, *(t for t in tensors if self.target(t) is None), data=False)
            self.derived.append(made)
            setattr(tensor, TAG, made)
        return out
