"""What a DSPy program has learned, as a template of ours: then labels are scored, in batches, and nothing is written."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from lightning_peft.prompts.template import ANSWER, PromptTemplate
from lightning_peft.prompts.verbalizer import Verbalizer


def template_of(
    program: Any, *, output: str | None = None, form: str | None = None
) -> tuple[PromptTemplate, Verbalizer | None]:
    r"""Return the instruction and the demonstrations of a compiled DSPy program as a template, and the answers of its labels.

    The form has a line for each input, by the field's prefix, and a last one for the answer: ``Text: {text}``, ``Label: {answer}``.
    Demonstrations stand in the order in which DSPy shows them: those that lack a field of the signature come first. The answers
    are the values of an output that is a ``Literal``, in its order; of another type there are none.

    **The trap:** the words around instruction and demonstrations are other ones than DSPy's, and labels are scored, not written:
    measure anew. Of a chain of thought only the answers are kept.

    Args:
        program: A ``dspy.Predict``, or a program with one predictor.
        output: The output field that is the answer; needed where there are several.
        form: Another form, with a slot for each input by its name, and ``{answer}``.

    Raises:
        ValueError: For a program of several predictors, several outputs without ``output``, an unknown one, an input that is
            called ``answer``, or a demonstration that lacks an input or the answer.

    Example::

        template, verbalizer = template_of(compiled)
        scores = label_log_probabilities(model, tokenizer, texts, template, verbalizer)
    """
    predictor = _predictor(program)
    signature = predictor.signature
    answer, inputs = _output(signature, output), list(signature.input_fields)
    if ANSWER in inputs:
        raise ValueError(
            f"template_of: the input {ANSWER!r} has the name of the answer's slot. Rename it in the signature."
        )
    if form is None:
        lines = [
            f"{_prefix(signature, name)} {{{slot}}}"
            for name, slot in [*zip(inputs, inputs, strict=True), (answer, ANSWER)]
        ]
        form = "\n".join(lines)
    template = PromptTemplate(form, instruction=signature.instructions)
    shown = []
    for demonstration in sorted(predictor.demos, key=lambda one: _complete(one, signature.fields)):
        missing = [name for name in [*inputs, answer] if demonstration.get(name) is None]
        if missing:
            raise ValueError(
                f"template_of: the demonstration {dict(demonstration)!r} lacks {missing[0]!r}. Take it out of predictor.demos."
            )
        shown.append(({name: str(demonstration[name]) for name in inputs}, str(demonstration[answer])))
    kind = signature.output_fields[answer].annotation
    labels = [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []
    return template.with_demonstrations(shown), Verbalizer(labels) if labels else None


def _predictor(program: Any) -> Any:
    """Return the only predictor of a program."""
    found = [program] if hasattr(program, "demos") else program.predictors()
    if len(found) != 1:
        raise ValueError(
            f"template_of: the program has {len(found)} predictors. Give one of them: program.predictors()[0]."
        )
    return found[0]


def _output(signature: Any, output: str | None) -> str:
    """Return the name of the output field that is the answer."""
    names = list(signature.output_fields)
    if output is None and len(names) == 1:
        return str(names[0])
    if output is None or output not in names:
        raise ValueError(f"template_of: output={output!r} must be one of the program's outputs: {', '.join(names)}.")
    return output


def _prefix(signature: Any, name: str) -> str:
    """Return what stands before a field's text; its braces are text."""
    prefix: str = signature.fields[name].json_schema_extra["prefix"]
    return prefix.replace("{", "{{").replace("}", "}}")


def _complete(demonstration: Any, fields: Any) -> bool:
    return all(demonstration.get(name) is not None for name in fields)
