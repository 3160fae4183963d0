"""Advantage estimators without a critic, one file each.

An estimator is a module with these names, in this package or in a file of the user's
own:

* ``HParams``: a frozen dataclass, all of whose fields have defaults;
* ``advantages(outcomes, hp, axis_name)``: [P, G, T] float32 from the ``Outcomes`` of
  this device, 0 outside the responses; ``axis_name`` is the mapped device axis or None;
* ``AGGREGATION``: how its paper sums the tokens of the loss up, a name of
  ``ops.policy_loss.aggregate``: what holds unless ``PolicyHParams.aggregation`` is set;
* ``kept(outcomes)``, where a prompt may be left out of the loss: [P] bool;
* ``WANTS_BASELINE = True``, where ``outcomes.baseline`` must be there;
* ``WANTS_SCORES = True``, where the single rewards must be there by name,
  ``outcomes.scores`` and ``outcomes.weights``; what would change their sum and not
  them (scaling, a clip, a fixed score) is then refused;
* ``WANTS_SUCCESS = True``, where a reward has to be 1 for a success and else 0: a KL
  penalty and other penalties in it are then refused.

Read ``grpo.py`` next, then ``algos/policy_gradient.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from rlhf_jax.named import load_module
from rlhf_jax.ops.policy_loss import Aggregation
from rlhf_jax.types import Array, Outcomes


class Estimator(Protocol):
    """The names of an estimator; those of the module docstring that are not here may be
    absent.
    """

    __name__: str
    AGGREGATION: Aggregation
    HParams: type
    advantages: Callable[[Outcomes, Any, str | None], Array]


def load(name: str, where: str) -> Estimator:
    """The estimator of a name: ``'grpo'`` is a file here, ``'my_pkg.mine'`` any.

    Args:
        name: of the module.
        where: how the user knows the setting, e.g. ``'config.estimator.name'``.

    Raises:
        ValueError: no such module, or one that lacks a name of an estimator.
    """
    return load_module(
        __name__,
        name,
        where=where,
        what='critic-free estimator',
        needed=('HParams', 'AGGREGATION', 'advantages'),
    )
