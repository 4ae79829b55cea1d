"""A cell as a program: its text, what is read of it, its step, and its backward against autograd."""

from __future__ import annotations

import pytest
import torch

from fused_rnn.cells import CELLS
from fused_rnn.cells.program import PREFIX, Graph, parse
from tests.common.programs import GRU, INDRNN, LEAKY, LSTM, PROGRAMS


@pytest.mark.parametrize("text", PROGRAMS.values(), ids=PROGRAMS)
def test_the_text_is_the_program(text: str) -> None:
    assert parse(text).text == text
    assert CELLS[text].name == text and CELLS[text] is CELLS[text]


def test_what_is_read_of_it() -> None:
    assert parse(LSTM).backward_reads() == ((False, True), (False, True))
    assert [CELLS[text].reads_h for text in (LSTM, GRU, LEAKY, INDRNN)] == [False, True, True, True]
    assert [CELLS[text].saved for text in (LSTM, GRU, LEAKY, INDRNN)] == [4, 4, 1, 0]
    assert CELLS[INDRNN].params == ("u",) and not CELLS[INDRNN].recurrent
    assert CELLS[GRU].apart == 1 and CELLS[GRU].title == "gru"


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_step_is_the_built_in_one(name: str) -> None:
    own, built_in = CELLS[PROGRAMS[name]], CELLS[name]
    x, r = torch.randn(2, own.gates, 3, 5, dtype=torch.float64).unbind()
    states = torch.randn(len(own.states), 3, 5, dtype=torch.float64).unbind()
    for a, b in zip(own.step(x, r, states, ()), built_in.step(x, r, states, ()), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("text", PROGRAMS.values(), ids=PROGRAMS)
def test_backward_is_forwards_gradient(text: str) -> None:
    program = parse(text)
    graph, joined, width = program.forward, program.gates - program.apart, program.gates + program.apart
    inputs = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(graph.inputs)]
    after, saved = graph.run(inputs)
    dafter = [torch.randn_like(state) for state in after]
    grads = torch.autograd.grad(after, inputs, dafter, materialize_grads=True)
    states, params = inputs[width : width + len(after)], inputs[width + len(after) :]
    made = program.backward.run([*saved, *states, *after, *params, *dafter])
    apart = grads[joined : program.gates] if program.apart else ()
    expected = [*apart, *grads[:joined], *grads[program.gates :]] if apart else grads
    for a, b in zip([value for group in made for value in group], expected, strict=True):
        torch.testing.assert_close(a.expand_as(b), b)


@pytest.mark.parametrize(
    "wrong",
    [
        "lstm",
        PREFIX,
        LSTM.replace("sigmoid 0", "sigmoid 9"),
        LSTM.replace("sigmoid 0", "sigmoid 0 1"),
        LSTM.replace("sigmoid 0", "sigmoids 0"),
        LSTM.replace(">13 11;", ">13;"),
        LSTM.replace(">15 17 19 21;", ">15 17 19;"),
        LSTM.replace("const 0.0", "const zero"),
        LSTM.replace("4 0 1", "4 0"),
        LSTM.replace("4 0 1", "4 5 1"),
        LSTM[:-40],
    ],
)
def test_what_is_no_program(wrong: str) -> None:
    with pytest.raises(ValueError, match="cell: got "):
        parse(wrong)


def test_values_are_read_by_instructions_and_outputs() -> None:
    assert Graph(3, (), ((1,),)).uses() == {1}
