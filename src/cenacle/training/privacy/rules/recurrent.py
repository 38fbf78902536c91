"""RNN, LSTM and GRU, layer by layer and step by step, with torch's own equations.

The fused kernels hide their parameters. Here the inputs' products are taken for all steps
at once, and a tensor of zeros added to each step's hidden product receives the gradients
that the hidden weights need: one use per parameter, whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cenacle.training.privacy.gradients import Formed, Outer
from cenacle.training.privacy.refusals import ReplaceOperationError
from cenacle.training.privacy.tape import Tape
from cenacle.training.privacy.targets import Target, operation_name, rules

__all__: list[str] = []

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]


def _lstm_cell(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(x: Tensor, h: Tensor, state: State) -> State:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), h.chunk(3, 1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return (n + z * (state[0] - n),)


def _tanh_cell(x: Tensor, h: Tensor, _state: State) -> State:
    return ((x + h).tanh(),)


def _relu_cell(x: Tensor, h: Tensor, _state: State) -> State:
    return ((x + h).relu(),)


def _hidden(
    tape: Tape, where: str, x: Tensor, weight: Tensor, bias: Tensor | None, cells: Cell,
    state: State, *, reverse: bool,
) -> tuple[Tensor, State]:  # fmt: skip
    """The recurrence over inputs' products x (B, T, gates)."""
    b, length, gates = x.shape
    w, offset = tape.target(weight), tape.target(bias)
    plain, plain_bias = tape.plain(weight), tape.plain(bias)
    before: list[Tensor] = []
    taps = torch.zeros(1, 1, 1, dtype=x.dtype, device=x.device).expand(b, length, gates)

    def take(gradient: Tensor) -> None:
        kept = torch.stack(before, 1)
        tape.see(where, kept)
        tape.see(where + " (gradient)", gradient)
        tape.use(w, lambda: Outer(kept, gradient))
        tape.use(offset, lambda: Formed(gradient.sum(1)))

    if tape.expect(w, offset) and torch.is_grad_enabled():
        taps = tape.leaf(taps, take)
    outputs: list[Tensor] = []
    for step in reversed(range(length)) if reverse else range(length):
        before.append(state[0].detach())
        hidden = functional.linear(state[0], plain, plain_bias) + taps[:, step]
        state = cells(x[:, step], hidden, state)
        outputs.append(state[0])
    if reverse:
        outputs.reverse()
        before.reverse()
    return torch.stack(outputs, 1), state


def _layers(
    tape: Tape,
    func: Any,
    cells: Cell,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    name = operation_name(func)
    found: list[Target] = [t for t in map(tape.target, weights) if t is not None]
    directions = 2 if bidirectional else 1
    each = 4 if has_biases else 2
    if len(weights) != each * num_layers * directions:
        tape.refuse(f"{name} with proj_size", found[0])
    if not batch_first:
        x = x.transpose(0, 1)
    last: list[State] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            parts = list(weights[each * place : each * (place + 1)])
            w_in, w_hidden, *biases = parts
            b_in, b_hidden = biases or (None, None)
            target = tape.target(w_hidden) or found[0]
            with tape:
                product = functional.linear(tape.tag(x), w_in, b_in)
            out, state = _hidden(
                tape, f"{name} of '{target.name}'", product, w_hidden, b_hidden, cells,
                tuple(s[place] for s in states), reverse=direction == 1,
            )  # fmt: skip
            outputs.append(out)
            last.append(state)
        x = torch.cat(outputs, 2)
        if dropout and layer < num_layers - 1:
            x = functional.dropout(x, dropout, training=train)
    finals = [torch.stack([s[i] for s in last]) for i in range(len(states))]
    return (x if batch_first else x.transpose(0, 1), *finals)


def _rule(function: Any, cells: Cell) -> None:
    @rules(function)
    def recurrent(tape: Tape, func: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        # (input, states, weights, biases?, ...), or (data, lengths, states, weights, ...).
        if kwargs or not isinstance(args[2], (list, tuple)):
            raise ReplaceOperationError(
                f"packed sequences hide which example a row of {operation_name(func)} is of",
                remedy="pass padded tensors",
            )
        states = args[1] if isinstance(args[1], (list, tuple)) else (args[1],)
        return _layers(tape, func, cells, args[0], states, *args[2:])


for _function, _cells in (
    (torch.lstm, _lstm_cell),
    (torch.gru, _gru_cell),
    (torch.rnn_tanh, _tanh_cell),
    (torch.rnn_relu, _relu_cell),
):
    _rule(_function, _cells)


def _cell_rule(function: Any, cells: Cell) -> None:
    @rules(function)
    def cell(
        tape: Tape, _func: Any, x: Tensor, hx: Any, w_in: Tensor, w_hidden: Tensor,
        b_in: Tensor | None = None, b_hidden: Tensor | None = None,
    ) -> Any:  # fmt: skip
        state = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
        with tape:
            product = functional.linear(x, w_in, b_in)
            hidden = functional.linear(tape.tag(state[0]), w_hidden, b_hidden)
        out = cells(product, hidden, state)
        return out if len(out) > 1 else out[0]


for _one_step, _cells in (
    (torch.lstm_cell, _lstm_cell),
    (torch.gru_cell, _gru_cell),
    (torch.rnn_tanh_cell, _tanh_cell),
    (torch.rnn_relu_cell, _relu_cell),
):
    _cell_rule(_one_step, _cells)
