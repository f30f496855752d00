"""Whether models agree: on the same questions, the same answers?"""

# Shapes: Q questions

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from clipgraft.report.style import Figure, canvas, draw, heat_map, hide_unused

MAX_PANELS = 6
Answers = Mapping[
    str, tuple[np.ndarray, np.ndarray]
]  # question to answers [Q] and which are right [Q]


def agreement_rows(answers: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """Every pair of models, and every model with itself, on every question; two right captions are one answer.

    Args:
        answers: model to its answers; all were asked the same.
    """
    rows = []
    for question in next(iter(answers.values())):
        for one, mine in answers.items():
            for other, theirs in answers.items():
                (answer_Q, right_Q), (answer2_Q, right2_Q) = mine[question], theirs[question]
                rows.append(
                    {
                        "question": question,
                        "model": one,
                        "other": other,
                        "same": float(((answer_Q == answer2_Q) | (right_Q & right2_Q)).mean()),
                        "right": float(right_Q.mean()),
                        "one_right": float((right_Q | right2_Q).mean()),
                        "only_model_right": float((right_Q & ~right2_Q).mean()),
                        "questions": len(right_Q),
                    }
                )
    return rows


def any_right(answers: Mapping[str, Answers], question: str) -> float:
    """Share of questions that at least one model is right on."""
    return float(np.any([of[question][1] for of in answers.values()], axis=0).mean())


def plot_agreement_of_models(
    task: str, answers: Mapping[str, Answers], titles: Mapping[str, str]
) -> Figure:
    """Share of different answers, for each pair of models, one panel for each question.

    Args:
        task: name of the task.
        answers: model to its answers, in pipeline order.
        titles: model to its name for people.
    """
    rows = [{"task": task, **row} for row in agreement_rows(answers)]
    questions = list(dict.fromkeys(row["question"] for row in rows))[:MAX_PANELS]
    best = {
        question: max(row["right"] for row in rows if row["question"] == question)
        for question in questions
    }
    union = {question: any_right(answers, question) for question in questions}
    names = [titles[model] for model in answers]

    def plot() -> Canvas:
        columns = min(3, len(questions))
        lines = math.ceil(len(questions) / columns)
        figure, axes = canvas((1.1 + 0.34 * len(names)) * lines, lines, columns)
        high = 100 * max(0.05, *(1 - row["same"] for row in rows))
        for axis, question in zip(hide_unused(axes, len(questions)), questions, strict=True):
            mine = [100 * (1 - row["same"]) for row in rows if row["question"] == question]
            table = np.array(mine).reshape(len(names), len(names))
            heat_map(axis, table, names, names, high=high, text="{:.1f}")
            axis.tick_params(axis="x", labelrotation=35 if len(names) > 4 else 0)
            right = f"best {100 * best[question]:.0f} %, any {100 * union[question]:.0f} %"
            axis.set_title(f"{question}: {right}")
        return figure

    gain = {question: 100 * (union[question] - best[question]) for question in questions}
    most = max(gain, key=lambda question: gain[question])
    caption = (
        f"Per cent of {rows[0]['questions']:,} pictures of {task} on which two models give different answers: the caption "
        "that they retrieve, the class that they say. Above each panel: how often the best of them is right, and how often "
        "any of them is, which is what a perfect choice between them could have. Look for experts that differ more from one "
        f"another than each from the base; here any of them adds at most {gain[most]:.1f} points to the best ({most}). Bad: "
        "zeros everywhere (experts that learnt nothing of their own), or large numbers without a gain (they differ by noise)."
    )
    return draw("experts_answers", "Do experts agree?", caption, rows, plot)
