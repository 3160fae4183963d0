"""Preference losses, one file each: functions of the log-probabilities of responses.

A loss is a module with these names, in this package or in a file of the user's own:

* ``DATA``: ``'pairs'`` or ``'unpaired'``; it takes ``PairLogps`` or ``UnpairedLogps``;
* ``REFERENCE``: whether it needs the log-probabilities of a reference policy;
* ``HParams``: a frozen dataclass, all of whose fields have defaults;
* ``loss(batch, hp)``: the loss of every row [P] float32, and the implicit rewards
  ([P, 2] of pairs, [P] of unpaired responses) that are reported;
* ``context(batch, hp)``, where a row's loss depends on the other rows: numbers by name,
  [P] each, from the *whole* batch, without a gradient; ``loss`` finds them in
  ``batch.context``, and their means are reported under the same names;
* ``TOKENS = True``, where the loss looks at single tokens: it finds their
  log-probabilities in ``batch.tokens``, a ``TokenLogps``, and with ``REFERENCE`` those
  of the reference policy and the KL between both, over the whole vocabulary. The
  reference policy then runs in every step, where otherwise its sums are computed once.

Rows of weight 0 only fill up a batch: a ``context`` leaves them out. The losses of
reward models are in ``reward_losses``. Read ``dpo.py`` next, then
``algos/preference.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

from rlhf_jax.named import load_module
from rlhf_jax.types import Array, PairLogps, UnpairedLogps


class PreferenceLoss(Protocol):
    """The names of a loss module; ``context`` and ``TOKENS`` may be absent."""

    __name__: str
    DATA: Literal['pairs', 'unpaired']
    REFERENCE: bool
    HParams: type
    loss: Callable[[PairLogps | UnpairedLogps, Any], tuple[Array, Array]]


def wants_tokens(loss: PreferenceLoss) -> bool:
    """Whether a loss looks at single tokens, see the module docstring."""
    return getattr(loss, 'TOKENS', False)


def load(name: str, where: str) -> PreferenceLoss:
    """The loss module of a name: ``'ipo'`` is a file here, ``'my_pkg.my_loss'`` any.

    Args:
        name: of the module.
        where: how the user knows the setting, e.g. ``'config.preference.name'``.

    Raises:
        ValueError: no such module, or one that lacks a name of a loss.
    """
    module = load_module(
        __name__,
        name,
        where=where,
        what='preference loss',
        needed=('DATA', 'REFERENCE', 'HParams', 'loss'),
    )
    if module.DATA not in ('pairs', 'unpaired'):
        raise ValueError(f"{name}.DATA={module.DATA!r}; use 'pairs' or 'unpaired'")
    return module
