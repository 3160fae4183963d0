"""The page of language-model training: pretraining, SFT."""

from __future__ import annotations

from rlhf_jax.pages.drawing import (
    Panel,
    Plot,
    Rows,
    draw_curves,
    draw_panels,
    not_logged,
)
from rlhf_jax.pages.page import Json, Page, Verdict, less, number

GRAD_NORM = Panel('train/grad_norm', 'Gradient norm', 'global L2 norm', log=True)
LR = Panel('train/lr', 'Learning rate', 'per update', exact=True)
SPEED = Panel('train/tokens_per_second', 'Throughput', 'tokens per second')


def verdict_of(e: Json) -> Verdict:
    """Pass: the loss is below the one it started from, and below uniform guessing."""
    good = less(e['loss'], e['loss_before']) and less(e['loss'], e['uniform_loss'])
    return Verdict(
        'pass' if good else 'fail',
        f'loss {number(e["loss"])} nats/token',
        f'below {number(e["loss_before"])} (before) and {number(e["uniform_loss"])} '
        '(uniform guessing)',
    )


def draw(stage: str, rows: Rows, evaluation: Json) -> tuple[list[Plot], list[str]]:
    """The loss, and how the optimisation went."""
    level = ('before', evaluation.get('loss_before'))
    caption = (
        'Lower is better. Thin: each logged step; thick: running mean over 5% of them. '
        'An evaluation curve that turns up while training falls is overfitting.'
    )
    losses, unit = ('train/loss', 'eval/loss'), 'loss (nats per token)'
    plots = draw_curves(f'{stage}-loss', 'Loss', unit, rows, losses, level, caption)
    caption = (
        'A gradient norm whose spikes do not die out points to a learning rate too '
        'high; throughput that sags points to the input pipeline.'
    )
    panels = (GRAD_NORM, LR, SPEED)
    plots += draw_panels(f'{stage}-panels', 'Optimisation', rows, panels, caption)
    return plots, not_logged(rows, (*losses, *(panel.metric for panel in panels)))


PAGE = Page(
    title='Language model',
    verdict=verdict_of,
    required=lambda e: ('loss', 'loss_before', 'tokens', 'uniform_loss'),
    facts=(
        ('Loss', 'loss', 'nats/token'),
        ('Loss before', 'loss_before', 'nats/token'),
        ('Uniform guessing', 'uniform_loss', 'nats/token'),
        ('Evaluated on', 'tokens', 'tokens'),
    ),
    draw=draw,
)
